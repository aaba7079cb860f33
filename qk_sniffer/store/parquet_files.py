"""Opens Parquet files at any path.

pyarrow takes a path as UTF-8 text. It refuses a path of other bytes, and in a locale with another encoding it opens
another file. Python opens the files at these paths, and those below a folder that is open.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.store.disk import explained, open_file
from qk_sniffer.store.open_folder import Access
from qk_sniffer.text import is_utf8_path


@contextmanager
def open_parquet(path: Path, access: Access | None = None, **options: Any) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file for reading, with options of `pq.ParquetFile`.

    `access` is the way to a file that may not be a link; None looks up the path.

    Raises:
        OSError: there is no such file, or it cannot be read.
        StoreError: the same, with `access`.
        pa.ArrowException: it is not a Parquet file.
    """
    with _source(path, access) as source, pq.ParquetFile(source, **options) as file:
        yield file


def read_parquet(path: Path, *, columns: Sequence[str] | None = None, access: Access | None = None) -> pa.Table:
    """Returns the rows of a Parquet file, or some of its columns.

    Args and errors are those of `open_parquet`.
    """
    with _source(path, access) as source:
        return pq.read_table(source, columns=columns)


@contextmanager
def _source(path: Path, access: Access | None) -> Iterator[Path | BinaryIO]:
    if access is not None:
        with explained(path, "read"):
            opened = open_file(path, access)
        with opened:
            yield opened
    elif is_utf8_path(path):
        yield path
    else:
        with path.open("rb") as file:
            yield file
