"""Reads the journal of one shard: the rows captured so far, durable batch by batch.

`JournalWriter` (`journal_writer.py`) fills a journal with segments (`segment.py`). A segment holds the rows of each
(layer, kind) in it (`rows.py`). Its metadata lists the batches that end in it, with their examples. Segments become
durable in the order of their numbers. A batch is therefore finished when every segment exists from the one that it
starts in to the one that ends it. Rows of unfinished batches are ignored; a restart reruns them under new numbers.

Each segment carries the identity of the job that wrote it. Those of another job are not part of the journal.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.store.disk import explained, make_folder, paths_in, remove
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.rows import example_key
from qk_sniffer.store.segment import DamageError, read_header, segment_number, verify_segment
from qk_sniffer.store.segment_facts import SegmentFacts, blocks_of, check_runs, facts_of

log = logger(__name__)

Batching = Mapping[str, int | None]
"""The settings that decide which examples share a batch, by name."""

AttentionFacts = Mapping[str, Any]
"""The result of a check of an attention kernel, as in the manifest: see `proof_forms.Attention`."""


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """An example whose rows are all captured. `text_hash` is the hash of the text before tokenisation, in hex.

    A truncated example lacks `left_out` tokens at its end; 0 means that the number is not known, as for long texts, and
    in the journals of earlier versions. `begins_special` and `ends_special` say that the text itself has special tokens
    there, which were not added again. `segments` are those of its tokens, as `text_segments.py` encodes them; None
    without segments.

    The parts of a text that is split have the `index`, `source_id` and `text_hash` of the text. `first_token` is the
    number of the text's own tokens before the part. In a journal, all parts have the `example_id` of the text;
    `compact_examples.numbered` gives each its own.
    """

    index: int
    example_id: int
    source_id: str
    num_tokens: int
    truncated: bool
    text_hash: str
    left_out: int = 0
    begins_special: bool = False
    ends_special: bool = False
    segments: str | None = None
    part: int = 0
    first_token: int = 0
    is_last: bool = True
    """Whether no part of the text follows."""
    first_position: int = 0
    """The position from which on its tokens were seen: 0, unless a capture from Python begins in the middle."""

    @property
    def key(self) -> int:
        """Names the example in its source: `example_key` of its index and part."""
        return example_key(self.index, self.part)


values_of = attrgetter(*(field.name for field in fields(ExampleRecord)))
"""Returns the values of a record as a tuple. `dataclasses.astuple` copies each of them, which takes twenty times as
long."""


class Journal:
    """The durable part of the journal in `folder`. Reading needs no lock.

    Attributes:
        records: the examples of the finished batches, by key. A writer adds its own when it closes.
        batches: the numbers of the finished batches.
        batching: for each finished batch, the lowest index of its examples and the batch settings of its job. A batch
            that was written without its settings is missing.
        checks: for each finished batch, the checks of attention kernels in its forward pass.
        statistics: for each finished group of batches that has any, the lowest key of its examples and the segment
            with its statistics.
        segments: the files that hold rows of these batches; `access` is the way to them.
        damaged: the names of the segments that cannot be used. Batches with rows in them are not finished.
        lost: keys of examples that were finished before and are not any more, as far as the journal shows.
        foreign: the names of the segments of other jobs.
        next_segment, next_batch: the first numbers that no readable segment uses.
    """

    def __init__(self, folder: Path, job_id: str | None = None, *, verify: bool = True, access: Access = PLAIN) -> None:
        """Reads the journal of the job `job_id`; None: of no job, as for a benchmark.

        `verify` compares every segment with its checksum, at about the speed of the disk. `access` is the way to the
        folder.
        """
        self.folder = folder
        self.job_id = job_id
        self.access = access
        self.records: dict[int, ExampleRecord] = {}
        self.batches: set[int] = set()
        self.batching: dict[int, tuple[int, Batching]] = {}
        self.checks: dict[int, Sequence[AttentionFacts]] = {}
        self.statistics: list[tuple[int, Path]] = []
        self.segments: list[Path] = []
        self.damaged: list[str] = []
        self.lost: set[int] = set()
        self.foreign: list[str] = []
        self.next_segment = 0
        self.next_batch = 0
        self._verified: dict[Path, npt.NDArray[np.int64]] = {}
        """The segments that were compared with their checksums: the batch and the example of each run, without
        repetitions."""
        self._read: dict[Path, tuple[str, SegmentFacts]] = {}
        """The segments that were read and are not compared yet: the checksum of the header, and its facts. `ended` and
        `statistics` are empty: examples and places take memory."""
        self._batch_of: dict[int, int] = {}
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
        found |= self._strangers(self.segments)
        self.damaged = sorted({*self.damaged, *(path.name for path in found)})
        if not self.is_whole:
            what = ", ".join(self.damaged) or "segments are missing"
            raise StoreError(
                f"the journal {self.folder} is damaged: {what}. Rerun the command, or that of the journal's shard: it "
                "captures the examples in the damaged segments again and keeps the others"
            )

    def prepare(self, access: Access = PLAIN) -> None:
        """Makes the folder ready for a writer: creates it and removes the files without use. Hold the shard's lock."""
        with explained(self.folder, "write"):
            access.check()
            make_folder(self.folder, access)
            unfinished = [path for path in paths_in(self.folder, access) if path.suffix == ".tmp"]
            for path in (*self._unused, *unfinished):
                remove(path, access)
        self._unused.clear()
        self.damaged.clear()
        self.foreign.clear()

    def add(
        self,
        batch: int,
        records: Sequence[ExampleRecord],
        batching: Batching | None,
        checks: Sequence[AttentionFacts] = (),
    ) -> None:
        """Adds a finished batch, which is durable."""
        self.batches.add(batch)
        self.checks[batch] = checks
        self.records.update((record.key, record) for record in records)
        self._batch_of.update((record.key, batch) for record in records)
        if records and batching is not None:
            self.batching[batch] = min(record.index for record in records), batching

    def _open(self, verify: bool) -> None:
        facts, found = self._read_facts()
        if verify:
            found |= self._compare(list(facts))
        while True:
            usable = {path: each for path, each in facts.items() if path not in found}
            odd = self._settle(usable) | self._strangers(usable)
            if not odd:
                break
            found |= odd
        for path, damage in sorted(found.items()):
            log.warning("journal segment %s is damaged (%s); its examples are captured again", path, damage)
        if self.lost:
            log.warning("journal %s: the rows of %d finished examples are lost", self.folder, len(self.lost))
        batches = sorted(self.batches)
        for path, each in usable.items():
            at = bisect_left(batches, each.first)
            used = at < len(batches) and batches[at] <= each.last
            (self.segments if used else self._unused).append(path)
        self.next_segment = max(map(_number, usable), default=-1) + 1
        self.next_batch = max((each.last for each in usable.values()), default=-1) + 1
        self._unused.extend(found)
        self.damaged = sorted(path.name for path in found)

    def _read_facts(self) -> tuple[dict[Path, SegmentFacts], dict[Path, DamageError]]:
        """Returns the facts of the segments of this job by path, in order, and the damage of unreadable ones."""
        facts: dict[Path, SegmentFacts] = {}
        damaged: dict[Path, DamageError] = {}
        with explained(self.folder, "read"):
            paths = [path for path in paths_in(self.folder, self.access) if segment_number(path) is not None]
        for path in paths:
            try:
                with explained(path, "read"):
                    header = read_header(path, self.access)
                if header.metadata.get("job") != self.job_id:
                    self.foreign.append(path.name)
                    self._unused.append(path)
                    continue
                blocks_of(header)
                facts[path] = facts_of(header, _number(path))
                self._read[path] = header.checksum, replace(facts[path], ended=[], statistics={})
            except DamageError as error:
                damaged[path] = error
        if self.foreign:
            log.warning("journal %s: %d segments of another job are ignored", self.folder, len(self.foreign))
        return facts, damaged

    def _settle(self, facts: Mapping[Path, SegmentFacts]) -> dict[Path, DamageError]:
        """Finds the finished batches in `facts`, which are in order. Returns the segments that contradict earlier ones.

        Forgets those that it has found before.
        """
        self.records.clear()
        self.batches.clear()
        self.batching.clear()
        self.checks.clear()
        self.statistics.clear()
        self.lost.clear()
        self._batch_of.clear()
        numbers = Counter(map(_number, facts))
        # Two writers have continued the journal: the batches of one do not continue in the segments of the other.
        odd = {path: DamageError("another segment has its number") for path in facts if numbers[_number(path)] > 1}
        if odd:
            return odd
        present = set(numbers)
        for path, each in facts.items():
            is_there = [present.issuperset(range(end["since"], _number(path) + 1)) for end in each.ended]
            if each.statistics and not all(is_there):  # they are of all batches together
                is_there = [False] * len(is_there)
            for end, is_whole in zip(each.ended, is_there, strict=True):
                records = [ExampleRecord(*values) for values in end["records"]]
                keys = {record.key for record in records}
                if not is_whole:
                    self.lost |= keys
                    continue
                if len(keys) < len(records) or keys & self.records.keys() or end["batch"] in self.batches:
                    odd[path] = DamageError("it lists examples or batches that are listed already")
                    break
                self.add(end["batch"], records, each.batching, end.get("checks", ()))
            else:
                if each.statistics and all(is_there):
                    keys = {ExampleRecord(*values).key for end in each.ended for values in end["records"]}
                    self.statistics.append((min(keys, default=0), path))
        self.lost -= self.records.keys()
        return odd

    def _strangers(self, paths: Iterable[Path]) -> dict[Path, DamageError]:
        """Returns the segments with rows of finished batches that belong to none of their examples."""
        key, batch = (np.array(values, np.int64) for values in (list(self._batch_of), list(self._batch_of.values())))
        order = np.argsort(key)
        key, batch = key[order], batch[order]
        finished = np.array(list(self.batches), np.int64)
        odd = {}
        for path in paths:
            runs = self._verified.get(path)
            if runs is None:
                continue
            runs = runs[np.isin(runs[:, 0], finished)]
            if not len(runs):
                continue
            at = np.minimum(np.searchsorted(key, runs[:, 1]), len(key) - 1)
            listed = len(key) and np.array_equal(key[at], runs[:, 1]) and np.array_equal(batch[at], runs[:, 0])
            if not listed:
                odd[path] = DamageError("it has rows of examples that its batches do not list")
        return odd

    def _compare(self, paths: list[Path]) -> dict[Path, DamageError]:
        """Compares segments with their checksums, and their runs with their rows. Returns the damage of each."""
        damaged: dict[Path, DamageError] = {}

        def compare(path: Path) -> None:
            try:
                verify_segment(path, self.access)
                header = read_header(path, self.access)
                checksum, facts = self._read.pop(path, (None, None))
                if facts is None or header.checksum != checksum:
                    facts = facts_of(header, _number(path))
                self._verified[path] = check_runs(path, header, facts, self.access)
            except DamageError as error:
                damaged[path] = error

        with explained(self.folder, "read"), ThreadPoolExecutor(4) as pool:
            for _ in pool.map(compare, paths):
                pass
        return damaged


def _number(path: Path) -> int:
    number = segment_number(path)
    assert number is not None
    return number
