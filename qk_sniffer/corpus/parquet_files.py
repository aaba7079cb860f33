"""Reads Parquet files: only the columns that are asked for, in batches of a bounded size."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy.typing as npt

from qk_sniffer.corpus.data_files import DataFile, FormatError, open_bytes, refuse_expansion
from qk_sniffer.corpus.values import Float16, Float32
from qk_sniffer.store.parquet_pages import Limits, PageError, Pages, read_pages

_BATCH_BYTES, _BATCH_ROWS = 1 << 24, 10_000
_LIMITS = Limits(pages=1 << 20, header_bytes=1 << 24)
_TEXTS = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_NUMBER_BYTES = 8
_MOST_NESTED = 1 << 21
_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}
_STRINGS = ("string", "large_string", "string_view")


class ParquetReader:
    """Reads Parquet files."""

    typed = True
    options = frozenset({"columns"})
    has_schema = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = options.get("columns")
        self._columns = None if chosen is None else [str(column) for column in chosen]

    def kinds(self, file: DataFile, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the types of all columns, or of those that a card chooses."""
        with _opened(file) as (parquet, _):
            return {
                column: kind
                for column, kind in _kinds(parquet).items()
                if self._columns is None or column in self._columns
            }

    def count(self, file: DataFile) -> int:
        """Returns the number of rows, which the file states."""
        with _opened(file) as (parquet, _):
            return int(parquet.metadata.num_rows)

    def read(self, file: DataFile, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on.

        Raises:
            FormatError: the file has no such column, or several, or a text that is not UTF-8.
        """
        with _opened(file) as (parquet, content):
            names = parquet.schema_arrow.names
            if several := [column for column in columns if names.count(column) > 1]:
                raise FormatError(f"it has several columns {several[0]!r}; it has: {', '.join(names)}")
            if absent := [column for column in columns if column not in names]:
                raise FormatError(f"it has no column {absent[0]!r}; it has: {', '.join(names)}")
            kinds = _kinds(parquet)
            groups, skip = _groups(parquet.metadata, start)
            for group in groups:
                rows = _batch_rows(parquet, group, columns, None if file.is_remote else content)
                for batch in parquet.iter_batches(rows, row_groups=[group], columns=list(columns)):
                    if skip >= batch.num_rows:
                        skip -= batch.num_rows
                        continue
                    part = batch.slice(skip)
                    skip = 0
                    for piece in _pieces(part):
                        values = [_values(piece.column(column), column, kinds[column]) for column in columns]
                        for row in zip(*values, strict=True):
                            yield dict(zip(columns, row, strict=True))


@contextmanager
def _opened(file: DataFile) -> Iterator[tuple[Any, BinaryIO]]:
    import pyarrow.parquet as pq

    with open_bytes(file, compressed=False) as content:
        # A small buffer bounds the memory, and a large part at a time bounds the number of requests.
        parquet = pq.ParquetFile(content, buffer_size=0 if file.is_remote else 1 << 20, pre_buffer=file.is_remote)
        yield parquet, content


def _groups(metadata: Any, start: int) -> tuple[list[int], int]:
    """Returns the row groups that hold the rows from `start` on, and the number of their rows before `start`."""
    first, before = 0, 0
    while first < metadata.num_row_groups and before + metadata.row_group(first).num_rows <= start:
        before += metadata.row_group(first).num_rows
        first += 1
    return list(range(first, metadata.num_row_groups)), start - before


def _batch_rows(parquet: Any, number: int, columns: Sequence[str], content: BinaryIO | None) -> int:
    """Returns the number of rows of a row group that are read at a time.

    A text is not longer than the largest page. It may come out of a page any number of times: a page names a value of
    its dictionary, or the start of the value before. Of lists, rows have the average number of values.

    Args:
        parquet: the file.
        number: of the row group.
        columns: those that are read.
        content: of the file, for the true sizes of pages; None takes the sizes that the file claims, because the
            headers of a remote file's pages cost a request each.

    Raises:
        FormatError: the pages are not as the file claims, or expand out of proportion.
    """
    group = parquet.metadata.row_group(number)
    packed = unpacked = most = 0
    for place in range(group.num_columns):
        chunk, leaf = group.column(place), parquet.schema.column(place)
        if not any(leaf.path == column or leaf.path.startswith(f"{column}.") for column in columns):
            continue  # a column's own name may have dots
        pages = _pages(content, chunk)
        packed += chunk.total_compressed_size
        unpacked += pages.size + (8 * pages.values if leaf.max_repetition_level else 0)
        values_per_row = max(1, -(-pages.values // max(1, group.num_rows)))
        if leaf.physical_type in _TEXTS:
            most += pages.largest * values_per_row
        elif leaf.max_repetition_level:
            most += _NUMBER_BYTES * values_per_row
    refuse_expansion(packed, unpacked, "write the file again without compression")
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, most)))


def _pages(content: BinaryIO | None, chunk: Any) -> Pages:
    if content is None:
        return Pages(chunk.num_values, chunk.total_uncompressed_size, chunk.total_uncompressed_size)
    start, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
    if chunk.has_dictionary_page and 0 < dictionary < start:
        start = dictionary
    try:
        return read_pages(content, start, chunk.total_compressed_size, _LIMITS)
    except (PageError, OSError, ValueError) as error:
        raise FormatError(f"the pages of its column {chunk.path_in_schema!r} are damaged: {error}") from error


def _pieces(batch: Any) -> Iterator[Any]:
    """Yields a batch in pieces whose lists have a bounded number of values. Each takes some hundred bytes in Python.

    Raises:
        FormatError: one row has more values.
    """
    number = sum(_num_nested(batch.column(place)) for place in range(batch.num_columns))
    if number <= _MOST_NESTED:
        yield batch
    elif batch.num_rows == 1:
        raise FormatError(
            f"an example of it has {number:,} values in lists, more than {_MOST_NESTED:,}: leave out the example"
        )
    else:
        half = batch.num_rows // 2
        yield from _pieces(batch.slice(0, half))
        yield from _pieces(batch.slice(half))


def _num_nested(column: Any) -> int:
    """Returns the number of values in the lists and structs of a column that become objects of Python."""
    import pyarrow as pa

    if not pa.types.is_nested(column.type) or _are_integers(column):
        return 0
    children = column.flatten()
    if not isinstance(children, list):
        children = [children]
    return sum(len(child) + _num_nested(child) for child in children)


def _are_integers(column: Any) -> bool:
    """Whether a column is of lists of integers, none of them null."""
    import pyarrow as pa

    is_list = isinstance(column, pa.ListArray | pa.LargeListArray)
    return is_list and pa.types.is_integer(column.type.value_type) and not column.values.null_count


def _values(column: Any, name: str, kind: str) -> list[Any]:
    if _are_integers(column):
        return _integer_arrays(column)
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


def _integer_arrays(column: Any) -> list[npt.NDArray[Any] | None]:
    """Returns an array for each row of a column of lists of integers, which takes a fifth of the memory of lists."""
    offsets, integers = column.offsets.to_numpy(), column.values.to_numpy()
    return [
        integers[start:stop] if valid else None
        for start, stop, valid in zip(offsets[:-1], offsets[1:], column.is_valid().to_pylist(), strict=True)
    ]


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
