"""Opens Parquet files at any path.

pyarrow takes a path as UTF-8 text. It refuses a path of other bytes, and in a locale with another encoding it opens
another file. Python opens the files at these paths.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.text import is_utf8_path


@contextmanager
def open_parquet(path: Path, **options: Any) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file for reading, with options of `pq.ParquetFile`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        pa.ArrowException: it is not a Parquet file.
    """
    with _source(path) as source, pq.ParquetFile(source, **options) as file:
        yield file


def read_parquet(path: Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns the rows of a Parquet file, or some of its columns.

    Raises:
        OSError: there is no such file, or it cannot be read.
        pa.ArrowException: it is not a Parquet file.
    """
    with _source(path) as source:
        return pq.read_table(source, columns=columns)


@contextmanager
def _source(path: Path) -> Iterator[Path | BinaryIO]:
    if is_utf8_path(path):
        yield path
    else:
        with path.open("rb") as file:
            yield file
