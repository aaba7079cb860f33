"""Compares the rows of a dataset's heads with the contract and with the rows that the sampler chooses.

A head's file is read in batches, so memory does not grow with the file. The sampler runs once for several heads of one
(layer, kind), and its rows are compared with the rows of each of them, block of examples by block of examples. Missing
or surplus rows in one block do not make the rows of later blocks wrong.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.dataset.verify_report import Problem
from qk_sniffer.store.layout import OFFSET_COLUMNS, Head
from qk_sniffer.store.parquet_files import open_parquet
from qk_sniffer.store.parquet_tables import UNREADABLE, excess, first_line, values
from qk_sniffer.store.text_segments import TextSegments

BLOCK_TOKENS = 1 << 20
"""Tokens of the examples in a block."""

BATCH_ROWS = 1 << 16
"""Rows in a batch of the columns other than the vector."""

BATCH_BYTES = 1 << 23
"""Size of a batch of vectors."""

_COLUMNS = ["bucket", "example_id", "position", "sliding_window"]
_FURTHER = ("segment", *OFFSET_COLUMNS)
"""Columns that are checked where a file has them."""
_POSITION_BITS = 32

Bools = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples in the order of the dataset; arrays are (num_examples,), ids are unique.

    `segments` are those of their tokens; None without segments.
    """

    example_id: Int32
    num_tokens: Int32
    sampling_id: Int64
    """The number that the sampler hashes."""
    first_position: Int32
    """The position from which on the tokens were seen."""
    segments: TextSegments | None = None

    def places(self, ids: Int32) -> Int64:
        """Returns the index of each id in that order, -1 for an unknown id."""
        ordered = self.example_id[self._order]
        at = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
        return np.where(ordered[at] == ids, self._order[at], -1)

    def blocks(self) -> Iterator[slice]:
        """Yields blocks of at most `BLOCK_TOKENS` tokens; an example with more tokens is a block of its own."""
        ends = np.cumsum(self.num_tokens, dtype=np.int64)
        start = 0
        while start < len(ends):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
            yield slice(start, stop)
            start = stop

    def in_segments(self, block: slice, names: Collection[str] | None) -> Bools | None:
        """Returns which tokens of a block of examples are in segments of `names`, one example after the other.

        Returns None if `names` is None.
        """
        if names is None:
            return None
        assert self.segments is not None
        lengths = self.num_tokens[block].astype(np.int64)
        place = np.repeat(np.arange(block.start, block.stop), lengths)
        position = np.arange(len(place)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.segments.are_in(names)[self.segments.codes(place, position)]

    def count(self, names: Collection[str] | None, start: int = 0, stop: int | None = None) -> int:
        """Returns the number of tokens in segments of `names`, at positions from `start` on and below `stop`.

        None for `names`: in any segment, or none; None for `stop`: to the end.
        """
        if names is not None:
            assert self.segments is not None
            counts = self.segments.num_tokens(start, stop)
            return sum(counts.get(name, 0) for name in names)
        lengths = self.num_tokens.astype(np.int64)
        stops = lengths if stop is None else np.minimum(lengths, stop)
        return int(np.maximum(stops - np.maximum(self.first_position, start), 0).sum())

    @cached_property
    def _order(self) -> Int64:
        return np.argsort(self.example_id, kind="stable")


@dataclass
class HeadCheck:
    """The result of checking a head's file.

    `readable`: the file has the columns of the contract, so that its rows can be checked. `keys_crc` is equal for heads
    with the same rows.
    """

    problems: list[Problem] = field(default_factory=list)
    readable: bool = True
    rows_by_bucket: Counter[int] = field(default_factory=Counter)
    nonfinite: int = 0
    keys_crc: int = 0


def check_file(path: Path, head: Head, schema: pa.Schema, rows: int) -> HeadCheck:
    """Checks the schema, metadata, number of rows and vectors of a head's file."""
    result = HeadCheck()
    try:
        with open_parquet(path) as file:
            result.problems += schema_problems(head, schema, file.schema_arrow)
            result.readable = not result.problems
            result.problems += metadata_problems(head, file.schema_arrow)
            if file.metadata.num_rows != rows:
                numbers = f"{file.metadata.num_rows:,} instead of {rows:,}"
                what = "has another number of rows than manifest.json lists"
                result.problems.append(Problem.of(head, "parquet", what, numbers))
            if result.readable and (problem := excess(path, file, schema, at_once=False)) is not None:
                result.problems.append(Problem.of(head, "parquet", "cannot be read as Parquet", problem))
                result.readable = False
            if result.readable:
                result.nonfinite, nulls = _count_nonfinite(file, head.head_dim)
                if nulls:
                    result.problems.append(Problem.of(head, "vector", "vectors have numbers that are null", rows=nulls))
    except UNREADABLE as error:
        result.problems.append(unreadable(head, error))
        result.readable = False
    return result


def check_rows(root: Path, heads: Sequence[Head], sampler: Sampler, examples: Examples) -> list[HeadCheck]:
    """Checks the rows of `heads`, which are of one (layer, kind) and have files that `check_file` finds readable."""
    layer, kind = heads[0].layer, heads[0].kind
    with ExitStack() as stack:
        files = [stack.enter_context(open_parquet(root / head.file)) for head in heads]
        streams = [_Stream(head, file, sampler, examples) for head, file in zip(heads, files, strict=True)]
        for block in examples.blocks():
            ids, lengths = examples.sampling_id[block], examples.num_tokens[block].tolist()
            in_segments = examples.in_segments(block, sampler.config.segments)
            picks = sampler.plan(ids, lengths, [(layer, kind)], in_segments)[layer, kind]
            place = picks.row + np.int64(block.start)
            seen = picks.position >= examples.first_position[place]
            expected = _keys(place[seen], picks.position[seen])
            for stream in streams:
                stream.compare(expected, block.stop)
        return [stream.finish() for stream in streams]


class _Stream:
    """Reads the rows of one head from the first to the last and checks them."""

    def __init__(self, head: Head, file: pq.ParquetFile, sampler: Sampler, examples: Examples) -> None:
        self._head, self._sampler, self._examples = head, sampler, examples
        further = [name for name in _FURTHER if name in file.schema_arrow.names]
        self._batches = batches(file, BATCH_ROWS, [*_COLUMNS, *further])
        self._result = HeadCheck()
        self._wrong: dict[tuple[str, str], tuple[int, str]] = {}  # rows and first instance by check and problem
        self._row = 0
        self._last = np.int64(-1)
        self._pending = np.empty(0, np.int64)
        self._sorted = self._whole = True

    def compare(self, expected: Int64, stop: int) -> None:
        """Compares the rows of the examples before index `stop` with the keys that the sampler chooses."""
        found = self._before(stop)
        if self._sorted and self._whole and not np.array_equal(found, expected):
            distinct = np.unique(found)
            for what, keys in (
                ("rows that the sampler chooses are missing", np.setdiff1d(expected, distinct, assume_unique=True)),
                ("the head has rows that the sampler does not choose", np.setdiff1d(distinct, expected, True)),
            ):
                if len(keys):
                    self._add("sampler", what, len(keys), self._place(keys[0]))

    def finish(self) -> HeadCheck:
        """Reads the remaining rows and returns the result."""
        while self._read() is not None:
            pass
        for (check, what), (rows, instance) in self._wrong.items():
            # In a file that is not sorted, rows may have seemed to be missing before the disorder showed.
            if check != "sampler" or (self._sorted and self._whole):
                self._result.problems.append(Problem.of(self._head, check, what, instance, rows))
        return self._result

    def _before(self, stop: int) -> Int64:
        """Returns the keys of the next rows that belong to examples before index `stop`."""
        end = np.int64(stop) << _POSITION_BITS
        parts = [self._pending]
        while not (len(parts[-1]) and parts[-1][-1] >= end) and (keys := self._read()) is not None:
            parts.append(keys)
        keys = np.concatenate(parts)
        cut = int(np.searchsorted(keys, end)) if self._sorted else len(keys)
        self._pending = keys[cut:]
        return keys[:cut]

    def _read(self) -> Int64 | None:
        """Checks the next rows and returns the keys of the rows with valid positions; None at the end of the file."""
        try:
            batch = next(self._batches, None)
        except UNREADABLE as error:
            self._result.problems.append(unreadable(self._head, error))
            self._whole = False
            batch = None
        if batch is None:
            return None
        bucket, example_id, position = (values(batch.column(name)) for name in _COLUMNS[:3])
        place = self._examples.places(example_id)
        known = place >= 0
        examples = self._examples
        inside = (position >= examples.first_position[place]) & (position < examples.num_tokens[place])

        def instance(row: int) -> str:
            return f"row {self._row + row}, example {example_id[row]}, position {position[row]}"

        def tokens(row: int) -> str:
            return f"{instance(row)} of {self._examples.num_tokens[place[row]]} tokens"

        self._check("example_id", "rows belong to examples that examples/data.parquet does not have", ~known, instance)
        self._check("position", "positions are outside of their example", known & ~inside, tokens)
        self._check_buckets(bucket, position, instance)
        self._check_windows(batch.column("sliding_window"), instance)
        self._check_segments(batch, place, known & inside, instance)
        self._check_offsets(batch, instance)
        rows = np.flatnonzero(known & inside)
        keys = _keys(place[rows], position[rows])
        steps = np.diff(keys, prepend=self._last)
        self._check("order", "rows are not sorted by example and position", steps < 0, lambda at: instance(rows[at]))
        self._check("unique", "an example and position occurs twice", steps == 0, lambda at: instance(rows[at]))
        self._sorted = self._sorted and not (steps < 0).any()
        if len(keys):
            self._last = keys[-1]
        self._row += batch.num_rows
        self._result.keys_crc = zlib.crc32(keys.tobytes(), self._result.keys_crc)
        return keys

    def _check_buckets(self, bucket: Int32, position: Int32, instance: Callable[[int], str]) -> None:
        expected = self._sampler.bucket(self._head.kind, np.maximum(position, 0))
        self._check(
            "bucket",
            "buckets do not match the positions",
            (bucket != expected) & (position >= 0),
            lambda row: f"{instance(row)}: bucket {bucket[row]} instead of {expected[row]}",
        )
        for value, rows in zip(*np.unique(bucket, return_counts=True), strict=True):
            self._result.rows_by_bucket[int(value)] += int(rows)

    def _check_windows(self, column: pa.Array, instance: Callable[[int], str]) -> None:
        window = self._head.sliding_window
        is_null = values(column.is_null())
        windows = values(column)
        self._check(
            "sliding_window",
            "sliding_window does not match the layer",
            ~is_null if window is None else is_null | (windows != window),
            lambda row: f"{instance(row)}: {'null' if is_null[row] else windows[row]} instead of {window or 'null'}",
        )

    def _check_segments(
        self, batch: pa.RecordBatch, place: Int64, is_token: Bools, instance: Callable[[int], str]
    ) -> None:
        """Checks the segments of the rows that are tokens of examples."""
        segments = self._examples.segments
        if segments is None or "segment" not in batch.schema.names:
            return
        column = batch.column("segment")
        names = pa.array(segments.names, pa.string())
        found = values(pc.fill_null(pc.index_in(column.dictionary, names), -1))[values(column.indices)]
        position = values(batch.column("position"))
        expected = segments.codes(np.where(is_token, place, 0), np.where(is_token, position, 0))
        self._check(
            "segment",
            "segments are not those of the example's tokens",
            is_token & (found != expected),
            lambda row: f"{instance(row)}: {column[row].as_py()} instead of {segments.names[expected[row]]}",
        )

    def _check_offsets(self, batch: pa.RecordBatch, instance: Callable[[int], str]) -> None:
        if OFFSET_COLUMNS[0] not in batch.schema.names:
            return
        start, stop = (values(batch.column(name)) for name in OFFSET_COLUMNS)
        is_null, other = (values(batch.column(name).is_null()) for name in OFFSET_COLUMNS)
        self._check(
            "offsets",
            "char_start and char_end are no range of characters",
            (is_null != other) | (~is_null & ((start < 0) | (start > stop))),
            lambda row: f"{instance(row)}: {' to '.join(str(batch.column(name)[row]) for name in OFFSET_COLUMNS)}",
        )

    def _check(self, check: str, what: str, wrong: Bools, instance: Callable[[int], str]) -> None:
        if wrong.any():
            self._add(check, what, int(wrong.sum()), instance(int(np.argmax(wrong))))

    def _add(self, check: str, what: str, rows: int, instance: str) -> None:
        before, first = self._wrong.get((check, what), (0, instance))
        self._wrong[check, what] = before + rows, first

    def _place(self, key: np.int64) -> str:
        example_id = self._examples.example_id[key >> _POSITION_BITS]
        return f"example {example_id}, position {key & (2**_POSITION_BITS - 1)}"


def batches(file: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the columns of a file in batches of at most `rows` rows, with at most one row group in memory."""
    # Over the whole file, `iter_batches` keeps every row group that it has read until the last.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _keys(place: Int64, position: Int32) -> Int64:
    """Returns one number for each row; they ascend in the order of the rows."""
    return (place << _POSITION_BITS) | position


def schema_problems(head: Head, expected: pa.Schema, found: pa.Schema) -> Iterator[Problem]:
    if found.names != expected.names:
        columns = f"{', '.join(found.names)} instead of {', '.join(expected.names)}"
        yield Problem.of(head, "schema", "columns differ from the contract", columns)
    elif different := [
        f"{column.name} is {_type(column)} instead of {_type(right)}"
        for column, right in zip(found, expected, strict=True)
        if not column.equals(right)
    ]:
        yield Problem.of(head, "schema", "column types differ from the contract", ", ".join(different))


def metadata_problems(head: Head, found: pa.Schema) -> Iterator[Problem]:
    metadata = {key.decode(): value.decode() for key, value in (found.metadata or {}).items()}
    if wrong := [
        f"{key} is {metadata.get(key, 'missing')} instead of {value}"
        for key, value in head.metadata.items()
        if metadata.get(key) != value
    ]:
        yield Problem.of(head, "metadata", "the file's metadata differs from manifest.json", ", ".join(wrong))


def _type(column: pa.Field) -> str:
    return f"{column.type}{'' if column.nullable else ' without nulls'}"


def _count_nonfinite(file: pq.ParquetFile, head_dim: int) -> tuple[int, int]:
    """Returns the number of vectors with NaN or Inf, and the number of nulls in vectors."""
    nonfinite = nulls = 0
    batch_rows = max(1, BATCH_BYTES // (4 * head_dim))
    for batch in batches(file, batch_rows, ["vector"]):
        numbers = batch.column("vector").flatten()
        nulls += numbers.null_count
        finite = np.isfinite(values(numbers)).reshape(-1, head_dim).all(axis=1)
        nonfinite += int((~finite).sum())
    return nonfinite, nulls


def unreadable(head: Head, error: Exception) -> Problem:
    return Problem.of(head, "parquet", "cannot be read as Parquet", first_line(error))
