"""Writes the rows of a capture to a folder while it runs, so that memory does not grow with them.

The rows go to a journal like that of a job. An example is durable soon after it is complete; with statistics, which are
of all examples, when the block ends. When the block ends well, the journal becomes a dataset. If it ends by an error,
or its process is killed, the journal stays with the durable examples. Then `python -m qk_sniffer.finalize
data_root=<folder>` makes a dataset of them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qk_sniffer.dataset.reader import Dataset, open_dataset
from qk_sniffer.errors import CaptureError, QkSnifferError
from qk_sniffer.jobs.from_python import discard_capture, finish_capture, registered, unfinished_capture
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.interrupts import Changes
from qk_sniffer.notebook.save import described
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.rows import INDEX, Event, Rows, Slot, example_key
from qk_sniffer.store.statistics import Part, PartKey, part_tensors

WAY_OUT = "Choose another folder (to=...), or remove this one"


class FolderStream:
    """A `PassSink` that writes to the journal of a folder; a context manager around all passes.

    The rows of a failed pass may be on the disk when it fails. The compaction leaves them out.

    Attributes:
        folder: of the dataset, which exists after the block.
        changes: see `PassSink`.
        piece_bytes, wait_s: see `RowSink`.
    """

    def __init__(
        self, facts: CaptureFacts, folder: Path, statistics: Callable[[], Mapping[PartKey, Part]] | None = None
    ) -> None:
        """`statistics` returns, at the end of the block, those of all tokens; None without statistics."""
        self.folder = folder.absolute()  # the block may change the current directory
        self.changes = Changes()
        self._facts = facts
        self._config, self._record = described(facts)
        self._statistics = statistics
        self._manifest: dict[str, Any] | None = None
        self._stack = ExitStack()
        self._of_pass: set[int] = set()  # the examples with rows in the open pass
        self._earlier: set[int] = set()  # the open examples with rows of earlier passes

    def __enter__(self) -> Self:
        """Registers the capture in the folder.

        Raises:
            StoreError: the folder has a dataset, the work of a job or other files; or it cannot be written.
        """
        inference = self._config.inference
        with ExitStack() as stack:
            self._claim: Claim = stack.enter_context(
                registered(self.folder, self._record, overwrite=False, way_out=WAY_OUT)
            )
            self._journal = Journal(self._claim.layout.journal(0, 1), self._claim.job_id, access=self._claim)
            self._writer = JournalWriter(
                self._journal,
                queue_bytes=inference.queue_mb << 20,
                segment_bytes=inference.segment_mb << 20,
                pinned=self._facts.backbone.device.type == "cuda",
                by_example=True,
                access=self._claim,
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Makes the dataset. After an error of the block, leaves the journal with the examples that are complete.

        Raises:
            CaptureError: there is no example.
            StoreError: the disk is full or fails.
        """
        with self._stack:
            try:
                if error is None:
                    self._finish()
                else:
                    with suppress(QkSnifferError):
                        self._end_group()
                    self._writer.__exit__(kind, error, trace)
            except BaseException as failure:
                self._leave(failure)
                raise
            if error is not None:
                self._leave(error)

    def dataset(self) -> Dataset:
        """Opens the dataset of this capture.

        Raises:
            CaptureError: there is none, as the block ended by an error; or the folder has another dataset.
            StoreError: the folder has no dataset, or it cannot be read.
        """
        if self._manifest is None:
            raise CaptureError(
                f"this capture has made no dataset in {self.folder}, as its block ended by an error. Capture again, or "
                f"make one of its whole examples with python -m qk_sniffer.finalize data_root={self.folder}, and read "
                "it with qk_sniffer.open_dataset"
            )
        found = open_dataset(self.folder)
        if found.manifest != self._manifest:
            raise CaptureError(
                f"{self.folder} has another dataset by now, not that of this capture. Read it with "
                "qk_sniffer.open_dataset, or capture again"
            )
        return found

    @property
    def piece_bytes(self) -> int:
        """See `RowSink`."""
        return self._writer.piece_bytes

    @property
    def wait_s(self) -> float:
        """See `RowSink`."""
        return self._writer.wait_s

    @contextmanager
    def reserve(self, rows: Rows) -> Iterator[Slot]:
        """Reserves memory of the journal's writer; see `RowSink.reserve`.

        Raises:
            StoreError: the disk is full or fails.
        """
        self._writer.wait_for_memory(rows.nbytes)
        with self.changes.change(Exception), self._writer.reserve(rows) as slot:
            yield slot

    def commit(self, slot: Slot, event: Event | None) -> None:
        """See `RowSink.commit`."""
        self._of_pass |= set(slot.runs[:, INDEX].tolist())
        self._writer.commit(slot, event)

    def end_pass(self) -> None:
        """See `PassSink.end_pass`."""
        self._earlier |= self._of_pass
        self._of_pass.clear()

    def drop_pass(self, examples: Collection[int]) -> None:
        """See `PassSink.drop_pass`."""
        self._writer.abandon(example_key(number, 0) for number in self._of_pass - self._earlier)
        self._of_pass.clear()

    def complete(self, records: Sequence[ExampleRecord]) -> None:
        """See `PassSink.complete`.

        Raises:
            StoreError: the disk is full or fails.
        """
        self._writer.complete(records, ends_group=self._statistics is None)
        self._earlier.difference_update(record.index for record in records)

    def _finish(self) -> None:
        with self._writer:
            self._end_group()
        if not self._journal.records:
            raise CaptureError(f"nothing was captured to {self.folder}: no forward pass has run in the block")
        self._manifest = finish_capture(self._claim, self._config)

    def _end_group(self) -> None:
        if self._statistics is not None:
            self._writer.complete([], statistics=part_tensors(self._statistics()))

    def _leave(self, error: BaseException) -> None:
        """Leaves the work in the folder if an example is whole, and says so in a note of `error`; removes it else."""
        try:
            if self._journal.records:
                error.add_note(f"{unfinished_capture(self._claim.layout, self._claim.job_id)}.")
            else:
                discard_capture(self._claim)
        except (OSError, QkSnifferError) as failure:
            error.add_note(str(failure))
