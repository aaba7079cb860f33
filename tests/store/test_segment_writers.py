"""Tests the threads of the journal's writer: segments are written at once and published in order."""

import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from support.store_cases import Captured, by_index, ones, put

from qk_sniffer.errors import StoreError
from qk_sniffer.store import segment, segment_writers
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.open_folder import OpenFolder
from qk_sniffer.store.segment import segment_number

BIG = 1 << 30


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "journal"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Disk:
    """Tells the segments that are synced, and delays or fails those of `acts`, by number."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.acts: dict[int, Callable[[], object]] = {}
        self.synced: set[int] = set()
        self.published: list[int | None] = []
        real = OpenFolder.rename

        def rename(opened: OpenFolder, name: str, target: OpenFolder, new_name: str) -> None:
            self.published.append(segment_number(folder / new_name))
            real(opened, name, target, new_name)

        monkeypatch.setattr(segment, "sync_file", self._sync)
        monkeypatch.setattr(OpenFolder, "rename", rename)

    def _sync(self, descriptor: int) -> None:
        number = int(Path(f"/proc/self/fd/{descriptor}").readlink().stem)
        self.acts.get(number, lambda: None)()
        self.synced.add(number)


def fail(text: str, when: Callable[[], bool] = lambda: True) -> Callable[[], None]:
    def act() -> None:
        until(when)
        raise OSError(28, text)

    return act


def put_batches(writer: JournalWriter, count: int) -> None:
    """Captures `count` batches, of which each is a segment."""
    for index in range(count):
        put(writer, ones(100, index=index))
        writer.complete([Captured().record(index)])


def test_segments_are_written_at_once_and_published_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, go = Disk(tmp_path, monkeypatch), threading.Event()
    disk.acts[0] = lambda: go.wait(20)
    journal = Journal(tmp_path)
    with JournalWriter(journal, queue_bytes=BIG, segment_bytes=1, threads=3) as writer:
        put_batches(writer, 8)
        until(lambda: disk.synced == {1, 2})
        assert len(threads()) == 3  # and no fourth one
        assert (writer.durable_examples, disk.published, Journal(tmp_path).records) == (0, [], {})
        go.set()
    assert disk.published == sorted(disk.published) and len(disk.published) >= 8
    assert [segment_number(path) for path in journal.segments] == disk.published
    assert list(by_index(journal)) == list(by_index(Journal(tmp_path))) == list(range(8))
    assert not threads()


def test_the_first_segment_that_fails_gives_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    failed = threading.Event()
    disk.acts[0] = lambda: failed.wait(20)
    disk.acts[1] = fail("the error of 1", failed.is_set)
    disk.acts[2] = lambda: until(lambda: 3 in disk.synced) or failed.set() or fail("the error of 2")()
    writer = JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1, threads=4)
    with pytest.raises(StoreError, match="the error of 1"), writer:
        put_batches(writer, 4)
    with pytest.raises(StoreError, match="the error of 1"):
        writer.close()
    assert disk.published == [0] and [segment_number(path) for path in tmp_path.iterdir()] == [0]
    assert not threads()


@pytest.mark.parametrize("number", [1, 2])
def test_a_failure_wakes_a_forward_pass_that_waits_for_memory(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    disk.acts[number] = fail("full")
    with (
        pytest.raises(StoreError, match="full"),
        JournalWriter(Journal(tmp_path), queue_bytes=5_000, segment_bytes=1, threads=2) as writer,
    ):
        put_batches(writer, 100)
    assert disk.published == list(range(number)) and not threads()


def test_a_writer_that_is_never_closed_leaves_no_thread_and_no_memory(tmp_path: Path) -> None:
    writer = JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=BIG, flush_s=0.05)
    put_batches(writer, 2)
    put(writer, ones(100, index=2))
    memory = weakref.ref(writer._segments._buffer)
    del writer  # as after an interrupt between the start of a block and that of `close`
    until(lambda: not threads())
    assert list(by_index(Journal(tmp_path))) == [0, 1]
    until(lambda: memory() is None)


def test_it_writes_with_the_threads_that_the_system_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Thread(segment_writers._Thread):
        def start(self) -> None:
            if threads():
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(segment_writers, "_Thread", Thread)
    with JournalWriter(Journal(tmp_path), queue_bytes=BIG, segment_bytes=1, threads=4) as writer:
        put_batches(writer, 8)
    assert len(Journal(tmp_path).records) == 8


def test_a_kill_with_several_segments_on_their_way_leaves_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, disk = Captured(num_examples=60, batch=2), Disk(tmp_path, monkeypatch)
    reader, teller = os.pipe()

    def hold() -> None:
        until(lambda: disk.synced == {0, 1, 2, 4, 5, 6} and len(disk.published) == 3)
        os.write(teller, b"held")
        time.sleep(60)

    disk.acts[3] = hold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, of which the child uses none
        child = os.fork()
    if not child:
        try:
            with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=1 << 14, threads=4) as writer:
                corpus.write(writer)
        finally:
            os._exit(1)
    os.close(teller)
    assert os.read(reader, 4) == b"held"
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.tmp"))) == 4
    found = Journal(tmp_path)
    assert found.next_segment == 3 and found.is_whole
    done = by_index(found)
    assert 0 < len(done) < 60
    disk.acts.clear()
    with JournalWriter(found, queue_bytes=1 << 20, segment_bytes=1 << 14) as writer:
        corpus.write(writer, done)
    assert by_index(Journal(tmp_path)) == {index: corpus.record(index) for index in range(60)}
    assert not list(tmp_path.glob("*.tmp"))
