"""The journal: what was complete is durable, what was not is not there, and the queue is bounded."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.store_cases import HEADS, SAMPLER, Captured, Piece, captured_journal, file_bytes, put

from qk_sniffer.errors import StoreError
from qk_sniffer.store import disk, journal_writer, segment
from qk_sniffer.store.compact import compact
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Layout

BIG = 1 << 30


def piece(count: int, dim: int = 4, *, index: int = 0, dtype: torch.dtype = torch.float32) -> Piece:
    return Piece.of(0, "q", torch.ones(1, count, dim, dtype=dtype), np.full(count, index), np.arange(count))


def staged_bytes(root: Path, *journals: Journal) -> dict[str, bytes]:
    compact(Layout(root), journals, HEADS, SAMPLER)
    return file_bytes(Layout(root).staging.root)


def test_segments_are_safetensors_in_the_models_dtype(tmp_path: Path) -> None:
    corpus = Captured()
    found = captured_journal(tmp_path, corpus, segment_bytes=BIG)
    (path,) = found.segments
    tensors = load_file(path)
    assert tensors["l00q.vectors"].dtype == torch.bfloat16
    order = [index for batch in corpus.batches() for index in batch]
    torch.testing.assert_close(
        tensors["l00q.vectors"], torch.cat([corpus.vectors(index, 0, "q") for index in order], dim=1), rtol=0, atol=0
    )
    positions = np.concatenate([corpus.positions(index, 3, "k") for index in order])
    np.testing.assert_array_equal(tensors["l03k.position"].numpy(), positions)
    assert found.records == {index: corpus.record(index) for index in range(12)}


def test_segments_are_cut_within_a_batch(tmp_path: Path) -> None:
    found = captured_journal(tmp_path, Captured(num_examples=4, batch=4), segment_bytes=1)
    assert len(found.segments) == 6  # (layer 0: q, k) + (layer 3: q, k, each in two parts); the end is with the last
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_without_their_end_are_not_there(tmp_path: Path) -> None:
    corpus = Captured()
    with pytest.raises(ZeroDivisionError), JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1) as writer:
        first, second, *_ = corpus.batches()
        for piece in corpus.pieces(first):
            put(writer, piece)
        writer.complete([corpus.record(index) for index in first])
        for piece in list(corpus.pieces(second))[:3]:
            put(writer, piece)
        deadline = time.monotonic() + 10
        while len(list(tmp_path.glob("*.safetensors"))) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)  # rows of the open batch are on the disk by now
        raise ZeroDivisionError
    found = Journal(tmp_path)
    assert sorted(found.records) == sorted(first)
    assert len(found.segments) == 6

    with JournalWriter(found, queue_bytes=BIG, segment_bytes=1 << 12) as writer:
        corpus.write(writer, found.records)
    again = Journal(tmp_path)
    assert sorted(again.records) == list(range(12)) == sorted(found.records)
    whole = captured_journal(tmp_path / "other", corpus)
    assert staged_bytes(tmp_path / "one", again) == staged_bytes(tmp_path / "two", whole)


def test_leaving_by_an_exception_keeps_the_complete_batches(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer,
    ):
        corpus = Captured()
        put(writer, piece(3))
        writer.complete([corpus.record(0)])
        put(writer, piece(3, index=1))
        raise KeyboardInterrupt
    (path,) = Journal(tmp_path).segments
    assert list(Journal(tmp_path).records) == [0]
    assert load_file(path)["l00q.vectors"].shape == (1, 3, 4)


def test_a_batch_without_rows_is_done_too(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer:
        writer.complete([Captured().record(4)])
    assert list(Journal(tmp_path).records) == [4]


def test_a_finished_batch_does_not_wait_for_its_segment_to_fill(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG, flush_s=0.05) as writer:
        put(writer, piece(3))
        writer.complete([Captured().record(0)])
        deadline = time.monotonic() + 10
        while writer.durable_examples == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(Journal(tmp_path).records) == [0]


class SlowDisk:
    """Holds back every fsync of a file until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.calls = 0
        monkeypatch.setattr(segment, "sync_file", self._sync)

    def _sync(self, descriptor: int) -> None:
        self.calls += 1
        assert self.go.wait(20)
        disk.sync_file(descriptor)


def test_put_waits_while_the_queue_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowDisk(monkeypatch)
    taken: list[int] = []

    with JournalWriter(Journal(tmp_path), queue_bytes=10_000, segment_bytes=4_000) as writer:

        def forward() -> None:
            for index in range(8):
                put(writer, piece(100, index=index))
                taken.append(index)
            writer.complete([Captured().record(index) for index in range(8)])

        thread = threading.Thread(target=forward)
        thread.start()
        time.sleep(0.5)
        assert slow.calls == 1  # the first segment hangs
        assert taken == [0, 1, 2, 3]  # 4 x 2,000 bytes are not durable; a fifth does not fit beside them, aligned
        slow.go.set()
        thread.join(20)
        assert taken == list(range(8))
        assert writer.wait_s > 0.3
    assert len(Journal(tmp_path).records) == 8


def test_rows_larger_than_the_queue_are_taken_alone(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=1_000, segment_bytes=1_000) as writer:
        for index in range(3):
            put(writer, piece(10_000, index=index))
        writer.complete([Captured().record(index) for index in range(3)])
    found = Journal(tmp_path)
    assert len(found.segments) >= 3 and len(found.records) == 3  # the end may have a segment of its own


@pytest.mark.parametrize("call", ["put", "complete", "close"])
def test_an_error_of_the_thread_reaches_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment, "sync_file", full)
    writer = JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1)
    put(writer, piece(3))
    writer._thread.join(10)
    ends = [Captured().record(0)]
    with pytest.raises(StoreError, match=r"No space left.*rerun the command"):
        {"put": lambda: put(writer, piece(3)), "complete": lambda: writer.complete(ends), "close": writer.close}[call]()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_thread_wakes_a_waiting_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "write_segment", lambda *_: time.sleep(0.2) or 1 / 0)
    with (
        pytest.raises(StoreError, match="ZeroDivisionError"),
        JournalWriter(Journal(tmp_path), queue_bytes=100, segment_bytes=1) as writer,
    ):
        put(writer, piece(100))
        put(writer, piece(100))


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_writer(tmp_path, "200000", preexec_fn=limited)
    _, error = done.communicate(timeout=60)
    assert done.returncode == 3, error
    assert "cannot write the journal" in error and "File too large" in error
    found = Journal(tmp_path)
    assert not found.damaged and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "flip the header", "delete"])
def test_a_damaged_segment_means_that_its_batches_are_not_done(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = Captured()
    whole = captured_journal(tmp_path / "journal", corpus, segment_bytes=1)
    path = whole.segments[8]  # in the middle of the second batch
    data = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    else:
        at = {"flip": len(data) - 9, "flip the header": 30}.get(harm)
        if at is not None:
            data[at] ^= 4
        path.write_bytes({"cut": data[:-7], "empty": b""}.get(harm, data))

    found = Journal(tmp_path / "journal")
    second = list(corpus.batches())[1]
    assert set(range(12)) - set(found.records) == set(second)
    assert not found.is_whole and "3 finished examples are lost" in caplog.text
    with pytest.raises(StoreError, match="Rerun the command"):
        compact(Layout(tmp_path), [Journal(tmp_path / "journal", verify=False)], HEADS, SAMPLER)
    if harm != "delete":
        assert found.damaged == [path.name] and path.name in caplog.text
    with JournalWriter(found, queue_bytes=BIG, segment_bytes=1) as writer:
        corpus.write(writer, found.records)
    assert not path.exists() and found.is_whole
    again = Journal(tmp_path / "journal")
    assert len(again.records) == 12 and not again.damaged
    other = captured_journal(tmp_path / "other", corpus)
    assert staged_bytes(tmp_path / "one", again) == staged_bytes(tmp_path / "two", other)


def test_what_is_of_no_use_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), JournalWriter(Journal(tmp_path), queue_bytes=1, segment_bytes=1) as writer:
        put(writer, piece(3))
        deadline = time.monotonic() + 10
        while not writer.bytes_written and time.monotonic() < deadline:
            time.sleep(0.01)
        raise ZeroDivisionError
    (tmp_path / "00000007.tmp").write_bytes(b"half")
    (tmp_path / "mine.txt").touch()
    found = Journal(tmp_path)
    assert not found.records and not found.segments
    assert len(list(tmp_path.iterdir())) == 3  # reading removes nothing: another process may be writing
    JournalWriter(found, queue_bytes=1, segment_bytes=1).close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (piece(3, dtype=torch.float64), "float64 cannot be stored"),
        (Piece.of(0, "v", torch.ones(1, 3, 4), np.zeros(3), np.arange(3)), "kind is 'v'"),
        (Piece.of(0, "q", torch.ones(0, 3, 4), np.zeros(3), np.arange(3)), "no heads"),
        (Piece.of(0, "q", torch.ones(1, 3, 4), np.zeros(3), np.arange(4)), "one value a row"),
        (Piece.of(0, "q", torch.ones(1, 3, 4), np.zeros(3), np.array([0, 2, 2])), "do not ascend"),
        (piece(3, dim=5), "head_dim=5"),
        (piece(3, dtype=torch.bfloat16), "BF16"),
    ],
)
def test_rows_that_are_not_right_are_refused(tmp_path: Path, bad: Piece, match: str) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer:
        put(writer, piece(3))
        with pytest.raises(ValueError, match=match):
            put(writer, bad)
        writer.complete([Captured().record(0)])


def test_an_end_must_name_its_examples_once(tmp_path: Path) -> None:
    corpus = Captured()
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer:
        put(writer, piece(3, index=5))
        with pytest.raises(ValueError, match=r"\[5\]"):
            writer.complete([corpus.record(4)])
        writer.complete([corpus.record(5)])
    with (
        JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer,
        pytest.raises(ValueError, match="complete already"),
    ):
        writer.complete([corpus.record(5)])


WRITER = """
import sys
from pathlib import Path
from support.store_cases import Captured
from qk_sniffer.errors import StoreError
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
journal = Journal(Path(sys.argv[1]))
corpus = Captured(num_examples=300, batch=2)
try:
    with JournalWriter(journal, queue_bytes=1 << 20, segment_bytes=int(sys.argv[2])) as writer:
        print("ready", flush=True)
        corpus.write(writer, journal.records)
except StoreError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""


def run_writer(folder: Path, segment_bytes: str, **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, folder, segment_bytes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_killed_at_any_moment_nothing_complete_is_lost(tmp_path: Path) -> None:
    corpus = Captured(num_examples=300, batch=2)
    rng, done, kills = np.random.default_rng(), 0, 0
    while done < 300:
        process = run_writer(tmp_path / "journal", "6000")
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if kills < 3:
            time.sleep(rng.uniform(0, 0.25))
            process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
        found = Journal(tmp_path / "journal")
        assert not found.damaged
        assert len(found.records) >= done
        assert all(found.records[index] == corpus.record(index) for index in found.records)
        done = len(found.records)
    assert kills >= 1
    whole = captured_journal(tmp_path / "other", corpus, segment_bytes=1 << 20)
    assert staged_bytes(tmp_path / "one", found) == staged_bytes(tmp_path / "two", whole)


def test_a_queue_that_does_not_fit_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no memory for the 1,099,511,627,776 MB .* lower inference\.queue_mb"):
        JournalWriter(Journal(tmp_path), queue_bytes=1 << 60, segment_bytes=1)


def test_a_gather_that_fails_leaves_the_queue_as_it_was(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=100, segment_bytes=BIG) as writer:
        with pytest.raises(RuntimeError, match="device"), writer.reserve(piece(3).rows):
            raise RuntimeError("the device is gone")
        with writer.reserve(piece(3, index=7).rows):
            pass  # without a commit: example 7 is not in the batch
        put(writer, piece(3))  # would wait forever for memory that was not given back
        writer.complete([Captured().record(0)])
    assert list(Journal(tmp_path).records) == [0]
    (path,) = Journal(tmp_path).segments
    assert load_file(path)["l00q.vectors"].shape == (1, 3, 4)


@dataclass
class Copy:
    """The event of a copy that ends when somebody waits for it, as a GPU's may."""

    end: Callable[[], None]

    def synchronize(self) -> None:
        self.end()


def test_a_segment_waits_for_rows_that_are_still_on_their_way(tmp_path: Path) -> None:
    vectors = torch.randn(2, 3, 4)
    with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=BIG) as writer:
        start = time.monotonic()
        with writer.reserve(Piece.of(0, "q", vectors, np.zeros(3), np.arange(3)).rows) as slot:
            memory = slot.vectors.fill_(torch.nan)

            def arrive() -> None:
                assert threading.current_thread().name == "journal"
                time.sleep(0.05)
                memory.copy_(vectors)

            writer.commit(slot, Copy(arrive))
        assert time.monotonic() - start < 0.05
        writer.complete([ExampleRecord(0, 0, "0", 3, False, "")])
    assert writer.transfer_s >= 0.05
    (path,) = Journal(tmp_path).segments
    assert torch.equal(load_file(path)["l00q.vectors"], vectors)


def test_memory_is_not_given_back_while_a_copy_to_it_is_under_way(tmp_path: Path) -> None:
    waited: list[str] = []
    with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=BIG) as writer:
        with writer.reserve(piece(3).rows) as slot:
            writer.commit(slot, Copy(lambda: waited.append("arrived")))
        assert waited == []  # the batch is open when the writer is closed: its rows are dropped
    assert waited == ["arrived"]
    assert Journal(tmp_path).segments == []


def test_a_commit_that_fails_waits_for_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "write_segment", lambda *_: 1 / 0)
    waited: list[str] = []
    writer = JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1)
    with pytest.raises(StoreError, match="ZeroDivisionError"), writer.reserve(piece(3).rows) as slot:
        put(writer, piece(3, index=1))
        writer._thread.join(10)
        writer.commit(slot, Copy(lambda: waited.append("arrived")))
    assert waited == ["arrived"]


def test_the_bytes_of_a_segment_are_fixed(tmp_path: Path) -> None:
    """An unfinished journal of an earlier version must stay readable. The checksum covers every byte of the file."""
    with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=BIG) as writer:
        for kind, num_heads in (("q", 2), ("k", 1)):
            for rows in (slice(0, 4), slice(4, 6)):
                vectors = torch.arange(6 * num_heads * 4).reshape(num_heads, 6, 4).to(torch.bfloat16)[:, rows]
                index, position = np.array([5, 5, 5, 2, 2, 2])[rows], np.array([0, 3, 9, 1, 2, 8])[rows]
                put(writer, Piece.of(3, kind, vectors, index, position, position + 100))
        writer.complete([Captured().record(2), Captured().record(5)])
    assert [path.name for path in Journal(tmp_path).segments] == ["00000000-8dc60cad6ca4d691.safetensors"]
