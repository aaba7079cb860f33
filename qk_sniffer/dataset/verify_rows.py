"""The rows of a dataset's heads, against the contract and against the sampler, which says exactly which they are.

A head's file is read a few thousand rows at a time, so memory does not grow with it. What the sampler chooses is
computed once for some heads of one (layer, kind), and compared with the rows of all of them, block of examples by block
of examples; within a block the rows may be too few or too many without those that follow being taken for wrong.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.dataset.verify_report import Problem
from qk_sniffer.store.compact import HeadSpec
from qk_sniffer.store.layout import HeadKey, head_name

BLOCK_TOKENS = 1 << 20
"""Of the examples whose rows are compared at a time."""

BATCH_ROWS = 1 << 16
BATCH_BYTES = 1 << 23
"""Of vectors that are read at a time."""

_COLUMNS = ["bucket", "example_id", "position", "sliding_window"]
_POSITION_BITS = 32

Bools = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples in the order of the dataset: `example_id` and `num_tokens` (num_examples,); ids are unique."""

    example_id: Int32
    num_tokens: Int32

    def places(self, ids: Int32) -> Int64:
        """Where each of the ids stands in that order; -1 for those that are not there."""
        ordered = self.example_id[self._order]
        at = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
        return np.where(ordered[at] == ids, self._order[at], -1)

    def blocks(self) -> Iterator[slice]:
        """The examples cut into parts of `BLOCK_TOKENS`, or of one example that has more."""
        ends = np.cumsum(self.num_tokens, dtype=np.int64)
        start = 0
        while start < len(ends):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
            yield slice(start, stop)
            start = stop

    @cached_property
    def _order(self) -> Int64:
        return np.argsort(self.example_id, kind="stable")


@dataclass(frozen=True, eq=False)
class Head:
    """A head to look at: its file, and what is expected of it."""

    spec: HeadSpec
    path: Path
    schema: pa.Schema

    @property
    def key(self) -> HeadKey:
        return HeadKey(self.spec.layer, self.spec.head, self.spec.kind)

    @property
    def name(self) -> str:
        return head_name(self.spec.layer, self.spec.head, self.spec.kind)

    def fault(self, check: str, what: str, instance: str = "", rows: int = 0) -> Problem:
        """That something is wrong with this head."""
        return Problem(check, what, f"{self.name}: {instance}" if instance else "", head=self.key, rows=rows)


@dataclass
class Found:
    """What there is in a head's file.

    `readable`: it has the columns of the contract, so that its rows can be looked at. `keys_crc`: equal for heads with
    the same rows.
    """

    faults: list[Problem] = field(default_factory=list)
    readable: bool = True
    rows_by_bucket: Counter[int] = field(default_factory=Counter)
    nonfinite: int = 0
    keys_crc: int = 0


def check_file(head: Head, rows: int) -> Found:
    """Schema, metadata, number of rows and vectors of a head's file."""
    found = Found()
    try:
        with pq.ParquetFile(head.path) as file:
            found.faults += _schema_faults(head, file.schema_arrow)
            found.readable = not found.faults
            found.faults += _metadata_faults(head, file.schema_arrow)
            if file.metadata.num_rows != rows:
                there = f"{file.metadata.num_rows:,} instead of {rows:,}"
                found.faults.append(head.fault("parquet", "has another number of rows than manifest.json lists", there))
            if found.readable:
                found.nonfinite, nulls = _count_odd(file, head.spec.head_dim)
                if nulls:
                    found.faults.append(head.fault("vector", "vectors have numbers that are null", rows=nulls))
    except (pa.ArrowException, OSError) as error:
        found.faults.append(_unreadable(head, error))
        found.readable = False
    return found


def check_rows(heads: Sequence[Head], sampler: Sampler, examples: Examples) -> list[Found]:
    """Goes through the rows of `heads`, which are of one (layer, kind) and whose files `check_file` found readable."""
    layer, kind = heads[0].spec.layer, heads[0].spec.kind
    with ExitStack() as stack:
        streams = [_Stream(head, stack.enter_context(pq.ParquetFile(head.path)), sampler, examples) for head in heads]
        for block in examples.blocks():
            ids, lengths = examples.example_id[block].tolist(), examples.num_tokens[block].tolist()
            picks = sampler.plan(ids, lengths, [(layer, kind)])[layer, kind]
            expected = _keys(picks.row + np.int64(block.start), picks.position)
            for stream in streams:
                stream.compare(expected, block.stop)
        return [stream.finish() for stream in streams]


def values(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of a column of numbers or booleans; where it is null, any.

    Not by pyarrow's `to_numpy`, which imports pandas: that takes as long as a small dataset does.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_boolean(array.type):
        return values(array.cast(pa.uint8())).astype(bool)
    without_nulls = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    return np.from_dlpack(without_nulls)


class _Stream:
    """The rows of one head on their way past the checks, from the first to the last."""

    def __init__(self, head: Head, file: pq.ParquetFile, sampler: Sampler, examples: Examples) -> None:
        self._head, self._sampler, self._examples = head, sampler, examples
        self._batches = batches(file, BATCH_ROWS, _COLUMNS)
        self._found = Found()
        self._wrong: dict[tuple[str, str], tuple[int, str]] = {}  # rows and first instance by check and what
        self._row = 0
        self._last = np.int64(-1)
        self._pending = np.empty(0, np.int64)
        self._sorted = self._whole = True

    def compare(self, expected: Int64, stop: int) -> None:
        """Holds the rows of the examples up to place `stop` against the keys that they must have."""
        there = self._before(stop)
        if self._sorted and self._whole and not np.array_equal(there, expected):
            distinct = np.unique(there)
            for what, keys in (
                ("rows that the sampler chooses are missing", np.setdiff1d(expected, distinct, assume_unique=True)),
                ("there are rows that the sampler does not choose", np.setdiff1d(distinct, expected, True)),
            ):
                if len(keys):
                    self._add("sampler", what, len(keys), self._place(keys[0]))

    def finish(self) -> Found:
        """Reads what is left, and returns what was found."""
        while self._read() is not None:
            pass
        for (check, what), (rows, instance) in self._wrong.items():
            # Which rows are missing is only told of rows in order, and before that shows some may have been taken so.
            if check != "sampler" or (self._sorted and self._whole):
                self._found.faults.append(self._head.fault(check, what, instance, rows))
        return self._found

    def _before(self, stop: int) -> Int64:
        """The keys of the rows that come next and are of examples before place `stop`."""
        end = np.int64(stop) << _POSITION_BITS
        parts = [self._pending]
        while not (len(parts[-1]) and parts[-1][-1] >= end) and (keys := self._read()) is not None:
            parts.append(keys)
        keys = np.concatenate(parts)
        cut = int(np.searchsorted(keys, end)) if self._sorted else len(keys)
        self._pending = keys[cut:]
        return keys[:cut]

    def _read(self) -> Int64 | None:
        """Checks the next rows and returns the keys of those whose position there is in their example; else None."""
        try:
            batch = next(self._batches, None)
        except (pa.ArrowException, OSError) as error:
            self._found.faults.append(_unreadable(self._head, error))
            self._whole = False
            batch = None
        if batch is None:
            return None
        bucket, example_id, position = (values(batch.column(name)) for name in _COLUMNS[:3])
        place = self._examples.places(example_id)
        known = place >= 0
        inside = (position >= 0) & (position < self._examples.num_tokens[place])

        def instance(row: int) -> str:
            return f"row {self._row + row}, example {example_id[row]}, position {position[row]}"

        def tokens(row: int) -> str:
            return f"{instance(row)} of {self._examples.num_tokens[place[row]]} tokens"

        self._check("example_id", "rows are of examples that examples/data.parquet does not have", ~known, instance)
        self._check("position", "positions are outside of their example", known & ~inside, tokens)
        self._check_buckets(bucket, position, instance)
        self._check_windows(batch.column("sliding_window"), instance)
        rows = np.flatnonzero(known & inside)
        keys = _keys(place[rows], position[rows])
        steps = np.diff(keys, prepend=self._last)
        self._check("order", "rows are not sorted by example and position", steps < 0, lambda at: instance(rows[at]))
        self._check(
            "unique", "rows of one example and position are there twice", steps == 0, lambda at: instance(rows[at])
        )
        self._sorted = self._sorted and not (steps < 0).any()
        if len(keys):
            self._last = keys[-1]
        self._row += batch.num_rows
        self._found.keys_crc = zlib.crc32(keys.tobytes(), self._found.keys_crc)
        return keys

    def _check_buckets(self, bucket: Int32, position: Int32, instance: Callable[[int], str]) -> None:
        expected = self._sampler.bucket(self._head.spec.kind, np.maximum(position, 0))
        self._check(
            "bucket",
            "buckets are not those of the positions",
            (bucket != expected) & (position >= 0),
            lambda row: f"{instance(row)}: bucket {bucket[row]} instead of {expected[row]}",
        )
        for value, rows in zip(*np.unique(bucket, return_counts=True), strict=True):
            self._found.rows_by_bucket[int(value)] += int(rows)

    def _check_windows(self, column: pa.Array, instance: Callable[[int], str]) -> None:
        window = self._head.spec.sliding_window
        is_null = values(column.is_null())
        windows = values(column)
        self._check(
            "sliding_window",
            "sliding_window is not that of the layer",
            ~is_null if window is None else is_null | (windows != window),
            lambda row: f"{instance(row)}: {'null' if is_null[row] else windows[row]} instead of {window or 'null'}",
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
    """The columns of a file, at most so many rows at a time, with no more than a row group in memory."""
    # Asked for the whole file, pyarrow keeps what it has read of each group until the last.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _keys(place: Int64, position: Int32) -> Int64:
    """One number for each row, in the order in which the rows must be."""
    return (place << _POSITION_BITS) | position


def _schema_faults(head: Head, there: pa.Schema) -> Iterator[Problem]:
    if there.names != head.schema.names:
        columns = f"{', '.join(there.names)} instead of {', '.join(head.schema.names)}"
        yield head.fault("schema", "columns are not those of the contract", columns)
    elif different := [
        f"{mine.name} is {_type(mine)} instead of {_type(expected)}"
        for mine, expected in zip(there, head.schema, strict=True)
        if not mine.equals(expected)
    ]:
        yield head.fault("schema", "columns are not of the types of the contract", ", ".join(different))


def _metadata_faults(head: Head, there: pa.Schema) -> Iterator[Problem]:
    metadata = {key.decode(): value.decode() for key, value in (there.metadata or {}).items()}
    if wrong := [
        f"{key} is {metadata.get(key, 'missing')} instead of {value}"
        for key, value in head.spec.metadata.items()
        if metadata.get(key) != value
    ]:
        yield head.fault("metadata", "the file's own metadata is not what manifest.json says", ", ".join(wrong))


def _type(column: pa.Field) -> str:
    return f"{column.type}{'' if column.nullable else ' without nulls'}"


def _count_odd(file: pq.ParquetFile, head_dim: int) -> tuple[int, int]:
    """How many vectors have a NaN or an Inf, and how many numbers are null."""
    odd = nulls = 0
    batch_rows = max(1, BATCH_BYTES // (4 * head_dim))
    for batch in batches(file, batch_rows, ["vector"]):
        numbers = batch.column("vector").flatten()
        nulls += numbers.null_count
        finite = np.isfinite(values(numbers)).reshape(-1, head_dim).all(axis=1)
        odd += int((~finite).sum())
    return odd, nulls


def _unreadable(head: Head, error: Exception) -> Problem:
    return head.fault("parquet", "cannot be read as Parquet", str(error).partition("\n")[0])
