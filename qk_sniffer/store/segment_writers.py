"""Writes the segments of a journal from several threads, and publishes them in order.

The forward pass queues filled slots and the ends of groups of batches. A thread takes the items of a segment, writes
the file under a temporary name and syncs it, while others write or sync theirs. A segment gets its name once all
earlier ones have theirs. After a kill at any moment, the journal is therefore whole up to some segment.

A thread ends when there is nothing to write. A writer that is never closed, because an exception came before, keeps
no thread and no memory.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.machine import trim_memory
from qk_sniffer.store.buffer import Buffer, Region
from qk_sniffer.store.disk import explained
from qk_sniffer.store.finished_batches import MOST_METADATA, FinishedBatch, GroupEnd
from qk_sniffer.store.journal import AttentionFacts, Batching, ExampleRecord, Journal
from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.rows import Slot, block_tensors
from qk_sniffer.store.segment import Tensor, whole_segment
from qk_sniffer.text import in_mb
from qk_sniffer.timing import Clock

NUM_THREADS = 4
"""The most segments that are written at a time. Each takes a core while it is joined and copied, and none while it is
synced. The buffer holds four of the default size."""


class SegmentWriters:
    """Continues a journal from background threads. The methods are for one other thread.

    Attributes:
        done: of each batch that is durable, its number, examples and checks. Their facts in JSON are not kept.
        durable_examples, bytes_written: counts of this journal and of these threads, so far.
        write_s, transfer_s: seconds in which any thread was writing, and in which any waited for a copy from a device.
        wait_s: seconds that `wait_for_memory` waited.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        queue_bytes: int,
        segment_bytes: int,
        flush_s: float,
        pinned: bool,
        batching: Batching | None,
        access: Access,
        threads: int,
    ) -> None:
        """See `JournalWriter`."""
        self._journal = journal
        self._batching = batching
        self._access = access
        self._segment_bytes = segment_bytes
        self._flush_s = flush_s
        self._num_threads = threads
        # Python code of a condition's `__enter__` can be interrupted while it has the lock, that of a lock cannot.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        try:
            self._buffer = Buffer(queue_bytes, pinned=pinned)
        except (MemoryError, RuntimeError) as error:  # the latter is torch's
            raise StoreError(
                f"there is no memory for the {queue_bytes >> 20:,} MB between forward pass and disk: lower "
                "inference.queue_mb"
            ) from error
        self._queue: deque[Slot | GroupEnd] = deque()
        self._ends: deque[GroupEnd] = deque()  # those in the queue
        self._queued_bytes = 0
        self._ended_bytes = 0  # of the facts of the batches in the queue
        self._since: dict[int, int] = {}  # the segment that each open batch starts in
        self._next = self._turn = journal.next_segment  # the segment to take next, and the one to publish next
        self._threads: list[_Thread] = []
        self._is_watched = False  # a thread waits until the queue is due
        self._memory_wanted = False
        self._closing = False
        self._is_failing = False  # a segment failed: no other is taken
        self._error: BaseException | None = None  # of the first segment that failed
        self._writing, self._copying = Clock(), Clock()
        self.done: list[tuple[int, Sequence[ExampleRecord], Sequence[AttentionFacts]]] = []
        self.durable_examples = len(journal.records)
        self.bytes_written = 0
        self.wait_s = 0.0

    @property
    def write_s(self) -> float:
        return self._writing.seconds

    @property
    def transfer_s(self) -> float:
        return self._copying.seconds

    def check(self) -> None:
        """Checks that no segment failed.

        Raises:
            StoreError: one did. The cause is the error of the first of them.
        """
        if self._error is not None:
            if isinstance(self._error, QkSnifferError):
                raise StoreError(str(self._error)) from self._error
            raise StoreError(f"the journal's writer failed: {self._error!r}") from self._error

    def wait_for_memory(self, nbytes: int) -> None:
        """See `JournalWriter.wait_for_memory`."""
        with self._lock:
            start = time.monotonic()
            self._check_open()
            while not self._buffer.fits(nbytes):
                if not self._queue and self._next == self._turn:  # nothing will give memory back
                    raise StoreError(
                        f"{in_mb(self._buffer.taken)} of the memory between forward pass and disk are lost, as an "
                        "exception interrupted the capture there: start it again"
                    )
                self._memory_wanted = True
                self._wake()
                self._changed.wait()
                self._check_open()
            self.wait_s += time.monotonic() - start

    def take_memory(self, nbytes: int) -> Region:
        """Takes `nbytes` of the buffer, and waits for them.

        Raises:
            StoreError: as of `wait_for_memory`.
        """
        with self._lock:
            self.wait_for_memory(nbytes)
            region = self._buffer.take(nbytes)
        assert region is not None, "only this thread takes memory"
        return region

    def drop(self, slot: Slot) -> None:
        """Gives the memory of a slot back, unless it is committed."""
        with self._lock:
            if not slot.committed:
                self._give_back(slot)

    def put(self, item: Slot | GroupEnd) -> None:
        """Queues a filled slot, which is committed from then on, or the end of a group.

        Raises:
            StoreError: a segment failed.
        """
        with self._lock:
            self._check_open()
            self._queued_bytes += item.nbytes
            if isinstance(item, Slot):
                item.committed = True  # first: memory that an interrupt loses is better than memory given back twice
                self._queue.append(item)
            else:
                self._queue.append(item)
                self._ends.append(item)
                self._ended_bytes += item.metadata_bytes
            self._wake()

    def close(self) -> None:
        """Drops the rows after the last end of a group, and waits until all others are durable, or a segment failed."""
        try:
            with self._lock:
                while self._queue and isinstance(slot := self._queue[-1], Slot):
                    self._queue.pop()
                    self._give_back(slot)
        finally:  # the threads write the rest also if an exception from outside interrupts this
            self._closing = True
            with self._lock:
                self._wake()
        with self._lock:
            while self._queue or self._next != self._turn:
                self._wake()
                self._changed.wait()
            threads = [thread for thread in self._threads if thread.is_alive()]
        for thread in threads:
            thread.join()

    def _check_open(self) -> None:
        self.check()
        if self._closing:
            raise ValueError("the journal's writer is closed")

    def _give_back(self, slot: Slot) -> None:
        with suppress(Exception):
            slot.wait()  # until then the copy still writes to the memory
        self._buffer.give_back(slot.region)

    def _wake(self) -> None:
        """Lets a thread take what is due, or wait until it is; starts one if none waits and not all are busy."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        busy = sum(not thread.is_leaving for thread in self._threads)
        if self._is_failing:
            return
        if self._is_watched and self._is_due():
            self._changed.notify_all()
        elif busy < self._num_threads if self._is_due() else self._ends and not busy:
            thread = _Thread(target=self._run, name="journal", daemon=True)
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:  # the system gives no more threads
                if not busy:
                    raise

    def _run(self) -> None:
        segment = None
        try:
            while (segment := self._take()) is not None:
                self._write(segment)
                trim_memory()  # once a segment costs nothing
        except BaseException as error:
            self._fail(segment, error)

    def _take(self) -> "_Segment | None":
        """Waits for the items of a segment; returns none once there is nothing to wait for."""
        thread = threading.current_thread()
        assert isinstance(thread, _Thread)
        with self._lock:
            while self._is_failing or not self._is_due():
                if self._is_failing or self._closing or self._is_watched or not self._ends:
                    thread.is_leaving = True
                    return None
                self._is_watched = True
                self._changed.wait(max(0.0, self._ends[0].at + self._flush_s - time.monotonic()))
                self._is_watched = False
            segment = self._started(self._items())
            self._next += 1
            self._wake()  # the rest may be due too
            return segment

    def _is_due(self) -> bool:
        if not self._queue:
            return False
        if self._closing or self._queued_bytes >= self._segment_bytes or self._ended_bytes >= MOST_METADATA:
            return True
        if self._memory_wanted and self._next == self._turn:  # else, a segment on its way gives memory back soon
            return True
        return bool(self._ends) and time.monotonic() >= self._ends[0].at + self._flush_s

    def _items(self) -> list[Slot | GroupEnd]:
        """Takes the items of a segment off the queue."""
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
        # Counted anew: an interrupt may have kept `put` from one of its steps.
        self._queued_bytes = sum(item.nbytes for item in self._queue)
        self._ended_bytes = sum(end.metadata_bytes for end in self._ends)
        return items

    def _started(self, items: Sequence[Slot | GroupEnd]) -> "_Segment":
        """Returns the next segment, and notes the batches that start in it."""
        segment = _Segment(self._next, items, {})
        for slot in segment.slots:
            for batch in slot.batches:
                self._since.setdefault(batch, segment.number)
        for ended in segment.ended:
            segment.since[ended.number] = self._since.pop(ended.number, segment.number)
        return segment

    def _write(self, segment: "_Segment") -> None:
        """Writes a segment, and publishes it when its turn comes."""
        journal = self._journal
        with self._copying:
            for slot in segment.slots:
                slot.wait()
        with self._writing:
            metadata = segment.metadata(self._batching, journal.job_id)
            with (
                explained(journal.folder, "write the journal"),
                whole_segment(journal.folder, segment.number, segment.tensors(), metadata, self._access) as (
                    path,
                    size,
                    publish,
                ),
            ):
                with self._writing.paused(), self._lock:
                    while self._turn < segment.number:
                        self._changed.wait()
                    if self._error is not None:
                        raise _EarlierError
                publish()
                with self._lock:
                    journal.segments.append(path)
                    journal.next_segment = segment.number + 1
                    self.bytes_written += size
                    self.durable_examples += sum(len(batch.records) for batch in segment.ended)
                    self.done += [(batch.number, batch.records, batch.checks) for batch in segment.ended]
                    for slot in segment.slots:
                        self._buffer.give_back(slot.region)
                    self._memory_wanted = False  # who waits for it looks again
                    self._turn += 1
                    self._changed.notify_all()

    def _fail(self, segment: "_Segment | None", error: BaseException) -> None:
        """Notes the error of a segment when its turn comes, so that the first one counts."""
        with self._lock:
            self._is_failing = True
            while segment is not None and self._turn < segment.number:
                self._changed.wait()
            if self._error is None:
                self._error = error
                for item in self._queue:
                    if isinstance(item, Slot):
                        with suppress(Exception):
                            item.wait()
                self._queue.clear()
                self._ends.clear()
            if segment is not None and self._turn == segment.number:
                self._turn += 1
            self._changed.notify_all()


class _EarlierError(Exception):
    """An earlier segment failed: this one is not published."""


class _Thread(threading.Thread):
    is_leaving = False
    """Whether it takes no other segment."""


@dataclass(frozen=True)
class _Segment:
    """The items of a segment. `since` has the segment that each of its finished batches starts in."""

    number: int
    items: Sequence[Slot | GroupEnd]
    since: dict[int, int]

    @cached_property
    def slots(self) -> list[Slot]:
        return [item for item in self.items if isinstance(item, Slot)]

    @cached_property
    def ended(self) -> list[FinishedBatch]:
        return [batch for item in self.items if isinstance(item, GroupEnd) for batch in item.batches]

    def tensors(self) -> list[Tensor]:
        groups: dict[tuple[int, str], list[Slot]] = {}
        for slot in self.slots:
            groups.setdefault((slot.layer, slot.kind), []).append(slot)
        tensors = [tensor for item in self.items if isinstance(item, GroupEnd) for tensor in item.statistics]
        tensors += [tensor for _, group in sorted(groups.items()) for tensor in block_tensors(group)]
        # The small tensors first: a compaction reads them alone before it reads any rows. The sort is stable.
        return sorted(tensors, key=lambda tensor: tensor.name.endswith(".vectors"))

    def metadata(self, batching: Batching | None, job_id: str | None) -> Mapping[str, str]:
        numbers = {number for slot in self.slots for number in slot.batches} | self.since.keys()
        ended = [batch.ended(self.since[batch.number]) for batch in self.ended]
        metadata = {
            "format": "qk-sniffer-journal/1",
            "batches": json.dumps([min(numbers), max(numbers)]),
            "ended": f"[{', '.join(ended)}]",
        }
        if batching is not None:
            metadata["batching"] = json.dumps(batching)
        if job_id is not None:
            metadata["job"] = job_id
        return metadata
