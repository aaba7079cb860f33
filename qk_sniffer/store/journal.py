"""The journal of one shard: the rows captured so far, durable batch by batch.

A background thread writes what `JournalWriter.put` hands over into segments (`segment.py`). A segment holds the
rows of each (layer, kind) in it (`rows.py`) and, in its metadata, the batches that end in it with their examples.
Segments become durable in the order of their numbers, so a batch is done once the segment that ends it exists, and
all others since the one it began in. Rows of other batches are there for nobody: a killed job does its last batches
again, under new numbers.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qk_sniffer.errors import StoreError
from qk_sniffer.machine import trim_memory
from qk_sniffer.store.buffer import Buffer
from qk_sniffer.store.disk import explained, make_folder
from qk_sniffer.store.rows import RUN_COLUMNS, Form, Piece, Rows, block_tensors
from qk_sniffer.store.segment import SUFFIX, DamageError, read_header, segment_number, verify_segment, write_segment

__all__ = ["FLUSH_S", "ExampleRecord", "Journal", "JournalWriter", "Rows"]

FLUSH_S = 30.0
"""A finished batch waits no longer than this for its segment to fill."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """An example whose rows are all captured. `text_hash`: of the text before tokenisation, in hex."""

    index: int
    example_id: int
    source_id: str
    num_tokens: int
    truncated: bool
    text_hash: str


class Journal:
    """The journal in `folder`, as far as it is durable. Reading needs no lock; a writer needs the shard's.

    `records`: the examples of the batches that are done, by index; they change when a writer closes.
    `batches`: the numbers of these batches. `segments`: the files in which their rows are.
    `damaged`: names of the segments that cannot be used; the batches that had rows in them are not done.
    `lost`: examples that were done once and are not, as far as the journal still knows.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Reads the journal; `verify` compares every segment with its checksum, at about the disk's speed."""
        self.folder = folder
        self.records: dict[int, ExampleRecord] = {}
        self.batches: set[int] = set()
        self.segments: list[Path] = []
        self.damaged: list[str] = []
        self.lost: set[int] = set()
        self._verified: set[Path] = set()
        self._next_segment = 0
        self._next_batch = 0
        self._unused: list[Path] = []
        self._open(verify)

    def writer(
        self, *, queue_bytes: int, segment_bytes: int, flush_s: float = FLUSH_S, pinned: bool = False
    ) -> "JournalWriter":
        """A writer that goes on where the journal ends; hold the shard's lock. Removes what is of no use.

        Args:
            queue_bytes: the most that waits in memory to become durable; `put` waits beyond it.
            segment_bytes: about how large a segment becomes.
            flush_s: how long a finished batch waits for its segment to fill, in seconds.
            pinned: whether that memory is page-locked, so that a CUDA device copies to it beside its computation.
        """
        with explained(self.folder, "write"):
            make_folder(self.folder)
            for path in (*self._unused, *self.folder.glob("*.tmp")):
                path.unlink(missing_ok=True)
        self._unused.clear()
        self.damaged.clear()
        return JournalWriter(self, queue_bytes, segment_bytes, flush_s, pinned)

    @property
    def is_whole(self) -> bool:
        """Whether nothing that was done is known to be lost, so far as the segments were read."""
        return not self.damaged and not self.lost

    def verify(self) -> None:
        """Compares the segments that were not compared yet with their checksums.

        Raises:
            StoreError: naming those that are damaged, now or when the journal was opened.
        """
        found = self._compare([path for path in self.segments if path not in self._verified])
        self.damaged = sorted({*self.damaged, *(path.name for path in found)})
        if not self.is_whole:
            what = ", ".join(self.damaged) or "segments are missing"
            raise StoreError(
                f"the journal {self.folder} is damaged: {what}. Run the same command again, or that of its shard where "
                "there are several: the examples in it are captured again, the others are kept"
            )

    def _open(self, verify: bool) -> None:
        paths = [path for path in self.folder.glob("*" + SUFFIX) if segment_number(path) is not None]
        found = self._compare(paths) if verify else {}
        ends: dict[int, list[dict[str, Any]]] = {}
        spans: dict[int, tuple[Path, int, int]] = {}
        for path in sorted(paths):
            if path in found:
                continue
            try:
                metadata = read_header(path).metadata
                number, (first, last) = segment_number(path), json.loads(metadata["batches"])
                assert number is not None
                ends[number], spans[number] = json.loads(metadata["ended"]), (path, first, last)
            except DamageError as error:
                found[path] = error
        for path, damage in sorted(found.items()):
            log.warning("journal segment %s is damaged (%s): the examples in it are captured again", path, damage)
        self._settle(ends, set(spans))
        for path, first, last in spans.values():
            used = any(batch in self.batches for batch in range(first, last + 1))
            (self.segments if used else self._unused).append(path)
        self._next_segment = max(spans, default=-1) + 1
        self._next_batch = max((last for _, _, last in spans.values()), default=-1) + 1
        self._unused.extend(found)
        self.damaged = sorted(path.name for path in found)

    def _settle(self, ends: dict[int, list[dict[str, Any]]], present: set[int]) -> None:
        for number, ended in sorted(ends.items()):
            for end in ended:
                if not present.issuperset(range(end["since"], number + 1)):
                    self.lost.update(values[0] for values in end["records"])
                    continue
                self.batches.add(end["batch"])
                self.records.update((values[0], ExampleRecord(*values)) for values in end["records"])
        self.lost -= self.records.keys()
        if self.lost:
            log.warning("journal %s: the rows of %d finished examples are lost", self.folder, len(self.lost))

    def _compare(self, paths: list[Path]) -> dict[Path, DamageError]:
        damaged: dict[Path, DamageError] = {}

        def compare(path: Path) -> None:
            try:
                verify_segment(path)
                self._verified.add(path)
            except DamageError as error:
                damaged[path] = error

        with explained(self.folder, "read"), ThreadPoolExecutor(4) as pool:
            for _ in pool.map(compare, paths):
                pass
        return damaged


class JournalWriter:
    """Fills a journal from a background thread; a context manager. For one thread's use.

    Left by an exception, it still makes the batches durable that were complete, and drops the open one.
    `durable_examples`, `bytes_written`, `write_s` (the thread's time), `transfer_s` (of it, that it waited for copies
    from a device), `wait_s` (that `put` waited): so far.
    `piece_bytes`: of larger rows than that, few wait at a time; better put in parts.
    """

    def __init__(self, journal: Journal, queue_bytes: int, segment_bytes: int, flush_s: float, pinned: bool) -> None:
        self._journal = journal
        self._segment_bytes = segment_bytes
        self._flush_s = flush_s
        self._changed = threading.Condition()
        self._queue: deque[Piece | _End] = deque()
        try:
            self._buffer = Buffer(queue_bytes, pinned=pinned)
        except (MemoryError, RuntimeError) as error:  # the latter is torch's
            raise StoreError(
                f"there is no memory for the {queue_bytes >> 20:,} MB between forward and disk: lower "
                "inference.queue_mb"
            ) from error
        self.piece_bytes = queue_bytes // 4
        self._room_wanted = False
        self._closing = False
        self._error: BaseException | None = None
        self._batch = journal._next_batch
        self._batch_index: set[int] = set()
        self._seen = set(journal.records)
        self._forms: dict[tuple[int, str], Form] = {}
        self._since: dict[int, int] = {}  # the thread's: the segment that each open batch began in
        self._done: list[_End] = []
        self.durable_examples = len(journal.records)
        self.bytes_written = 0
        self.write_s = 0.0
        self.transfer_s = 0.0
        self.wait_s = 0.0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, rows: Rows) -> None:
        """Copies rows of the open batch, from any device; waits while more than `queue_bytes` would not be durable.

        A copy that is still under way is waited for by the thread. Rows larger than all of `queue_bytes` are taken
        once nothing else waits.

        Raises:
            StoreError: the thread failed.
            ValueError: the rows are not as `Rows` says, or not like earlier ones of the same (layer, kind).
        """
        form, runs = rows.form, rows.runs(self._batch)
        if (earlier := self._forms.setdefault((rows.layer, rows.kind), form)) != form:
            raise ValueError(f"rows of layer {rows.layer} {rows.kind} are {form}, earlier ones {earlier}")
        if not rows.num_rows:
            return
        self._batch_index |= set(runs[:, RUN_COLUMNS.index("index")].tolist())
        with self._changed:
            start = time.monotonic()
            self._check_open()
            while (slot := self._buffer.take(rows.nbytes)) is None:
                self._room_wanted = True
                self._changed.notify_all()
                self._changed.wait()
                self._check_open()
            self.wait_s += time.monotonic() - start
        try:
            piece = Piece.copied(rows, self._batch, runs, slot)
        except BaseException:
            with self._changed:
                self._buffer.give_back(slot)
            raise
        with self._changed:
            self._check_open()
            self._queue.append(piece)
            self._changed.notify_all()

    def complete(self, records: Sequence[ExampleRecord]) -> None:
        """Ends the batch: `records` are its examples, those without rows included.

        Raises:
            StoreError: the thread failed.
            ValueError: rows were put of an example that is not in `records`, or one was complete before.
        """
        indices = {record.index for record in records}
        if strangers := self._batch_index - indices:
            raise ValueError(f"rows of examples {sorted(strangers)} were put, but the batch does not name them")
        if again := indices & self._seen:
            raise ValueError(f"examples {sorted(again)} are complete already")
        with self._changed:
            self._check_open()
            self._queue.append(_End(self._batch, tuple(records), time.monotonic()))
            self._changed.notify_all()
        self._seen |= indices
        self._batch += 1
        self._batch_index.clear()

    def close(self) -> None:
        """Waits until all complete batches are durable. Rows of a batch that is still open are dropped.

        Raises:
            StoreError: the thread failed, now or before.
        """
        with self._changed:
            while self._queue and isinstance(piece := self._queue[-1], Piece):
                self._queue.pop()
                with suppress(Exception):
                    piece.wait()
                self._buffer.give_back(piece.slot)
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        for end in self._done:
            self._journal.batches.add(end.batch)
            self._journal.records.update((record.index, record) for record in end.records)
        self._done.clear()
        self._journal.lost -= self._journal.records.keys()
        self._journal._next_batch = self._batch + 1
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
                error.add_note(str(failure))  # what ended the block comes first

    def _check(self) -> None:
        if self._error is not None:
            if isinstance(self._error, StoreError):
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
                    path = self._write(items)
                    written = path.stat().st_size
                trim_memory()  # once a segment costs nothing
                with self._changed:
                    self.write_s += time.monotonic() - start
                    self.bytes_written += written
                    for item in items:
                        if isinstance(item, _End):
                            self._done.append(item)
                            self.durable_examples += len(item.records)
                        else:
                            self._buffer.give_back(item.slot)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                for item in self._queue:
                    if isinstance(item, Piece):
                        with suppress(Exception):
                            item.wait()
                self._queue.clear()
                self._changed.notify_all()

    def _take(self) -> list["Piece | _End"]:
        """Waits for a segment's worth of items; none once the writer is closed."""
        with self._changed:
            while not (self._closing or self._due()):
                end = self._first_end()
                self._changed.wait(None if end is None else max(0.0, end.at + self._flush_s - time.monotonic()))
            self._room_wanted = False
            items: list[Piece | _End] = []
            size = 0
            while self._queue and (size < self._segment_bytes or isinstance(self._queue[0], _End)):
                items.append(self._queue.popleft())
                size += items[-1].nbytes
            return items

    def _due(self) -> bool:
        if not self._queue:
            return False
        if self._room_wanted or self._buffer.taken >= self._segment_bytes:
            return True
        end = self._first_end()
        return end is not None and time.monotonic() >= end.at + self._flush_s

    def _first_end(self) -> "_End | None":
        return next((item for item in self._queue if isinstance(item, _End)), None)

    def _write(self, items: list["Piece | _End"]) -> Path:
        journal, number = self._journal, self._journal._next_segment
        pieces: dict[tuple[int, str], list[Piece]] = {}
        ended = []
        for item in items:
            since = self._since.setdefault(item.batch, number)
            if isinstance(item, Piece):
                start = time.monotonic()
                item.wait()
                self.transfer_s += time.monotonic() - start
                pieces.setdefault((item.layer, item.kind), []).append(item)
            else:
                records = [astuple(record) for record in item.records]
                ended.append({"batch": item.batch, "since": since, "records": records})
                del self._since[item.batch]
        metadata = {
            "format": "qk-sniffer-journal/1",
            "batches": json.dumps([items[0].batch, items[-1].batch]),
            "ended": json.dumps(ended),
        }
        tensors = [tensor for _, group in sorted(pieces.items()) for tensor in block_tensors(group)]
        # The small tensors first: the plan of a compaction reads them alone. The sort is stable.
        tensors.sort(key=lambda tensor: tensor.name.endswith(".vectors"))
        path = write_segment(journal.folder, number, tensors, metadata)
        journal.segments.append(path)
        journal._next_segment += 1
        return path


@dataclass(frozen=True, eq=False)
class _End:
    batch: int
    records: tuple[ExampleRecord, ...]
    at: float
    nbytes = 0
