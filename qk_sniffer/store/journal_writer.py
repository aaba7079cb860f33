"""Writes the journal of one shard from a background thread.

The forward pass reserves a slot of the writer's buffer for the rows of a gather, fills it and commits it. It blocks
only when the buffer is full. The thread writes committed slots to segments, and then gives their memory back.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.machine import trim_memory
from qk_sniffer.store.buffer import Buffer, Region
from qk_sniffer.store.disk import explained
from qk_sniffer.store.finished_batches import FinishedBatch, GroupEnd
from qk_sniffer.store.journal import AttentionFacts, Batching, ExampleRecord, Journal
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.rows import BATCH, Event, Form, Rows, Slot, block_tensors, index_of, keys_of
from qk_sniffer.store.segment import Tensor, write_segment
from qk_sniffer.store.stored import LARGE
from qk_sniffer.text import in_mb

MOST_METADATA = LARGE * 3 // 4
"""The most bytes of the facts of finished batches in the header of a segment."""

FLUSH_S = 30.0
"""The longest time that a finished batch waits for its segment to fill, in seconds."""


class JournalWriter:
    """Continues a journal from a background thread; a context manager. For use from one thread.

    Left by an exception, it still makes the finished batches durable, and drops the unfinished one.

    Attributes:
        durable_examples, bytes_written: counts of this journal and of this writer, so far.
        write_s: seconds that the thread spent on segments; `transfer_s`: the part of it spent on copies from a device.
        wait_s: seconds that `reserve` waited for memory.
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
    ) -> None:
        """Removes files without use from the journal's folder, and starts the thread. Hold the shard's lock.

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
        """
        journal.prepare(access)
        self._journal = journal
        self._batching = batching
        self._access = access
        self._segment_bytes = segment_bytes
        self._flush_s = flush_s
        # Python code of a condition's `__enter__` can be interrupted while it has the lock, that of a lock cannot.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue: deque[Slot | GroupEnd] = deque()
        self._ends: deque[GroupEnd] = deque()  # those in the queue
        try:
            self._buffer = Buffer(queue_bytes, pinned=pinned)
        except (MemoryError, RuntimeError) as error:  # the latter is torch's
            raise StoreError(
                f"there is no memory for the {queue_bytes >> 20:,} MB between forward pass and disk: lower "
                "inference.queue_mb"
            ) from error
        self.piece_bytes = queue_bytes // 4
        self._memory_wanted = False
        self._is_writing = False
        self._closing = False
        self._error: BaseException | None = None
        self._batch = journal.next_batch
        self._of_example: dict[int, int] | None = {} if by_example else None  # its open batch, by key
        self._batch_keys: set[int] = set()  # of the examples with rows in the open batch
        self._checks: list[AttentionFacts] = []
        self._group: list[FinishedBatch] = []  # the finished batches of the open group
        self._group_bytes = 0  # of their facts
        self._seen = set(journal.records)
        self._forms: dict[tuple[int, str], Form] = {}
        self._ended_bytes = 0  # of the facts of finished batches in the queue
        self._since: dict[int, int] = {}  # the thread's: the segment that each open batch starts in
        # Of the batches that are durable: number, examples and checks. Their facts in JSON are not kept.
        self._done: list[tuple[int, Sequence[ExampleRecord], Sequence[AttentionFacts]]] = []
        self.durable_examples = len(journal.records)
        self.bytes_written = 0
        self.write_s = 0.0
        self.transfer_s = 0.0
        self.wait_s = 0.0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def wait_for_memory(self, nbytes: int) -> None:
        """Waits until the buffer has memory for rows of `nbytes`: the next `reserve` of as many does not wait.

        Raises:
            StoreError: the thread failed; or an exception from outside, such as of a signal, has interrupted an earlier
                reservation, whose memory is not known to be free.
        """
        with self._lock:
            start = time.monotonic()
            self._check_open()
            while not self._buffer.fits(nbytes):
                if not self._queue and not self._is_writing:  # nothing will give memory back
                    raise StoreError(
                        f"{in_mb(self._buffer.taken)} of the memory between forward pass and disk are lost, as an "
                        "exception interrupted the capture there: start it again"
                    )
                self._memory_wanted = True
                self._changed.notify_all()
                self._changed.wait()
                self._check_open()
            self.wait_s += time.monotonic() - start

    @contextmanager
    def reserve(self, rows: Rows) -> Iterator[Slot]:
        """Reserves memory for the vectors of `rows`, which belong to open batches; waits while the buffer is full.

        Rows larger than the whole buffer get memory once no other rows have any. A block that ends before `commit`
        gives the memory back.

        Raises:
            StoreError: the thread failed.
            ValueError: the rows are not as `Rows` says, or not like earlier ones of the same (layer, kind).
        """
        form, runs = rows.form, rows.runs(self._batch)
        if (earlier := self._forms.setdefault((rows.layer, rows.kind), form)) != form:
            raise ValueError(f"rows of layer {rows.layer} {rows.kind} are {form}, earlier ones {earlier}")
        if self._of_example is not None:
            if again := self._seen.intersection(keys_of(runs).tolist()):
                raise ValueError(f"examples {_indices(again)} are complete already")
            runs[:, BATCH] = [self._open_batch(key) for key in keys_of(runs).tolist()]
        slot = Slot.of(rows, runs, self._take_memory(rows.nbytes))
        try:
            yield slot
        finally:
            if not slot.committed:
                with self._lock:
                    self._drop(slot)

    def commit(self, slot: Slot, event: Event | None) -> None:
        """Queues a filled slot for the disk. The thread waits for `event`, the end of the copy, before it writes.

        Raises:
            StoreError: the thread failed.
        """
        slot.event = event
        with self._lock:
            self._check_open()
            if self._of_example is None:
                self._batch_keys |= set(keys_of(slot.runs).tolist())
            slot.committed = True  # first: memory that an interrupt loses is better than memory given back twice
            self._queue.append(slot)
            if self._due():
                self._changed.notify_all()

    def add_checks(self, checks: Sequence[AttentionFacts]) -> None:
        """Adds results of checks of attention kernels to the open batch, with which they become durable."""
        self._checks += checks

    def complete(
        self, records: Sequence[ExampleRecord], *, ends_group: bool = True, statistics: Sequence[Tensor] = ()
    ) -> None:
        """Ends the batch, or those of the examples. `records` are its examples, including those without rows.

        The batches of a group become durable together, with the tensors of the group's `statistics`.

        Raises:
            StoreError: the thread failed.
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
            end = GroupEnd(tuple(self._group), tuple(statistics), self._group_bytes, time.monotonic())
            with self._lock:
                self._check_open()
                self._queue.append(end)
                self._ends.append(end)
                self._ended_bytes += end.metadata_bytes
                if self._due() or len(self._ends) == 1:  # of which the thread knows when it is due
                    self._changed.notify_all()
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
            StoreError: the thread failed, now or before.
        """
        try:
            with self._lock:
                while self._queue and isinstance(slot := self._queue[-1], Slot):
                    self._queue.pop()
                    self._drop(slot)
        finally:  # the thread ends also if an exception from outside interrupts this
            self._closing = True
            with self._lock:
                self._changed.notify_all()
        self._thread.join()
        for number, records, checks in self._done:
            self._journal.add(number, records, self._batching, checks)
        self._done.clear()
        self._journal.lost -= self._journal.records.keys()
        self._journal.next_batch = self._batch + 1
        self._check()

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

    def _take_memory(self, nbytes: int) -> Region:
        with self._lock:
            self.wait_for_memory(nbytes)
            region = self._buffer.take(nbytes)
        assert region is not None, "only this thread takes memory"
        return region

    def _drop(self, slot: Slot) -> None:
        with suppress(Exception):
            slot.wait()  # until then the copy still writes to the memory
        self._buffer.give_back(slot.region)

    def _check(self) -> None:
        if self._error is not None:
            if isinstance(self._error, QkSnifferError):
                raise StoreError(str(self._error)) from self._error
            raise StoreError(f"the journal's writer failed: {self._error!r}") from self._error

    def _check_open(self) -> None:
        self._check()
        if self._closing:
            raise ValueError("the journal's writer is closed")

    def _run(self) -> None:
        try:
            while items := self._take():
                start = time.monotonic()
                with explained(self._journal.folder, "write the journal"):
                    written = self._write(items)
                trim_memory()  # once a segment costs nothing
                with self._lock:
                    self.write_s += time.monotonic() - start
                    self.bytes_written += written
                    for item in items:
                        if isinstance(item, GroupEnd):
                            self._done += [(batch.number, batch.records, batch.checks) for batch in item.batches]
                            self.durable_examples += item.num_records
                        else:
                            self._buffer.give_back(item.region)
                    self._is_writing = False
                    self._changed.notify_all()
        except BaseException as error:
            with self._lock:
                self._error = error
                for item in self._queue:
                    if isinstance(item, Slot):
                        with suppress(Exception):
                            item.wait()
                self._queue.clear()
                self._ends.clear()
                self._changed.notify_all()

    def _take(self) -> list[Slot | GroupEnd]:
        """Waits for the items of a segment; returns none once the writer is closed."""
        with self._lock:
            while not (self._closing or self._due()):
                # Never for ever: an interrupt may keep the other thread from its notification.
                due = self._ends[0].at + self._flush_s - time.monotonic() if self._ends else FLUSH_S
                self._changed.wait(max(0.0, due))
            self._memory_wanted = False
            items: list[Slot | GroupEnd] = []
            size = metadata = 0
            while self._queue:
                item = self._queue[0]
                if isinstance(item, GroupEnd):
                    if metadata and metadata + item.metadata_bytes > MOST_METADATA:
                        break
                    metadata += item.metadata_bytes
                elif size >= self._segment_bytes:
                    break
                items.append(self._queue.popleft())
                if isinstance(item, GroupEnd):
                    self._ends.popleft()
                size += item.nbytes
                if isinstance(item, GroupEnd) and item.statistics:
                    break  # a segment has the statistics of one group
            self._ended_bytes -= metadata
            self._is_writing = bool(items)
            return items

    def _due(self) -> bool:
        if not self._queue:
            return False
        if self._memory_wanted or max(self._buffer.taken / self._segment_bytes, self._ended_bytes / MOST_METADATA) >= 1:
            return True
        return bool(self._ends) and time.monotonic() >= self._ends[0].at + self._flush_s

    def _write(self, items: list[Slot | GroupEnd]) -> int:
        """Writes a segment, and returns its bytes."""
        journal, number = self._journal, self._journal.next_segment
        slots: dict[tuple[int, str], list[Slot]] = {}
        statistics: Sequence[Tensor] = ()
        numbers: list[int] = []
        ended = []
        for item in items:
            if isinstance(item, Slot):
                numbers += item.batches
                for started in item.batches:
                    self._since.setdefault(started, number)
                start = time.monotonic()
                item.wait()
                self.transfer_s += time.monotonic() - start
                slots.setdefault((item.layer, item.kind), []).append(item)
                continue
            statistics = item.statistics
            for batch in item.batches:
                numbers.append(batch.number)
                ended.append(batch.ended(self._since.pop(batch.number, number)))
        metadata = {
            "format": "qk-sniffer-journal/1",
            "batches": json.dumps([min(numbers), max(numbers)]),
            "ended": f"[{', '.join(ended)}]",
        }
        if self._batching is not None:
            metadata["batching"] = json.dumps(self._batching)
        if journal.job_id is not None:
            metadata["job"] = journal.job_id
        tensors = [*statistics]
        tensors += [tensor for _, group in sorted(slots.items()) for tensor in block_tensors(group)]
        # The small tensors first: a compaction reads them alone before it reads any rows. The sort is stable.
        tensors.sort(key=lambda tensor: tensor.name.endswith(".vectors"))
        path, size = write_segment(journal.folder, number, tensors, metadata, self._access)
        journal.segments.append(path)
        journal.next_segment += 1
        return size


def _indices(keys: set[int]) -> list[int]:
    return sorted({*map(index_of, keys)})
