"""Tests the journal's writer: it waits while the buffer is full, gives memory back, and passes errors on."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.store_cases import Captured, Piece, by_index, ones, put

from qk_sniffer.errors import StoreError
from qk_sniffer.store import disk, journal_writer, segment, segment_writers
from qk_sniffer.store.compaction_plan import SegmentFiles, find_blocks, plan_compaction
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.rows import FIRST, INDEX, LAST

BIG = 1 << 30


class SlowDisk:
    """Blocks every fsync of a file until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.calls = 0
        monkeypatch.setattr(segment, "sync_file", self._sync)

    def _sync(self, descriptor: int) -> None:
        self.calls += 1
        assert self.go.wait(20)
        disk.sync_file(descriptor)


def join_threads(writer: JournalWriter) -> None:
    """Waits for the threads of a writer that has nothing to write any more."""
    for thread in writer._segments._threads:
        thread.join(10)


def test_reserve_waits_while_the_buffer_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowDisk(monkeypatch)
    taken: list[int] = []

    with JournalWriter(Journal(tmp_path), queue_bytes=10_000, segment_bytes=4_000, threads=4) as writer:

        def forward() -> None:
            for index in range(8):
                put(writer, ones(100, index=index))
                taken.append(index)
            writer.complete([Captured().record(index) for index in range(8)])

        thread = threading.Thread(target=forward)
        thread.start()
        deadline = time.monotonic() + 20
        while (slow.calls, len(taken)) != (2, 4) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # a fifth would be taken now
        assert slow.calls == 2  # two segments block, and two threads have nothing to write
        assert taken == [0, 1, 2, 3]  # 4 x 2,000 bytes are not durable; a fifth does not fit, aligned
        slow.go.set()
        thread.join(20)
        assert taken == list(range(8))
        assert writer.wait_s > 0.3
    assert len(Journal(tmp_path).records) == 8


def test_rows_larger_than_the_buffer_are_taken_while_nothing_else_is(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=1_000, segment_bytes=1_000) as writer:
        for index in range(3):
            put(writer, ones(10_000, index=index))
        writer.complete([Captured().record(index) for index in range(3)])
    found = Journal(tmp_path)
    assert len(found.segments) >= 3 and len(found.records) == 3  # the end may have its own segment


@pytest.mark.parametrize("call", ["put", "complete", "close"])
def test_an_error_of_the_thread_reaches_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment, "sync_file", full)
    writer = JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1)
    put(writer, ones(3))
    join_threads(writer)
    ends = [Captured().record(0)]
    with pytest.raises(StoreError, match=r"No space left.*rerun the command"):
        {"put": lambda: put(writer, ones(3)), "complete": lambda: writer.complete(ends), "close": writer.close}[call]()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_thread_wakes_a_waiting_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writers, "whole_segment", lambda *_: time.sleep(0.2) or 1 / 0)
    with (
        pytest.raises(StoreError, match="ZeroDivisionError"),
        JournalWriter(Journal(tmp_path), queue_bytes=100, segment_bytes=1) as writer,
    ):
        put(writer, ones(100))
        put(writer, ones(100))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (ones(3, dtype=torch.float64), "float64 cannot be stored"),
        (Piece.of(0, "x", torch.ones(1, 3, 4), np.zeros(3), np.arange(3)), "kind is 'x'"),
        (Piece.of(0, "q", torch.ones(0, 3, 4), np.zeros(3), np.arange(3)), "no heads"),
        (Piece.of(0, "q", torch.ones(1, 3, 4), np.zeros(3), np.arange(4)), "one value a row"),
        (Piece.of(0, "q", torch.ones(1, 3, 4), np.zeros(3), np.array([0, 2, 2])), "do not ascend"),
        (ones(3, dim=5), "head_dim=5"),
        (ones(3, dtype=torch.bfloat16), "BF16"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, bad: Piece, match: str) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer:
        put(writer, ones(3))
        with pytest.raises(ValueError, match=match):
            put(writer, bad)
        writer.complete([Captured().record(0)])


def test_an_end_must_name_its_examples_once(tmp_path: Path) -> None:
    corpus = Captured()
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer:
        put(writer, ones(3, index=5))
        with pytest.raises(ValueError, match=r"\[5\]"):
            writer.complete([corpus.record(4)])
        writer.complete([corpus.record(5)])
    with (
        JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer,
        pytest.raises(ValueError, match="complete already"),
    ):
        writer.complete([corpus.record(5)])


def test_a_buffer_that_does_not_fit_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no memory for the 1,099,511,627,776 MB .* lower inference\.queue_mb"):
        JournalWriter(Journal(tmp_path), queue_bytes=1 << 60, segment_bytes=1)


def test_a_gather_that_fails_gives_its_memory_back(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=100, segment_bytes=BIG) as writer:
        with pytest.raises(RuntimeError, match="device"), writer.reserve(ones(3).rows):
            raise RuntimeError("the device is gone")
        with writer.reserve(ones(3, index=7).rows):
            pass  # without a commit: example 7 is not in the batch
        put(writer, ones(3))  # would wait forever for memory that was not given back
        writer.complete([Captured().record(0)])
    assert list(by_index(Journal(tmp_path))) == [0]
    (path,) = Journal(tmp_path).segments
    assert load_file(path)["l00q.vectors"].shape == (1, 3, 4)


@dataclass
class Copy:
    """The event of a copy that ends during the wait for it, as a GPU's may."""

    end: Callable[[], None]

    def synchronize(self) -> None:
        self.end()


def test_a_segment_waits_for_copies_that_are_under_way(tmp_path: Path) -> None:
    vectors, forward_continues = torch.randn(2, 3, 4), threading.Event()
    with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=BIG) as writer:
        with writer.reserve(Piece.of(0, "q", vectors, np.zeros(3), np.arange(3)).rows) as slot:
            memory = slot.vectors.fill_(torch.nan)

            def arrive() -> None:
                assert threading.current_thread().name == "journal"
                assert forward_continues.wait(20)
                time.sleep(0.05)
                memory.copy_(vectors)

            writer.commit(slot, Copy(arrive))
        forward_continues.set()
        writer.complete([ExampleRecord(0, 0, "0", 3, False, "")])
    assert writer.transfer_s >= 0.05
    (path,) = Journal(tmp_path).segments
    assert torch.equal(load_file(path)["l00q.vectors"], vectors)


def test_memory_is_not_given_back_while_a_copy_to_it_is_under_way(tmp_path: Path) -> None:
    waited: list[str] = []
    with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=BIG) as writer:
        with writer.reserve(ones(3).rows) as slot:
            writer.commit(slot, Copy(lambda: waited.append("arrived")))
        assert waited == []  # the batch is open when the writer is closed: its rows are dropped
    assert waited == ["arrived"]
    assert Journal(tmp_path).segments == []


def test_a_commit_that_fails_waits_for_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writers, "whole_segment", lambda *_: 1 / 0)
    waited: list[str] = []
    writer = JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1)
    with pytest.raises(StoreError, match="ZeroDivisionError"), writer.reserve(ones(3).rows) as slot:
        put(writer, ones(3, index=1))
        join_threads(writer)
        writer.commit(slot, Copy(lambda: waited.append("arrived")))
    assert waited == ["arrived"]


def test_checks_of_attention_are_durable_with_their_batch(tmp_path: Path) -> None:
    check = {"layer": 0, "kind": "full attention", "tokens": 9, "positions": [8], "tolerance": 0.1, "passed": True}
    journal = Journal(tmp_path)
    with JournalWriter(journal, queue_bytes=10_000, segment_bytes=4_000) as writer:
        for index in range(3):
            put(writer, ones(10, index=index))
            if index != 1:
                writer.add_checks([check | {"tokens": 9 + index}])
            if index != 2:  # a batch that is not finished
                writer.complete([Captured().record(index)])
    expected = {0: [check], 1: []}
    assert {batch: [*checks] for batch, checks in journal.checks.items()} == expected
    assert {batch: [*checks] for batch, checks in Journal(tmp_path).checks.items()} == expected


def test_a_segment_ends_before_its_header_is_larger_than_its_reader_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (journal_writer, segment_writers):
        monkeypatch.setattr(module, "MOST_METADATA", 4000)
    records = [ExampleRecord(i, i, f'"{i}"' + "é" * 100, 5, False, "00") for i in range(30)]
    journal = Journal(tmp_path / "journal")
    with JournalWriter(journal, queue_bytes=1 << 16, segment_bytes=1 << 16, flush_s=60.0) as writer:
        for start in range(0, 30, 3):
            writer.complete(records[start : start + 3])
        with pytest.raises(StoreError, match=r"ids and segments of 20 examples .* lower inference\.batch_size"):
            writer.complete([ExampleRecord(i, i, "é" * 100, 5, False, "00") for i in range(100, 120)])
    assert len(journal.segments) == 10
    for path in journal.segments:
        assert 1900 < len(segment.read_header(path).metadata["ended"]) < 4000
    assert [*Journal(tmp_path / "journal").records.values()] == records


def by_example(journal: Journal, **options: Any) -> JournalWriter:
    return JournalWriter(journal, by_example=True, **{"queue_bytes": BIG, "segment_bytes": 1} | options)


def rows_of(journal: Journal) -> dict[int, list[int]]:
    """The positions of the rows of each finished example, in the order of a compaction."""
    with SegmentFiles() as files:
        plan = plan_compaction(find_blocks([journal])[0, "q"], files)
    found: dict[int, list[int]] = {}
    for run in plan.runs.tolist():
        found.setdefault(run[INDEX], []).extend(range(run[FIRST], run[LAST] + 1))
    return found


def test_examples_that_are_batches_of_their_own_end_in_any_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with by_example(journal) as writer:
        for step in range(3):
            index, position = np.repeat([0, 1, 2], 2), np.tile([2 * step, 2 * step + 1], 3)
            put(writer, Piece.of(0, "q", torch.ones(1, 6, 4), index, position))
        writer.complete([Captured().record(2)])
        put(writer, Piece.of(0, "q", torch.ones(1, 2, 4), np.array([0, 0]), np.array([6, 7])))
        with pytest.raises(ValueError, match=r"examples \[2\] are complete already"):
            put(writer, ones(1, index=2))
        writer.complete([Captured().record(0), Captured().record(5)])  # without rows
    assert [key >> 24 for key in Journal(tmp_path).records] == [2, 0, 5]
    assert rows_of(journal) == rows_of(Journal(tmp_path)) == {0: [*range(8)], 2: [*range(6)]}


def test_rows_of_an_abandoned_example_are_dropped_and_its_number_is_free(tmp_path: Path) -> None:
    with by_example(Journal(tmp_path)) as writer:
        put(writer, ones(5, index=1))
        put(writer, ones(5, index=2))
        writer.abandon([Captured().record(1).key])
        put(writer, ones(3, index=1))
        writer.complete([Captured().record(1), Captured().record(2)])
    assert rows_of(Journal(tmp_path)) == {1: [0, 1, 2], 2: [0, 1, 2, 3, 4]}


class AlarmError(Exception):
    """What a signal's handler of the user raises."""


class Alarm:
    """Raises an `AlarmError` at line number `at` of those that the writer and its buffer run, as a trace function."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        # The end of a block that has a lock is traced before the lock is free, where no signal is handled.
        if event == "line" and not getline(code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            self.seen += 1
            if self.seen == self.at:
                raise AlarmError
        return self if Path(code.co_filename).name in ("journal_writer.py", "segment_writers.py", "buffer.py") else None


@pytest.mark.slow
def test_no_thread_waits_for_ever_after_an_exception_from_outside(tmp_path: Path) -> None:
    """Of 10,000 bytes of memory, pieces of 2,000 and 8,000 are taken in turn: what is lost makes the latter wait."""

    def work(at: int, seen: list[int]) -> None:
        alarm = Alarm(at)
        try:
            with by_example(Journal(tmp_path / str(at)), queue_bytes=10_000, flush_s=0.1) as writer:
                sys.settrace(alarm)
                index = 0
                while index < 4:
                    try:
                        put(writer, ones(500 if index % 2 else 125, index=index))
                        writer.complete([Captured().record(index)])
                    except AlarmError:
                        pass
                    index += 1
                sys.settrace(None)
        except (AlarmError, StoreError, ValueError):
            pass
        finally:
            sys.settrace(None)
            seen.append(alarm.seen)

    for at in range(1, 2000):
        seen: list[int] = []
        thread = threading.Thread(target=work, args=(at, seen), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), f"the caller waits for ever after an exception at line {at}"
        for each in threading.enumerate():
            if each.name == "journal":
                each.join(20)
                assert not each.is_alive(), f"a thread of the writer waits for ever after an exception at line {at}"
        if seen[0] < at:
            assert at > 50
            return
    raise AssertionError("the writer has too many lines")
