"""Reads Parquet files of a declared form. `ParquetWriter` writes them; someone else may have changed them since.

A file of a few bytes can claim any number of rows, which would fill the memory of the reader. The claims of a file are
compared with its pages and with the available memory before rows are read.
"""

import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qk_sniffer.config import from_dict
from qk_sniffer.machine import available_memory
from qk_sniffer.store.disk import open_regular
from qk_sniffer.store.files import compared_file
from qk_sniffer.store.layout import examples_schema
from qk_sniffer.store.parquet_files import open_parquet
from qk_sniffer.store.parquet_pages import PageError, read_pages
from qk_sniffer.store.row_filter import RowFilter
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.store.text_segments import TextSegments
from qk_sniffer.text import in_mb

MOST_EXPANSION = 2_000
"""The largest ratio of the rows in memory to the file. Files of vectors that are all 0 have 300."""

_MEMORY_OF_SEGMENTS = 10
"""The memory that the runs of segments take for each byte of their text: 64 bytes for a run of 8 characters or more,
and copies of the text."""

UNREADABLE = (OSError, ValueError, MemoryError, pa.ArrowException)
"""The errors of pyarrow for a damaged file."""


def read_table(
    path: Path,
    schema: pa.Schema,
    *,
    way_out: str,
    rows: int | None = None,
    columns: Sequence[str] | None = None,
    only: RowFilter | None = None,
) -> pa.Table:
    """Returns the columns of `schema` from a Parquet file, in the order and with the types of `schema`.

    Args:
        path: the file. It may have other columns too.
        schema: of numbers, booleans, texts, and lists of a fixed number of numbers.
        way_out: the end of the error message.
        rows: the number of rows that the file must have; None for any.
        columns: some columns of `schema`, in the order of the result; None for all.
        only: the rows to return, by columns of `schema`; None for all. Row groups without such rows are not read.

    Raises:
        UnreadableError: the file is missing or damaged, lacks one of the columns, has another number of rows, or does
            not fit in memory.
    """
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    with opened(path, schema, way_out=way_out, rows=rows) as file:
        if only is not None and only.columns:
            table = _read_some(path, file, schema, wanted, only, way_out)
        else:
            if problem := excess(path, file, wanted):
                raise UnreadableError(path, problem, way_out)
            table = _read(path, file, wanted, way_out)
        table.validate(full=True)  # also that texts are UTF-8
    for field in wanted:
        if not field.nullable and table[field.name].null_count:
            raise UnreadableError(path, f"has nulls in the column {field.name}", way_out)
    return table


def read_examples(path: Path, manifest: Mapping[str, Any], *, way_out: str) -> pa.Table:
    """Returns the list of examples of the dataset with this manifest.

    Raises:
        UnreadableError: as for `read_table`; or the examples are not those of the manifest.
    """
    config = from_dict(manifest["config"])
    split = config.model.tokenizer.overlong == "split"
    described = examples_schema(split=split, segments=config.has_segments, from_python="source" in manifest)
    table = read_table(path, described, way_out=way_out, rows=manifest["examples"])
    ids, lengths, index = (values(table[name]) for name in ("example_id", "num_tokens", "index"))
    tokens, longest = int(lengths.sum(dtype=np.int64)), int(lengths.max(initial=0))
    part = values(table["part"]) if split else np.zeros_like(index)
    problem = None
    if len(np.unique(ids)) != len(ids) or out_of_order(index, part).any():
        problem = "lists an example twice, or not in the order of the source"
    elif len(lengths) and int(lengths.min()) < 1:
        problem = "lists an example without tokens"
    elif (tokens, longest) != (manifest["tokens"], manifest["longest_example"]):
        listed = f"{manifest['tokens']:,} tokens, {manifest['longest_example']:,} at most"
        problem = f"has examples of {tokens:,} tokens, {longest:,} at most, and manifest.json lists {listed}"
    elif config.has_segments:
        problem = _segments_problem(table, manifest)
    if problem is not None:
        raise UnreadableError(path, problem, way_out)
    return table


def values(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Returns the values of a column of numbers or booleans, with arbitrary values in place of nulls.

    pyarrow's `to_numpy` imports pandas, which takes as long as verifying a small dataset, or as a job that finds its
    dataset finished.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_boolean(array.type):
        return values(array.cast(pa.uint8())).astype(bool)
    without_nulls = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    return np.from_dlpack(without_nulls)


def out_of_order(index: npt.NDArray[Any], part: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each example (num_examples,) does not follow the one before it.

    It is the first part of a later text, or the next part of the same text.
    """
    step, before = np.diff(index, prepend=-1), np.concatenate([[-1], part[:-1]])
    return np.asarray(np.where(step == 0, part != before + 1, (step < 0) | (part != 0)))


@contextmanager
def opened(path: Path, schema: pa.Schema, *, way_out: str, rows: int | None = None) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file that has the columns of `schema`, and `rows` rows unless `rows` is None.

    Raises:
        UnreadableError: the file is missing or damaged, has other columns or rows, or a read in the block fails.
    """
    try:
        # pyarrow would read all files of a folder, and wait for the other end of a pipe.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError(path, "is not a file", way_out)
        with compared_file(path, way_out=way_out) as source, open_parquet(source) as file:
            if wrong := "; ".join(_differences(file.schema_arrow, schema)):
                raise UnreadableError(path, f"has other columns ({wrong})", way_out)
            if rows is not None and file.metadata.num_rows != rows:
                numbers = f"has {file.metadata.num_rows:,} rows, and manifest.json lists {rows:,}"
                raise UnreadableError(path, numbers, way_out)
            yield file
    except UNREADABLE as error:
        raise UnreadableError(path, f"is missing or damaged ({first_line(error)})", way_out) from error


def excess(
    path: Path,
    file: pq.ParquetFile,
    schema: pa.Schema,
    *,
    at_once: bool = True,
    groups: Sequence[int] | None = None,
) -> str | None:
    """Returns what keeps the columns of `schema` in the open `file` at `path` from being read; None if nothing does.

    Compares the number of values that the file claims with its pages, and the memory that a read takes with the
    available memory. Texts count with the bytes of their pages. `at_once` says that all rows are in memory at once;
    otherwise those of one row group are. `groups` are the row groups that are to be read; None for all.
    """
    metadata = file.metadata
    row_groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    try:
        with open_regular(path) as raw:
            size = raw.seek(0, 2)
            if _compressed_bytes(row_groups) > size:  # columns that overlap would be read more than once
                return "is missing or damaged (its columns claim more bytes than it has)"
            sizes = [
                _group_bytes(raw, schema, group)
                for number, group in enumerate(row_groups)
                if groups is None or number in groups
            ]
    except (PageError, *UNREADABLE) as error:
        return f"is missing or damaged ({first_line(error)})"
    if sum(group.num_rows for group in row_groups) != metadata.num_rows:
        return "is missing or damaged (its row groups have another number of rows than it claims)"
    if sum(sizes) > MOST_EXPANSION * size:
        return f"claims {metadata.num_rows:,} rows of {in_mb(sum(sizes))} in {size:,} bytes"
    return too_large(sum(sizes) if at_once else max(sizes, default=0))


def read_numbers(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Returns a column of numbers without nulls as an array (rows,), which is writable as pyarrow's are not."""
    return np.array(column.to_numpy())


def read_matrix(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Returns the lists of a column of fixed_size_list without nulls as a matrix (rows, size of a list), writable."""
    size = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, size) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty((0, size), column.type.value_type.to_pandas_dtype())


def _segments_problem(table: pa.Table, manifest: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the segments of examples whose other columns are right; None if nothing is."""
    if problem := too_large(_MEMORY_OF_SEGMENTS * int(table["segments"].nbytes)):
        return problem
    try:
        found = TextSegments.of(table["segments"].to_pylist(), table["num_tokens"].to_pylist()).num_tokens()
    except ValueError as error:
        return f"has wrong segments ({first_line(error)})"
    if found != manifest.get("segments"):
        return "has segments of other numbers of tokens than manifest.json lists"
    return None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error of pyarrow."""
    return (str(error) or type(error).__name__).partition("\n")[0]


def _read_some(
    path: Path, file: pq.ParquetFile, schema: pa.Schema, wanted: pa.Schema, only: RowFilter, way_out: str
) -> pa.Table:
    """Returns the columns of `wanted` in the rows that `only` keeps. The columns that it looks at are read first."""
    named = pa.schema([schema.field(name) for name in only.columns])
    both = pa.unify_schemas([named, wanted])
    groups = [number for number in range(file.num_row_groups) if only.may_match(file.metadata.row_group(number))]
    if problem := excess(path, file, named, at_once=False, groups=groups):
        raise UnreadableError(path, problem, way_out)
    kept = {}
    for number in groups:
        names = file.read_row_group(number, columns=named.names)
        for name in named.names:
            if names[name].null_count:
                raise UnreadableError(path, f"has nulls in the column {name}", way_out)
        if (mask := only.mask(names)).any():
            kept[number] = mask
    problem = excess(path, file, both, at_once=False, groups=[*kept])
    if problem is None:
        row = sum(_bytes_per_row(field.type) for field in wanted if field.type != pa.string())
        problem = too_large(row * sum(int(mask.sum()) for mask in kept.values()))
    if problem is not None:
        raise UnreadableError(path, problem, way_out)
    tables = [_read(path, file, wanted, way_out, [number]).filter(pa.array(mask)) for number, mask in kept.items()]
    # One that is empty has the types of a file without wanted rows, and the metadata of the file.
    return pa.concat_tables([_read(path, file, wanted, way_out, []), *tables])


def _read(
    path: Path, file: pq.ParquetFile, schema: pa.Schema, way_out: str, groups: Sequence[int] | None = None
) -> pa.Table:
    """Returns the columns of `schema` in some row groups of the open file; None for all."""
    chosen = range(file.num_row_groups) if groups is None else groups
    texts = [field.name for field in schema if field.type == pa.string()]
    if not texts:
        return file.read_row_groups(chosen, columns=schema.names).select(schema.names)
    # A repeated text is in memory once, until the length of all texts together is known.
    with open_parquet(path, metadata=file.metadata, read_dictionary=texts) as compact:
        table = compact.read_row_groups(chosen, columns=schema.names).select(schema.names)
    for name in texts:
        if problem := too_large(sum(map(_text_bytes, table[name].chunks))):
            raise UnreadableError(path, problem, way_out)
        place = schema.get_field_index(name)
        table = table.set_column(place, file.schema_arrow.field(name), table[name].cast(pa.string()))
    return table.replace_schema_metadata(file.schema_arrow.metadata)


def _compressed_bytes(row_groups: Sequence[Any]) -> int:
    columns = (group.column(number) for group in row_groups for number in range(group.num_columns))
    return sum(max(0, column.total_compressed_size) for column in columns)


def _group_bytes(raw: BinaryIO, schema: pa.Schema, group: Any) -> int:
    """Returns the bytes in memory of the rows of a row group, with the largest pages."""
    if not group.num_rows:
        return 0
    columns = [group.column(number) for number in range(group.num_columns)]
    total = 0
    for field in schema:
        parts = [column for column in columns if column.path_in_schema.partition(".")[0] == field.name]
        width = field.type.list_size if pa.types.is_fixed_size_list(field.type) else 1
        if len(parts) != 1 or parts[0].num_values != group.num_rows * width:
            raise PageError(f"the column {field.name} claims another number of values than its rows have")
        column = parts[0]
        starts = [column.data_page_offset, *([column.dictionary_page_offset] if column.has_dictionary_page else [])]
        pages = read_pages(raw, min(starts), column.total_compressed_size)
        if pages.values != column.num_values:
            raise PageError(f"the pages of the column {field.name} have another number of values than it claims")
        if field.type == pa.string():
            total += pages.size + 8 * group.num_rows
        else:
            total += pages.largest + _bytes_per_row(field.type) * group.num_rows
    return total


def _bytes_per_row(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size * _bytes_per_row(kind.value_type))
    return max(1, int(kind.bit_width) // 8)


def _text_bytes(chunk: pa.DictionaryArray) -> int:
    lengths = pc.take(pc.binary_length(chunk.dictionary), chunk.indices)
    return int(pc.sum(lengths).as_py() or 0)


def too_large(required: int) -> str | None:
    """Returns why rows that take `required` bytes are not read; None if they fit in memory."""
    available = available_memory()
    if required <= available:
        return None
    return f"does not fit in memory: its rows take {in_mb(required)}, and {in_mb(available)} are available"


def _differences(found: pa.Schema, expected: pa.Schema) -> Iterator[str]:
    for field in expected:
        places = found.get_all_field_indices(field.name)
        if len(places) != 1:
            yield f"{field.name} {'is missing' if not places else 'occurs twice'}"
        elif (kind := found.field(places[0]).type) != field.type:
            yield f"{field.name} is {kind} instead of {field.type}"
