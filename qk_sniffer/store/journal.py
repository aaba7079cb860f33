"""Reads the journal of one shard: the rows captured so far, durable batch by batch.

`JournalWriter` (`journal_writer.py`) fills a journal with segments (`segment.py`). A segment holds the rows of each
(layer, kind) in it (`rows.py`). Its metadata lists the batches that end in it, with their examples. Segments become
durable in the order of their numbers. A batch is therefore finished when every segment exists from the one that it
starts in to the one that ends it. Rows of unfinished batches are ignored; a restart reruns them under new numbers.

Each segment carries the identity of the job that wrote it. Those of another job are not part of the journal.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.store.disk import Check, explained, make_folder, unchecked
from qk_sniffer.store.segment import SUFFIX, DamageError, Header, read_header, segment_number, verify_segment

log = logger(__name__)

Batching = Mapping[str, int | None]
"""The settings that decide which examples share a batch, by name."""


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """An example whose rows are all captured. `text_hash` is the hash of the text before tokenisation, in hex."""

    index: int
    example_id: int
    source_id: str
    num_tokens: int
    truncated: bool
    text_hash: str


class Journal:
    """The durable part of the journal in `folder`. Reading needs no lock.

    Attributes:
        records: the examples of the finished batches, by index. A writer adds its own when it closes.
        batches: the numbers of the finished batches.
        batching: for each finished batch, the lowest index of its examples and the batch settings of its job. A batch
            that was written without its settings is missing.
        segments: the files that hold rows of these batches.
        damaged: the names of the segments that cannot be used. Batches with rows in them are not finished.
        lost: indices of examples that were finished before and are not any more, as far as the journal shows.
        foreign: the names of the segments of other jobs.
        next_segment, next_batch: the first numbers that no readable segment uses.
    """

    def __init__(self, folder: Path, job_id: str | None = None, *, verify: bool = True) -> None:
        """Reads the journal of the job `job_id`; None: of no job, as for a benchmark.

        `verify` compares every segment with its checksum, at about the speed of the disk.
        """
        self.folder = folder
        self.job_id = job_id
        self.records: dict[int, ExampleRecord] = {}
        self.batches: set[int] = set()
        self.batching: dict[int, tuple[int, Batching]] = {}
        self.segments: list[Path] = []
        self.damaged: list[str] = []
        self.lost: set[int] = set()
        self.foreign: list[str] = []
        self.next_segment = 0
        self.next_batch = 0
        self._verified: set[Path] = set()
        self._unused: list[Path] = []
        self._open(verify)

    @property
    def is_whole(self) -> bool:
        """Whether no finished example is known to be lost, as far as the segments were read."""
        return not self.damaged and not self.lost

    def verify(self) -> None:
        """Compares the segments that were not compared yet with their checksums.

        Raises:
            StoreError: segments are damaged, now or when the journal was opened. The error names them.
        """
        found = self._compare([path for path in self.segments if path not in self._verified])
        self.damaged = sorted({*self.damaged, *(path.name for path in found)})
        if not self.is_whole:
            what = ", ".join(self.damaged) or "segments are missing"
            raise StoreError(
                f"the journal {self.folder} is damaged: {what}. Rerun the command, or that of the journal's shard: it "
                "captures the examples in the damaged segments again and keeps the others"
            )

    def prepare(self, check: Check = unchecked) -> None:
        """Makes the folder ready for a writer: creates it and removes the files without use. Hold the shard's lock."""
        with explained(self.folder, "write"):
            check()
            make_folder(self.folder)
            for path in (*self._unused, *self.folder.glob("*.tmp")):
                check()
                path.unlink(missing_ok=True)
        self._unused.clear()
        self.damaged.clear()
        self.foreign.clear()

    def add(self, batch: int, records: Sequence[ExampleRecord], batching: Batching | None) -> None:
        """Adds a finished batch, which is durable."""
        self.batches.add(batch)
        self.records.update((record.index, record) for record in records)
        if records and batching is not None:
            self.batching[batch] = min(record.index for record in records), batching

    def _open(self, verify: bool) -> None:
        headers, found = self._headers()
        if verify:
            found |= self._compare(list(headers))
        ends: dict[int, list[dict[str, Any]]] = {}
        spans: dict[int, tuple[Path, int, int]] = {}
        batching: dict[int, Batching | None] = {}
        for path, header in headers.items():
            if path in found:
                continue
            try:
                metadata = header.metadata
                number, (first, last) = segment_number(path), json.loads(metadata["batches"])
                assert number is not None
                ends[number], spans[number] = json.loads(metadata["ended"]), (path, first, last)
                batching[number] = json.loads(metadata.get("batching", "null"))
            except DamageError as error:
                found[path] = error
        for path, damage in sorted(found.items()):
            log.warning("journal segment %s is damaged (%s); its examples are captured again", path, damage)
        self._settle(ends, batching)
        for path, first, last in spans.values():
            used = any(batch in self.batches for batch in range(first, last + 1))
            (self.segments if used else self._unused).append(path)
        self.next_segment = max(spans, default=-1) + 1
        self.next_batch = max((last for _, _, last in spans.values()), default=-1) + 1
        self._unused.extend(found)
        self.damaged = sorted(path.name for path in found)

    def _headers(self) -> tuple[dict[Path, Header], dict[Path, DamageError]]:
        """Returns the headers of the segments of this job by path, in order, and the damage of unreadable ones."""
        headers: dict[Path, Header] = {}
        damaged: dict[Path, DamageError] = {}
        for path in sorted(self.folder.glob("*" + SUFFIX)):
            if segment_number(path) is None:
                continue
            try:
                with explained(path, "read"):
                    header = read_header(path)
            except DamageError as error:
                damaged[path] = error
                continue
            if header.metadata.get("job") == self.job_id:
                headers[path] = header
            else:
                self.foreign.append(path.name)
                self._unused.append(path)
        if self.foreign:
            log.warning("journal %s: %d segments of another job are ignored", self.folder, len(self.foreign))
        return headers, damaged

    def _settle(self, ends: dict[int, list[dict[str, Any]]], batching: Mapping[int, Batching | None]) -> None:
        present = set(ends)
        for number, ended in sorted(ends.items()):
            for end in ended:
                if not present.issuperset(range(end["since"], number + 1)):
                    self.lost.update(values[0] for values in end["records"])
                    continue
                self.add(end["batch"], [ExampleRecord(*values) for values in end["records"]], batching[number])
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
