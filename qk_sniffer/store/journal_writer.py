"""Writes the journal of one shard in the background.

The forward pass reserves a slot of the writer's buffer for the rows of a gather, fills it and commits it. It blocks
only when the buffer is full. Threads write committed slots to segments (`segment_writers.py`), and then give their
memory back.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from qk_sniffer.errors import StoreError
from qk_sniffer.store.finished_batches import MOST_METADATA, FinishedBatch, GroupEnd
from qk_sniffer.store.journal import AttentionFacts, Batching, ExampleRecord, Journal
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.rows import BATCH, Event, Form, Rows, Slot, index_of, keys_of
from qk_sniffer.store.segment import Tensor
from qk_sniffer.store.segment_writers import NUM_THREADS, SegmentWriters
from qk_sniffer.text import in_mb

FLUSH_S = 30.0
"""The longest time that a finished batch waits for its segment to fill, in seconds."""


class JournalWriter:
    """Continues a journal in the background; a context manager. For use from one thread.

    Left by an exception, it still makes the finished batches durable, and drops the unfinished one.

    Attributes:
        piece_bytes: the size up to which several rows fit in the buffer at a time. Cut larger ones into parts.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        queue_bytes: int,
        segment_bytes: int,
        flush_s: float = FLUSH_S,
        pinned: bool = False,
        batching: Batching | None = None,
        by_example: bool = False,
        access: Access = PLAIN,
        threads: int = NUM_THREADS,
    ) -> None:
        """Removes files without use from the journal's folder. Hold the shard's lock.

        Args:
            journal: the journal to continue.
            access: the way to the journal's folder: the claim of its job.
            queue_bytes: the size of the buffer, which holds the rows that are not durable yet.
            segment_bytes: the approximate size of a segment.
            flush_s: the longest time that a finished batch waits for its segment to fill, in seconds.
            pinned: whether the buffer is page-locked, so that a CUDA device copies to it while it computes.
            batching: the batch settings of the job, which every segment names.
            by_example: whether each example is a batch of its own, so that examples are complete in any order. The rows
                of one that is never complete are dropped.
            threads: the most segments that are written at a time.
        """
        journal.prepare(access)
        self._journal = journal
        self._batching = batching
        self._segments = SegmentWriters(
            journal,
            queue_bytes=queue_bytes,
            segment_bytes=segment_bytes,
            flush_s=flush_s,
            pinned=pinned,
            batching=batching,
            access=access,
            threads=threads,
        )
        self.piece_bytes = queue_bytes // 4
        self._batch = journal.next_batch
        self._of_example: dict[int, int] | None = {} if by_example else None  # its open batch, by key
        self._batch_keys: set[int] = set()  # of the examples with rows in the open batch
        self._checks: list[AttentionFacts] = []
        self._group: list[FinishedBatch] = []  # the finished batches of the open group
        self._group_bytes = 0  # of their facts
        self._seen = set(journal.records)
        self._forms: dict[tuple[int, str], Form] = {}

    @property
    def durable_examples(self) -> int:
        """The durable examples of the journal, so far."""
        return self._segments.durable_examples

    @property
    def bytes_written(self) -> int:
        """The bytes of the segments of this writer, so far."""
        return self._segments.bytes_written

    @property
    def write_s(self) -> float:
        """Seconds in which any segment was joined, written or synced."""
        return self._segments.write_s

    @property
    def transfer_s(self) -> float:
        """Seconds in which any segment waited for copies from a device."""
        return self._segments.transfer_s

    @property
    def wait_s(self) -> float:
        """Seconds that `reserve` waited for memory."""
        return self._segments.wait_s

    def wait_for_memory(self, nbytes: int) -> None:
        """Waits until the buffer has memory for rows of `nbytes`: the next `reserve` of as many does not wait.

        Raises:
            StoreError: a segment failed; or an exception from outside, such as of a signal, has interrupted an earlier
                reservation, whose memory is not known to be free.
        """
        self._segments.wait_for_memory(nbytes)

    @contextmanager
    def reserve(self, rows: Rows) -> Iterator[Slot]:
        """Reserves memory for the vectors of `rows`, which belong to open batches; waits while the buffer is full.

        Rows larger than the whole buffer get memory once no other rows have any. A block that ends before `commit`
        gives the memory back.

        Raises:
            StoreError: a segment failed.
            ValueError: the rows are not as `Rows` says, or not like earlier ones of the same (layer, kind).
        """
        form, runs = rows.form, rows.tokens.runs(self._batch)
        if (earlier := self._forms.setdefault((rows.layer, rows.kind), form)) != form:
            raise ValueError(f"rows of layer {rows.layer} {rows.kind} are {form}, earlier ones {earlier}")
        if self._of_example is not None:
            if again := self._seen.intersection(keys_of(runs).tolist()):
                raise ValueError(f"examples {_indices(again)} are complete already")
            runs[:, BATCH] = [self._open_batch(key) for key in keys_of(runs).tolist()]
        slot = Slot.of(rows, runs, self._segments.take_memory(rows.nbytes))
        try:
            yield slot
        finally:
            self._segments.drop(slot)

    def commit(self, slot: Slot, event: Event | None) -> None:
        """Queues a filled slot for the disk. Its segment is written once `event`, the end of the copy, has come.

        Raises:
            StoreError: a segment failed.
        """
        slot.event = event
        if self._of_example is None:
            self._batch_keys |= set(keys_of(slot.runs).tolist())
        self._segments.put(slot)

    def add_checks(self, checks: Sequence[AttentionFacts]) -> None:
        """Adds results of checks of attention kernels to the open batch, with which they become durable."""
        self._checks += checks

    def complete(
        self, records: Sequence[ExampleRecord], *, ends_group: bool = True, statistics: Sequence[Tensor] = ()
    ) -> None:
        """Ends the batch, or those of the examples. `records` are its examples, including those without rows.

        The batches of a group become durable together, with the tensors of the group's `statistics`.

        Raises:
            StoreError: a segment failed.
            ValueError: rows were committed of an example that is not in `records`, or one was complete before.
        """
        keys = {record.key for record in records}
        if strangers := self._batch_keys - keys:
            raise ValueError(f"rows of examples {_indices(strangers)} were committed, but the batch does not name them")
        if again := keys & self._seen:
            raise ValueError(f"examples {_indices(again)} are complete already")
        ended = self._ended(records)
        self._group += ended
        self._group_bytes += sum(batch.metadata_bytes for batch in ended)
        if self._group_bytes > MOST_METADATA:
            raise StoreError(
                f"the ids and segments of {sum(len(batch.records) for batch in self._group):,} examples in a batch "
                f"have {in_mb(self._group_bytes)}, more than a journal file lists: lower inference.batch_size, or "
                "number the examples with dataset.id_column=null"
            )
        if ends_group:
            self._segments.put(GroupEnd(tuple(self._group), tuple(statistics), self._group_bytes, time.monotonic()))
            self._group.clear()
            self._group_bytes = 0
        self._checks.clear()
        self._seen |= keys
        self._batch_keys.clear()

    def abandon(self, keys: Iterable[int]) -> None:
        """Drops the rows so far of examples by key, each of which is a batch of its own. It may get other rows then."""
        assert self._of_example is not None
        for key in keys:
            self._of_example.pop(key, None)

    def close(self) -> None:
        """Waits until all batches of finished groups are durable. Drops the rows of the others.

        Raises:
            StoreError: a segment failed, now or before.
        """
        self._segments.close()
        for number, records, checks in self._segments.done:
            self._journal.add(number, records, self._batching, checks)
        self._segments.done.clear()
        self._journal.lost -= self._journal.records.keys()
        self._journal.next_batch = self._batch + 1
        self._segments.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError as failure:
            if error is None:
                raise
            if error.__cause__ is not failure.__cause__:
                error.add_note(str(failure))  # the error that ended the block comes first

    def _ended(self, records: Sequence[ExampleRecord]) -> list[FinishedBatch]:
        if self._of_example is None:
            self._batch += 1
            return [FinishedBatch(self._batch - 1, tuple(records), tuple(self._checks))]
        ended = [FinishedBatch(self._open_batch(record.key), (record,), ()) for record in records]
        for record in records:
            del self._of_example[record.key]
        return ended

    def _open_batch(self, key: int) -> int:
        """Returns the number of the open batch of an example, which is its own."""
        assert self._of_example is not None
        if key not in self._of_example:
            self._of_example[key] = self._batch
            self._batch += 1
        return self._of_example[key]


def _indices(keys: set[int]) -> list[int]:
    return sorted({*map(index_of, keys)})
