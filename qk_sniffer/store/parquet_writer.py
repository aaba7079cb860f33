"""Writes Parquet files whose bytes follow from their rows, with the encodings that suit captured vectors.

Columns of float32, such as the vectors, are encoded with BYTE_STREAM_SPLIT, which groups the bytes of equal weight, and
compressed with zstd at its fastest level. The zero bytes of widened numbers then take no space. They have no
statistics, because no reader needs them. Other columns have a dictionary. No file has a page index.
"""

import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import sync_file
from qk_sniffer.store.files import DESCRIPTORS
from qk_sniffer.store.layout import LIST_PATH
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import PLAIN, Access


class ParquetWriter:
    """Writes a Parquet file, row group by row group. A context manager. Replaces an existing file.

    `access` is the way to the folder of the file, which is made if it is missing.
    `entry` is set when the block ends without an exception; the file is durable then.
    """

    def __init__(self, path: Path, schema: pa.Schema, access: Access = PLAIN) -> None:
        self.entry: FileEntry | None = None
        self._path = path
        self._rows = 0
        self._written: list[pq.FileMetaData] = []
        with access.open(path.parent, create=True) as folder:
            self._file = folder.create(path.name)
        self._output = _output(self._file.fileno())
        self._writer = pq.ParquetWriter(self._output, schema, **options(schema), metadata_collector=self._written)

    def write(self, table: pa.Table) -> None:
        """Adds `table` as one row group.

        The dictionary of a column has its values in the order in which they occur, so that it follows from the rows.
        """
        for number, field in enumerate(table.schema):
            if pa.types.is_dictionary(field.type):
                values = table.column(number).cast(field.type.value_type).combine_chunks()
                table = table.set_column(number, field, values.dictionary_encode())
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._rows += table.num_rows

    def __enter__(self) -> "ParquetWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file as file:
            if kind is not None:
                with suppress(Exception):
                    self._close()
                return
            self._close()
            check_encodings(self._path, self._written[0])
            sync_file(file.fileno())
            # Hashed from a mapping: pyarrow would copy each write for a Python file object that hashes it.
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                self.entry = FileEntry(self._rows, len(data), hashlib.sha256(data).hexdigest())

    def _close(self) -> None:
        try:
            with self._output:
                self._writer.close()
        finally:
            self._writer.is_open = False  # otherwise pyarrow closes it again when it collects the writer


def _output(descriptor: int) -> pa.NativeFile:
    """Opens the file of a descriptor for pyarrow, whatever is at its path."""
    # A file of pyarrow takes each page from where it is: writing float32 takes 5 % less CPU time than with a file of
    # Python. It opens the file again, which needs the right to do so: a umask such as 0222 has taken it away.
    with suppress(OSError):
        if DESCRIPTORS.is_dir():
            return pa.OSFile(str(DESCRIPTORS / str(descriptor)), "wb")
    # Buffered: pyarrow does not ask how many bytes a write has taken.
    return pa.PythonFile(os.fdopen(os.dup(descriptor), "wb"), mode="w")


def options(schema: pa.Schema) -> dict[str, Any]:
    """Returns the arguments of `pyarrow.parquet.ParquetWriter` for a file with these columns."""
    numbers = [_path(field) for field in schema if _is_float(field.type)]
    others = [_path(field) for field in schema if not _is_float(field.type)]
    return {
        "version": "2.6",
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": others,
        "column_encoding": dict.fromkeys(numbers, "BYTE_STREAM_SPLIT") or None,
        "write_statistics": others,
        "write_page_index": False,
    }


def _path(field: pa.Field) -> str:
    return f"{field.name}{LIST_PATH}" if pa.types.is_fixed_size_list(field.type) else str(field.name)


def _is_float(kind: pa.DataType) -> bool:
    return bool((kind.value_type if pa.types.is_fixed_size_list(kind) else kind) == pa.float32())


def check_encodings(path: Path, metadata: pq.FileMetaData) -> None:
    """Checks that the file of this footer has the encodings of this module, because pyarrow ignores unknown options.

    Raises:
        StoreError: a column is encoded differently. The error names the column and the difference.
    """
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name, encodings = column.path_in_schema, column.encodings
            is_float = column.physical_type == "FLOAT"
            wrong = None
            if column.compression != "ZSTD":
                wrong = f"compression {column.compression}"
            elif "." in name and not name.endswith(LIST_PATH):
                wrong = f"another name than {name.partition('.')[0]}{LIST_PATH}"
            elif is_float and "BYTE_STREAM_SPLIT" not in encodings:
                wrong = f"encodings {encodings}, without BYTE_STREAM_SPLIT"
            elif is_float and column.is_stats_set:
                wrong = "statistics"
            elif not is_float and column.physical_type != "BOOLEAN" and "RLE_DICTIONARY" not in encodings:
                wrong = f"encodings {encodings}, without a dictionary"
            elif column.has_column_index or column.has_offset_index:
                wrong = "a page index"
            if wrong is not None:
                raise StoreError(
                    f"{path}: column {name} was written with {wrong}; pyarrow {pa.__version__} does not work"
                )
