"""Writes Parquet files whose bytes follow from their rows, with the encodings that suit captured vectors.

Vectors: BYTE_STREAM_SPLIT, which puts the bytes of equal weight together (those that widening made zero vanish),
then zstd at its fastest level; no statistics, which serve nobody there. Other columns: dictionary. No page index.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import sync_file
from qk_sniffer.store.layout import VECTOR_PATH
from qk_sniffer.store.manifest import FileEntry

_CHUNK = 1 << 20


class ParquetFile:
    """A Parquet file that is being written: row group by row group, each hashed once it is there. A context manager.

    `entry` is there after the block was left without an exception; the file is durable then.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.entry: FileEntry | None = None
        self._path = path
        self._schema = schema
        self._rows = 0
        # Arrow's own file, read back while it is in the page cache: through a file of Python's each byte is copied
        # once more.
        self._file = pa.OSFile(str(path), "wb")
        self._written = _Hashed(path)
        others = [name for name in schema.names if name != "vector"]
        try:
            self._writer = pq.ParquetWriter(
                self._file,
                schema,
                version="2.6",
                compression="zstd",
                compression_level=1,
                use_dictionary=others,
                column_encoding={VECTOR_PATH: "BYTE_STREAM_SPLIT"} if "vector" in schema.names else None,
                write_statistics=others,
                write_page_index=False,
            )
        except BaseException:
            self._close()
            raise

    def write(self, table: pa.Table) -> None:
        """Adds `table` as one row group."""
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._rows += table.num_rows
        self._written.go_on()

    def __enter__(self) -> "ParquetFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._writer.close()
                size = self._file.tell()
                self._file.close()
                self._written.go_on()
                if self._written.size != size:
                    raise StoreError(
                        f"{self._path}: {size:,} bytes were written and {self._written.size:,} can be read back; this "
                        "file system does not do what a disk does. Choose another output.data_root"
                    )
                sync_file(self._written.descriptor)
                self.entry = FileEntry(self._rows, self._written.size, self._written.digest.hexdigest())
        finally:
            if self.entry is None:
                with suppress(Exception):
                    self._writer.close()  # or it would be closed whenever it is collected
            self._close()
        if kind is None:
            check_encodings(self._path)

    def _close(self) -> None:
        try:
            self._file.close()
        finally:
            self._written.close()


def check_encodings(path: Path) -> None:
    """Checks that the file has the encodings of this module: pyarrow passes over what it does not understand.

    Raises:
        StoreError: naming the column and what is wrong with it.
    """
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name, encodings = column.path_in_schema, column.encodings
            wrong = None
            if column.compression != "ZSTD":
                wrong = f"compression {column.compression}"
            elif name == VECTOR_PATH and "BYTE_STREAM_SPLIT" not in encodings:
                wrong = f"encodings {encodings}, without BYTE_STREAM_SPLIT"
            elif name == VECTOR_PATH and column.is_stats_set:
                wrong = "statistics"
            elif name.startswith("vector") and name != VECTOR_PATH:
                wrong = "another name than " + VECTOR_PATH
            elif name != VECTOR_PATH and column.physical_type != "BOOLEAN" and "RLE_DICTIONARY" not in encodings:
                wrong = f"encodings {encodings}, without a dictionary"
            elif column.has_column_index or column.has_offset_index:
                wrong = "a page index"
            if wrong is not None:
                raise StoreError(f"{path}: column {name} was written with {wrong}; pyarrow {pa.__version__} is not fit")


class _Hashed:
    """The digest of a file that grows. `size`: the bytes that are in it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.digest = hashlib.sha256()
        self.size = 0
        self._chunk = memoryview(bytearray(_CHUNK))

    def go_on(self) -> None:
        """Hashes what was written since."""
        while count := os.preadv(self.descriptor, [self._chunk], self.size):
            self.digest.update(self._chunk[:count])
            self.size += count

    def close(self) -> None:
        os.close(self.descriptor)
