"""Reads Parquet files: only the columns that are asked for, in batches of a bounded size."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qk_sniffer.corpus.data_files import DataFile, FormatError, open_bytes
from qk_sniffer.corpus.values import Float16, Float32

_BATCH_BYTES, _BATCH_ROWS = 1 << 24, 10_000
_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}
_STRINGS = ("string", "large_string", "string_view")


class ParquetReader:
    """Reads Parquet files."""

    typed = True
    options = frozenset[str]()
    has_schema = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        del options

    def kinds(self, file: DataFile, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the types of all columns."""
        with _opened(file) as parquet:
            return _kinds(parquet)

    def count(self, file: DataFile) -> int:
        """Returns the number of rows, which the file states."""
        with _opened(file) as parquet:
            return int(parquet.metadata.num_rows)

    def read(self, file: DataFile, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on.

        Raises:
            FormatError: the file has no such column, or several, or a text that is not UTF-8.
        """
        with _opened(file) as parquet:
            names = parquet.schema_arrow.names
            if several := [column for column in columns if names.count(column) > 1]:
                raise FormatError(f"it has several columns {several[0]!r}; it has: {', '.join(names)}")
            if absent := [column for column in columns if column not in names]:
                raise FormatError(f"it has no column {absent[0]!r}; it has: {', '.join(names)}")
            kinds = _kinds(parquet)
            groups, skip = _groups(parquet.metadata, start)
            if not groups:
                return
            rows = _batch_rows(parquet.metadata, columns)
            for batch in parquet.iter_batches(rows, row_groups=groups, columns=list(columns)):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                part = batch.slice(skip)
                skip = 0
                values = [_values(part.column(column), column, kinds[column]) for column in columns]
                for row in zip(*values, strict=True):
                    yield dict(zip(columns, row, strict=True))


@contextmanager
def _opened(file: DataFile) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with open_bytes(file, compressed=False) as content:
        # A small buffer bounds the memory, and a large part at a time bounds the number of requests.
        yield pq.ParquetFile(content, buffer_size=0 if file.is_remote else 1 << 20, pre_buffer=file.is_remote)


def _groups(metadata: Any, start: int) -> tuple[list[int], int]:
    """Returns the row groups that hold the rows from `start` on, and the number of their rows before `start`."""
    first, before = 0, 0
    while first < metadata.num_row_groups and before + metadata.row_group(first).num_rows <= start:
        before += metadata.row_group(first).num_rows
        first += 1
    return list(range(first, metadata.num_row_groups)), start - before


def _batch_rows(metadata: Any, columns: Sequence[str]) -> int:
    """Returns the number of rows that have about `_BATCH_BYTES` bytes in the fullest row group."""
    most = 1.0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        size = sum(each.total_uncompressed_size for each in chunks if each.path_in_schema.split(".")[0] in columns)
        most = max(most, size / max(group.num_rows, 1))
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / most)))


def _values(column: Any, name: str, kind: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"its column {name!r} holds text that is not UTF-8 ({error}). Write the file again from the original texts"
        ) from error
    if kind == "uuid":
        return [uuid.UUID(bytes=value) if isinstance(value, bytes) else value for value in values]
    if number := {"float16": Float16, "float32": Float32}.get(kind):
        return [None if value is None else number(value) for value in values]
    return values


def _kinds(parquet: Any) -> dict[str, str]:
    """Returns the types of all columns."""
    ids = _uuids(parquet)
    return {each.name: "uuid" if each.name in ids else _name(each.type) for each in parquet.schema_arrow}


def _uuids(parquet: Any) -> set[str]:
    """Returns the columns of UUIDs, which older versions of the library read as plain bytes."""
    schema = parquet.schema
    leaves = (schema.column(place) for place in range(len(parquet.metadata.schema)))
    return {leaf.path for leaf in leaves if leaf.logical_type.type == "UUID"}


def _name(kind: Any) -> str:
    import pyarrow as pa

    if isinstance(kind, pa.DictionaryType):
        return _name(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _name(kind.storage_type)
    if pa.types.is_null(kind):
        return "unknown"
    text = str(kind)
    if text in _STRINGS:
        return "string"
    return _NAMES.get(text, text.partition("<")[0] if pa.types.is_nested(kind) else text)
