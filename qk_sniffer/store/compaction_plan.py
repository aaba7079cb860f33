"""Prepares how a compaction reads the journals: the rows of a head, their order, and their places in the segments.

All heads of a (layer, kind) have the same rows, at the same places of their parts of each block, and share one
`CompactionPlan`. It consists of runs (see `rows.py`), a few bytes an example. The rows themselves are read one row
group at a time.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import open_file
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.rows import BATCH, COUNT, FIRST, INDEX, LAST, PART, RUN_COLUMNS, START, keys_of, with_parts
from qk_sniffer.store.segment import ITEM_SIZES, DamageError, Place, read_header
from qk_sniffer.store.segment_facts import blocks_of

WAY_OUT = "capture the dataset again with output.overwrite=true"
"""The way out of journals that are whole and contradict each other."""

MAX_OPEN_FILES = 32
"""The segments that one thread keeps open. Many threads must stay below the usual limit of 1,024 descriptors."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Block:
    """The rows of one (layer, kind) in one segment. `batches` are the finished batches of the journal."""

    path: Path
    places: Mapping[str, Place]
    batches: Int64

    @property
    def vectors(self) -> Place:
        return self.places["vectors"]

    @property
    def head_bytes(self) -> int:
        """The distance from the vectors of one head to those of the next."""
        return self.vectors.shape[1] * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.vectors.shape[2] * ITEM_SIZES[self.vectors.dtype]


@dataclass(frozen=True, eq=False)
class Span:
    """Rows `start` to `stop` of a block, which are read at once to row `at` of the buffer."""

    block: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, eq=False)
class Group:
    """One row group. The spans fill a buffer of `buffer_rows` rows.

    `key` (num_rows,) is the key of each row's example. `order` (num_rows,) is each row's place in the buffer; None if
    the rows are in their order already.
    """

    key: Int64
    spans: Sequence[Span]
    buffer_rows: int
    order: Int64 | None


@dataclass(frozen=True, eq=False)
class CompactionPlan:
    """The rows of one (layer, kind), ordered by (index, part, position).

    `runs` is (num_runs, 7), see `RUN_COLUMNS`. `block` (num_runs,) is the number of each run's block.
    """

    blocks: Sequence[Block]
    runs: Int64
    block: Int64

    @property
    def num_rows(self) -> int:
        return int(self.runs[:, COUNT].sum())

    def groups(self, rows_per_group: int, *, before: int = 0) -> Iterator[Group]:
        """Yields the row groups. Their bounds follow from the rows alone, and may be within an example.

        `before` is the number of other rows at the start of the first group, fewer than `rows_per_group`.
        """
        if not self.num_rows:
            return
        ends = np.cumsum(self.runs[:, COUNT])
        for start in range(-before, self.num_rows, rows_per_group):
            low, high = max(0, start), min(start + rows_per_group, self.num_rows)
            part = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high) + 1)
            runs = self.runs[part]
            head = np.maximum(0, low - (ends[part] - runs[:, COUNT]))
            tail = np.maximum(0, ends[part] - high)
            yield _group(self.block[part], keys_of(runs), runs[:, START] + head, runs[:, COUNT] - head - tail)


def find_blocks(journals: Sequence[Journal]) -> dict[tuple[int, str], list[Block]]:
    """Returns the blocks of all journals by (layer, kind)."""
    found: dict[tuple[int, str], list[Block]] = {}
    for journal in journals:
        batches = np.array(sorted(journal.batches), dtype=np.int64)
        for path in journal.segments:
            try:
                places = blocks_of(read_header(path, journal.access))
            except DamageError as error:
                raise StoreError(f"the journal segment {path} is damaged: {error}; rerun its job") from error
            for key, columns in places.items():
                found.setdefault(key, []).append(Block(path, columns, batches))
    return found


@dataclass(frozen=True, eq=False)
class Ends:
    """Where examples end whose last forward pass failed: it has left rows after their last token."""

    key: Int64
    """(num_examples,): ascending."""
    num_tokens: Int64
    """(num_examples,)"""

    def are_before(self, runs: Int64) -> npt.NDArray[np.bool_]:
        """Returns which of `runs` (num_runs, 7) are of tokens of their example. A pass adds its rows in runs of their
        own."""
        at = np.minimum(np.searchsorted(self.key, keys_of(runs)), len(self.key) - 1)
        kept: npt.NDArray[np.bool_] = runs[:, FIRST] < self.num_tokens[at]
        return kept


def plan_compaction(blocks: Sequence[Block], files: "SegmentFiles", ends: Ends | None = None) -> CompactionPlan:
    """Returns the plan of the blocks of one (layer, kind). Rows after the `ends` of their examples are left out.

    Raises:
        StoreError: the blocks contain a row twice, or differ in dtype or size.
    """
    if len({(block.vectors.dtype, block.vectors.shape[0], block.vectors.shape[2]) for block in blocks}) > 1:
        raise StoreError(
            f"the journals contain vectors of several types or sizes: {blocks[0].path} and others; {WAY_OUT}"
        )
    tables, owners = [np.empty((0, len(RUN_COLUMNS)), np.int64)], [np.empty(0, np.int64)]
    for number, block in enumerate(blocks):
        place = block.places["runs"]
        runs = np.empty(place.shape, np.int64)
        files.read(block.path, place.offset, runs)
        runs = with_parts(runs)
        is_kept = np.isin(runs[:, BATCH], block.batches)
        if ends is not None:
            is_kept &= ends.are_before(runs)
        tables.append(runs[is_kept])
        owners.append(np.full(len(tables[-1]), number))
    runs, owner = np.concatenate(tables), np.concatenate(owners)
    order = np.lexsort((runs[:, FIRST], runs[:, PART], runs[:, INDEX]))
    runs, owner = runs[order], owner[order]
    keys = keys_of(runs)
    overlap = (keys[1:] == keys[:-1]) & (runs[1:, FIRST] <= runs[:-1, LAST])
    if overlap.any():
        at = int(np.flatnonzero(overlap)[0])
        part = f", part {runs[at, PART]}," if runs[at, PART] else ""
        raise StoreError(
            f"example {runs[at, INDEX]}{part} was captured twice: its rows are in {blocks[owner[at]].path} and also in "
            f"{blocks[owner[at + 1]].path}; {WAY_OUT}"
        )
    return CompactionPlan(blocks, runs, owner)


def _group(block: Int64, key: Int64, start: Int64, count: Int64) -> Group:
    """Returns the group of these runs, which are in the order of the dataset.

    Runs that are close together are read at once, where that at most doubles the bytes of a group.
    """
    by_place = np.lexsort((start, block))
    b, s, c = block[by_place], start[by_place], count[by_place]
    gap = s[1:] - (s[:-1] + c[:-1])
    breaks = np.concatenate([[True], (b[1:] != b[:-1]) | (gap > c[1:])])
    heads = np.flatnonzero(breaks)
    tails = np.append(heads[1:], len(b)) - 1
    stops = s[tails] + c[tails]
    at = np.concatenate([[0], np.cumsum(stops - s[heads])])
    spans = [Span(*map(int, values)) for values in zip(b[heads], s[heads], stops, at[:-1], strict=True)]

    of_span = np.cumsum(breaks) - 1
    place = np.empty_like(s)
    place[by_place] = at[of_span] + (s - s[heads][of_span])
    first = np.cumsum(count) - count
    num_rows = int(count.sum())
    order: Int64 | None = np.repeat(place - first, count) + np.arange(num_rows)
    if at[-1] == num_rows and (place == first).all():
        order = None
    return Group(np.repeat(key, count), spans, int(at[-1]), order)


@dataclass
class SegmentFiles:
    """Opens segments for reading, a few at a time. For use from one thread; a context manager."""

    access: Access = PLAIN
    _open: OrderedDict[Path, RawIOBase] = field(default_factory=OrderedDict)

    def read(self, path: Path, offset: int, into: npt.NDArray[Any]) -> None:
        """Fills the array `into` from byte `offset` on. Uses pread, which leaves no mapped pages in memory.

        Raises:
            StoreError: the file is too short.
        """
        buffer = into.data.cast("B")
        while len(buffer):
            count = os.preadv(self._descriptor(path), [buffer], offset)
            if count == 0:
                raise StoreError(f"the journal segment {path} is shorter than it was")
            buffer, offset = buffer[count:], offset + count

    def gather(
        self, blocks: Sequence[Block], group: Group, width: int, dtype: npt.DTypeLike, base: Callable[[Block], int]
    ) -> npt.NDArray[Any]:
        """Returns the group's rows (num_rows, width) of a column. Its first row in a block is at byte `base(block)`."""
        buffer: npt.NDArray[Any] = np.empty((group.buffer_rows, width), dtype)
        for span in group.spans:
            block = blocks[span.block]
            offset = base(block) + span.start * width * buffer.itemsize
            self.read(block.path, offset, buffer[span.at : span.at + span.stop - span.start])
        return buffer if group.order is None else buffer[group.order]

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[path] = open_file(path, self.access).detach()  # without a buffer
        return self._open[path].fileno()

    def __enter__(self) -> "SegmentFiles":
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()
