"""Tests the journal: finished batches are durable, and rows of unfinished batches are ignored."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.store_cases import HEADS, SAMPLER, Captured, Piece, by_index, captured_journal, file_bytes, ones, put

from qk_sniffer.errors import StoreError
from qk_sniffer.store.compact import compact
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Layout

BIG = 1 << 30


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
    assert by_index(found) == {index: corpus.record(index) for index in range(12)}


def test_segments_are_cut_within_a_batch(tmp_path: Path) -> None:
    found = captured_journal(tmp_path, Captured(num_examples=4, batch=4), segment_bytes=1)
    # (layer 0: q, k) + (layer 3: q, k, each in two parts); the end is in the last one, or comes after it was taken
    assert len(found.segments) in (6, 7)
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_of_unfinished_batches_are_ignored(tmp_path: Path) -> None:
    corpus = Captured()
    with pytest.raises(ZeroDivisionError), JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1) as writer:
        first, second, *_ = corpus.batches()
        for piece in corpus.pieces(first):
            put(writer, piece)
        writer.complete([corpus.record(index) for index in first])
        for piece in list(corpus.pieces(second))[:3]:
            put(writer, piece)
        deadline = time.monotonic() + 10
        while len(list(tmp_path.glob("*.safetensors"))) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)  # until rows of the open batch are on the disk
        raise ZeroDivisionError
    found = Journal(tmp_path)
    assert sorted(by_index(found)) == sorted(first)
    assert len(found.segments) in (6, 7)

    with JournalWriter(found, queue_bytes=BIG, segment_bytes=1 << 12) as writer:
        corpus.write(writer, by_index(found))
    again = Journal(tmp_path)
    assert sorted(by_index(again)) == list(range(12)) == sorted(by_index(found))
    whole = captured_journal(tmp_path / "other", corpus)
    assert staged_bytes(tmp_path / "one", again) == staged_bytes(tmp_path / "two", whole)


def test_leaving_by_an_exception_keeps_the_complete_batches(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer,
    ):
        corpus = Captured()
        put(writer, ones(3))
        writer.complete([corpus.record(0)])
        put(writer, ones(3, index=1))
        raise KeyboardInterrupt
    (path,) = Journal(tmp_path).segments
    assert list(by_index(Journal(tmp_path))) == [0]
    assert load_file(path)["l00q.vectors"].shape == (1, 3, 4)


def test_a_batch_without_rows_is_finished_too(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG) as writer:
        writer.complete([Captured().record(4)])
    assert list(by_index(Journal(tmp_path))) == [4]


def test_a_finished_batch_does_not_wait_for_its_segment_to_fill(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG, flush_s=0.05) as writer:
        put(writer, ones(3))
        writer.complete([Captured().record(0)])
        deadline = time.monotonic() + 10
        while writer.durable_examples == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(by_index(Journal(tmp_path))) == [0]


@pytest.mark.slow
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
def test_batches_of_a_damaged_segment_are_not_finished(
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
    assert set(range(12)) - set(by_index(found)) == set(second)
    assert not found.is_whole and "3 finished examples are lost" in caplog.text
    with pytest.raises(StoreError, match="Rerun the command"):
        compact(Layout(tmp_path), [Journal(tmp_path / "journal", verify=False)], HEADS, SAMPLER)
    if harm != "delete":
        assert found.damaged == [path.name] and path.name in caplog.text
    with JournalWriter(found, queue_bytes=BIG, segment_bytes=1) as writer:
        corpus.write(writer, by_index(found))
    assert not path.exists() and found.is_whole
    again = Journal(tmp_path / "journal")
    assert len(again.records) == 12 and not again.damaged
    other = captured_journal(tmp_path / "other", corpus)
    assert staged_bytes(tmp_path / "one", again) == staged_bytes(tmp_path / "two", other)


def test_files_without_use_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), JournalWriter(Journal(tmp_path), queue_bytes=1, segment_bytes=1) as writer:
        put(writer, ones(3))
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


WRITER = """
import sys
from pathlib import Path
from support.store_cases import Captured, by_index
from qk_sniffer.errors import StoreError
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
journal = Journal(Path(sys.argv[1]))
corpus = Captured(num_examples=300, batch=2)
try:
    with JournalWriter(journal, queue_bytes=1 << 20, segment_bytes=int(sys.argv[2])) as writer:
        print("ready", flush=True)
        corpus.write(writer, by_index(journal))
        sys.stdin.read()  # the writer stays open until the test closes stdin
except StoreError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""


def run_writer(folder: Path, segment_bytes: str, **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, folder, segment_bytes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing_complete(tmp_path: Path) -> None:
    corpus = Captured(num_examples=300, batch=2)
    rng, done = np.random.default_rng(), 0
    for is_killed in (True, True, True, False):
        process = run_writer(tmp_path / "journal", "6000")
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if is_killed:
            time.sleep(rng.uniform(0, 0.25))
            process.kill()
        process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if is_killed else 0)
        found = Journal(tmp_path / "journal")
        assert not found.damaged
        assert len(found.records) >= done
        assert all(record == corpus.record(index) for index, record in by_index(found).items())
        done = len(found.records)
    assert done == 300
    whole = captured_journal(tmp_path / "other", corpus, segment_bytes=1 << 20)
    assert staged_bytes(tmp_path / "one", found) == staged_bytes(tmp_path / "two", whole)


def test_the_bytes_of_a_segment_are_fixed(tmp_path: Path) -> None:
    """An unfinished journal of an earlier version must stay readable. The checksum covers every byte of the file."""
    with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=BIG) as writer:
        for kind, num_heads in (("q", 2), ("k", 1)):
            for rows in (slice(0, 4), slice(4, 6)):
                vectors = torch.arange(6 * num_heads * 4).reshape(num_heads, 6, 4).to(torch.bfloat16)[:, rows]
                index, position = np.array([5, 5, 5, 2, 2, 2])[rows], np.array([0, 3, 9, 1, 2, 8])[rows]
                put(writer, Piece.of(3, kind, vectors, index, position, token_id=position + 100))
        writer.complete([Captured().record(2), Captured().record(5)])
    assert [path.name for path in Journal(tmp_path).segments] == ["00000000-29fca167d66b861e.safetensors"]
