"""Writes the rows of the journals to Parquet files: the next version of the dataset, staged whole in a folder.

One task is a few heads of one (layer, kind). Tasks run in threads. A task reads the rows of one row group at a time
from the segments, and only the bytes of its heads, so memory does not grow with the dataset. A thread takes about 50 MB
(measured): a dozen times `ROW_GROUP_BYTES`, most of it in the encoder's buffers. The bytes of every file follow from
its rows alone. They do not depend on segments, batches and restarts.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.config import CaptureConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.compact_examples import (
    added_examples,
    own_special_tokens,
    truncated_tokens,
    write_examples,
)
from qk_sniffer.store.compaction_plan import (
    WAY_OUT,
    Block,
    CompactionPlan,
    Ends,
    Group,
    SegmentFiles,
    find_blocks,
    plan_compaction,
)
from qk_sniffer.store.disk import explained, make_folder, remove, type_of
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.layout import (
    ATTENTION,
    EXAMPLES,
    OFFSET_COLUMNS,
    Head,
    Layout,
    examples_schema,
    head_file,
    schema,
)
from qk_sniffer.store.manifest import FileEntry, Written
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.parquet_writer import ParquetWriter
from qk_sniffer.store.previous import PreviousVersion
from qk_sniffer.store.rows import NO_CHARACTER, token_columns
from qk_sniffer.store.text_segments import TextSegments

ROW_GROUP_BYTES = 4 << 20
"""The bytes of the float32 vectors in a row group: 8,192 rows of 128 numbers. Larger groups compress no better. They
cost memory in every thread, and time in a reader that wants a few examples of a large file."""

HEADS_PER_TASK = 4
"""The heads that share the columns next to the vector. A thread writes their files at the same time, and each open file
has an encoder's buffers."""


class Buckets(Protocol):
    """The part of the sampler that a compaction needs. Several threads use it."""

    def bucket(self, kind: str, positions: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Returns the bucket of every position."""
        ...


TokenStrings = Callable[[npt.NDArray[np.int32]], Sequence[str]]
"""Returns the n strings of (n,) token ids."""


def compact(
    layout: Layout,
    journals: Sequence[Journal],
    heads: Sequence[Head],
    sampler: Buckets,
    *,
    capture: CaptureConfig | None = None,
    has_segments: bool = False,
    token_string: TokenStrings | None = None,
    attention: AttentionTable | None = None,
    previous: PreviousVersion | None = None,
    split: bool = False,
    from_python: bool = False,
    threads: int = 1,
    row_group_bytes: int = ROW_GROUP_BYTES,
    on_file: Callable[[str], None] | None = None,
    access: Access = PLAIN,
) -> Written:
    """Stages the files of `heads` and the file of the examples in `journals`. `promote` puts them in place.

    Hold the finalize lock from here to the end of `promote`. Heads without rows get a file without rows. `capture` says
    which columns they have; None for the defaults. `token_string` is needed for the strings of tokens. `has_segments`:
    whether the list of examples has their segments, which a column of segments needs. `attention` is the table of the
    attention summaries, whose files are among `heads` with the kind `ATTENTION`. The rows of `previous`, a finished
    dataset with the same heads, come before those of the journals. With `split`, examples are parts of texts, and their
    list says which. `from_python`, for a capture from Python: the list has the first position of each, and rows after
    the end of an example are left out: those of a forward pass that failed. `on_file` is called, from several threads,
    with the name of every file that is written. `access` is the way to the files: the claim of the journals' job.

    Raises:
        StoreError: the journals are damaged, contradict each other or lack what a column needs; the disk is full; or a
            whole version is staged already (`finish_promotion`).
    """
    if type_of(layout.staging.manifest, access) is not None:
        raise StoreError(f"{layout.root} has a staged version that is not promoted yet; finish that first")
    old = [] if previous is None else previous.examples()
    records = added_examples(journals, old)
    for journal in journals:
        journal.verify()
    with explained(layout.journal_folder, "read"):
        blocks = find_blocks(journals)
    key = np.fromiter((record.key for record in records), np.int64, len(records))
    ends = Ends(key, np.array([record.num_tokens for record in records], np.int64)) if from_python else None
    job = _Job(
        layout.staging,
        blocks,
        key,
        np.fromiter((record.example_id for record in records), np.int32, len(records)),
        sampler,
        capture or CaptureConfig(),
        _segments(records) if capture is not None and capture.capture_segments else None,
        token_string,
        attention,
        previous,
        row_group_bytes,
        ends,
        access,
    )
    added, records = records, old + records
    with explained(layout.staging.root, "write"):
        remove(layout.staging.root, access)
        make_folder(layout.staging.root, access)
        listed = examples_schema(split=split, segments=has_segments, from_python=from_python)
        files = {EXAMPLES: write_examples(layout.staging, records, access, listed)}
        buckets: dict[str, Counter[int]] = {}
        nonfinite: Counter[str] = Counter()
        for done in _in_threads(job, list(_tasks(heads)), threads, on_file):
            files |= done.entries
            nonfinite += done.nonfinite
            if done.kind != ATTENTION:  # their rows are those of the queries
                buckets.setdefault(done.kind, Counter()).update(done.buckets)
        _check_aligned(heads, files)
        access.check()
    return Written(
        files=dict(sorted(files.items())),
        rows_by_bucket={kind: dict(sorted(counted.items())) for kind, counted in sorted(buckets.items())},
        num_examples=len(records),
        num_texts=sum(record.part == 0 for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_truncated=sum(record.truncated for record in records),
        truncated_tokens=truncated_tokens(previous, added),
        own_special_tokens=own_special_tokens(previous, added),
        segments=_segments(records).num_tokens() if has_segments else None,
        longest_example=max((record.num_tokens for record in records), default=0),
        nonfinite_rows=dict(sorted(nonfinite.items())),
    )


@dataclass(frozen=True)
class _Done:
    """The result of a task: files by name, rows by bucket, and rows with NaN or Inf by the file's name."""

    kind: str
    entries: dict[str, FileEntry]
    buckets: Counter[int]
    nonfinite: Counter[str]


@dataclass(frozen=True, eq=False)
class _Job:
    """The data that the threads share."""

    staging: Layout
    blocks: dict[tuple[int, str], list[Block]]
    key: npt.NDArray[np.int64]  # (num_examples,) ascending
    example_id: npt.NDArray[np.int32]  # (num_examples,)
    sampler: Buckets
    capture: CaptureConfig
    segments: TextSegments | None  # of the new examples
    token_string: TokenStrings | None
    attention: AttentionTable | None
    previous: PreviousVersion | None
    row_group_bytes: int
    ends: Ends | None
    access: Access
    stop: threading.Event = field(default_factory=threading.Event)
    tokenizer: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer may not be thread-safe

    def write_heads(self, heads: Sequence[Head]) -> _Done:
        """Writes the files of heads of one (layer, kind)."""
        kind, head_dim = heads[0].kind, heads[0].head_dim
        counted: Counter[int] = Counter()
        nonfinite: Counter[str] = Counter()
        self.access.check()
        with SegmentFiles(self.access) as segments:
            plan = plan_compaction(self.blocks.get((heads[0].layer, kind), []), segments, self.ends)
            self._check(heads, plan.blocks)
            rows_per_group = max(1, self.row_group_bytes // (4 * head_dim))
            schemas = [self._schema(head) for head in heads]
            with ExitStack() as stack:
                outputs = [
                    stack.enter_context(ParquetWriter(self.staging.root / head.file, described, self.access))
                    for head, described in zip(heads, schemas, strict=True)
                ]
                partial = [
                    self._write_previous(head, described, output, rows_per_group, counted)
                    for head, described, output in zip(heads, schemas, outputs, strict=True)
                ]
                for group in plan.groups(rows_per_group, before=partial[0].num_rows):
                    self._check_going_on()
                    columns = self._columns(kind, plan, group, segments)
                    _count(counted, columns["bucket"], len(heads))
                    for place, (head, output) in enumerate(zip(heads, outputs, strict=True)):
                        vectors = _vectors(head, plan, group, segments)
                        nonfinite[head.file] += self._num_nonfinite(kind, vectors)
                        table = self._table(head, schemas[place], columns, vectors)
                        if partial[place].num_rows:
                            table = pa.concat_tables([partial[place], table]).combine_chunks()
                            partial[place] = table.slice(0, 0)
                        output.write(table)
                for output, table in zip(outputs, partial, strict=True):
                    if table.num_rows:
                        output.write(table)
        entries = {head.file: output.entry for head, output in zip(heads, outputs, strict=True)}
        if self.previous is not None:
            nonfinite.update({name: self.previous.nonfinite_rows(name) for name in entries})
        return _Done(kind, {name: entry for name, entry in entries.items() if entry is not None}, counted, +nonfinite)

    def _write_previous(
        self, head: Head, described: pa.Schema, output: ParquetWriter, rows_per_group: int, counted: Counter[int]
    ) -> pa.Table:
        """Writes the row groups that the previous version fills. Returns the remaining rows, fewer than a group."""
        left = described.empty_table()
        if self.previous is not None:
            for table in self.previous.tables(head.file, described, rows_per_group):
                self._check_going_on()
                _count(counted, table["bucket"].to_numpy(), 1)
                if table.num_rows < rows_per_group:
                    left = table
                else:
                    output.write(table)
        return left

    def _check_going_on(self) -> None:
        if self.stop.is_set():
            raise StoreError("compaction was stopped")

    def _check(self, heads: Sequence[Head], blocks: Sequence[Block]) -> None:
        if not blocks:
            return
        num_heads, _, head_dim = blocks[0].vectors.shape
        for head in heads:
            if head.row >= num_heads or head.head_dim != head_dim:
                raise StoreError(
                    f"the journal has {num_heads} heads of size {head_dim}; it does not contain {head}; {WAY_OUT}"
                )
        missing = {name for name in self._needed(heads[0].kind) for block in blocks if name not in block.places}
        if missing:
            raise StoreError(
                f"the journal was captured without {' and '.join(sorted(missing))}, which the columns of the dataset "
                f"need; {WAY_OUT}"
            )

    def _needed(self, kind: str) -> list[str]:
        """Returns the columns of the journal that the files of a kind need."""
        return [] if kind == ATTENTION else token_columns(self.capture)

    def _num_nonfinite(self, kind: str, vectors: npt.NDArray[np.float32]) -> int:
        """Returns the number of rows with NaN or Inf."""
        return self._attention.num_nonfinite(vectors) if kind == ATTENTION else _num_nonfinite(vectors)

    @property
    def _attention(self) -> AttentionTable:
        assert self.attention is not None, "the dataset has no attention summaries"
        return self.attention

    def _columns(self, kind: str, plan: CompactionPlan, group: Group, segments: SegmentFiles) -> dict[str, Any]:
        """Returns the columns that do not depend on the head, each (num_rows,)."""

        def gather(column: str) -> npt.NDArray[np.int32]:
            values = segments.gather(plan.blocks, group, 1, np.int32, lambda block: block.places[column].offset)
            return values[:, 0]

        at = np.minimum(np.searchsorted(self.key, group.key), len(self.key) - 1)
        if not np.array_equal(self.key[at], group.key):
            raise StoreError(f"the journals contain rows of examples that they do not list; {WAY_OUT}")
        position = gather("position")
        columns: dict[str, Any] = {
            "bucket": self.sampler.bucket("q" if kind == ATTENTION else kind, position).astype(np.int32),
            "example_id": self.example_id[at],
            "position": position,
        }
        if kind == ATTENTION:
            return columns
        if self.segments is not None:
            codes = self.segments.codes(at, position).astype(np.int32)
            columns["segment"] = pa.DictionaryArray.from_arrays(codes, pa.array(self.segments.names, pa.string()))
        tokens = {name: gather(name) for name in self._needed(kind)}
        if self.capture.capture_token_strings:
            columns["token_str"] = self._strings(tokens["token_id"])
        if self.capture.capture_offsets:
            columns |= {name: pa.array(tokens[name], mask=tokens[name] == NO_CHARACTER) for name in OFFSET_COLUMNS}
        if self.capture.capture_token_ids:
            columns["token_id"] = tokens["token_id"]
        return columns

    def _strings(self, token_id: npt.NDArray[np.int32]) -> pa.Array:
        assert self.token_string is not None
        distinct, inverse = np.unique(token_id, return_inverse=True)
        with self.tokenizer:
            strings = list(self.token_string(distinct))
        return pa.array(strings, pa.string()).take(pa.array(inverse.ravel()))

    def _table(
        self, head: Head, described: pa.Schema, columns: dict[str, Any], vectors: npt.NDArray[np.float32]
    ) -> pa.Table:
        if head.kind == ATTENTION:
            found = columns | self._attention.columns(vectors)
            return pa.Table.from_arrays([pa.array(found[name]) for name in described.names], schema=described)
        rows = len(vectors)
        window = np.full(rows, head.sliding_window, np.int32) if head.sliding_window is not None else None
        values = {
            **columns,
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), head.head_dim),
            "sliding_window": pa.nulls(rows, pa.int32()) if window is None else window,
        }
        return pa.Table.from_arrays([pa.array(values[name]) for name in described.names], schema=described)

    def _schema(self, head: Head) -> pa.Schema:
        if head.kind == ATTENTION:
            return self._attention.schema.with_metadata(dict(sorted(head.metadata.items())))
        columns = schema(head.head_dim, self.capture)
        return columns.with_metadata(dict(sorted(head.metadata.items())))


def _segments(records: Sequence[ExampleRecord]) -> TextSegments:
    """Returns the segments of the examples.

    Raises:
        StoreError: one has none.
    """
    texts = []
    for record in records:
        if record.segments is None:
            raise StoreError(f"example {record.index} was captured without segments; {WAY_OUT}")
        texts.append(record.segments)
    return TextSegments.of(texts, [record.num_tokens for record in records])


def _tasks(heads: Sequence[Head]) -> Iterator[list[Head]]:
    ordered = sorted(heads, key=lambda head: (head.layer, head.kind, head.row))
    for _, same in groupby(ordered, key=lambda head: (head.layer, head.kind)):
        group = list(same)
        yield from (group[at : at + HEADS_PER_TASK] for at in range(0, len(group), HEADS_PER_TASK))


def _in_threads(
    job: _Job, tasks: Iterable[list[Head]], threads: int, on_file: Callable[[str], None] | None
) -> Iterator[_Done]:
    """Yields the results in the order of the tasks. The first error stops the other threads at their next group."""

    def run(heads: list[Head]) -> _Done:
        done = job.write_heads(heads)
        if on_file is not None:
            for name in done.entries:
                on_file(name)
        return done

    with ThreadPoolExecutor(threads, thread_name_prefix="compact") as pool:
        try:
            yield from pool.map(run, tasks)
        except BaseException:
            job.stop.set()
            raise


def _count(counted: Counter[int], buckets: npt.NDArray[np.int32], num_heads: int) -> None:
    for bucket, rows in zip(*np.unique(buckets, return_counts=True), strict=True):
        counted[int(bucket)] += int(rows) * num_heads


def _num_nonfinite(vectors: npt.NDArray[np.float32]) -> int:
    """Returns the number of rows with NaN or Inf."""
    with np.errstate(all="ignore"):
        if np.isfinite(vectors.sum()):  # a third of the cost of testing every number; it may also overflow
            return 0
    return int((~np.isfinite(vectors).all(axis=1)).sum())


def _vectors(head: Head, plan: CompactionPlan, group: Group, segments: SegmentFiles) -> npt.NDArray[np.float32]:
    """Returns the group's vectors (num_rows, head_dim) of one head, widened to float32."""
    dtype = plan.blocks[0].vectors.dtype
    raw = segments.gather(
        plan.blocks,
        group,
        head.head_dim,
        {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}[dtype],
        lambda block: block.vectors.offset + head.row * block.head_bytes,
    )
    if dtype == "BF16":  # the upper half of a float32
        raw = raw.astype(np.uint32)
        raw <<= 16  # in place: faster than both at once
    widened: npt.NDArray[np.float32] = raw.view(np.float16 if dtype == "F16" else np.float32)
    return widened.astype(np.float32, copy=False)


def _check_aligned(heads: Sequence[Head], files: Mapping[str, FileEntry]) -> None:
    """Checks that attention summaries have as many rows as their queries."""
    for head in heads:
        queries = head_file(head.layer, head.head, "q")
        if head.kind == ATTENTION and files[head.file].rows != files[queries].rows:
            raise StoreError(f"the journals have other rows of {head.file} than of {queries}; {WAY_OUT}")
