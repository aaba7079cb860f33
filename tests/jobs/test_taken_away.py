"""Tests jobs whose data root is removed, moved or replaced while they run: they end, and touch nothing more.

The other job runs inside a step of the first one. Locks belong to open files, so that one process may hold the lock of
each of two data roots that were at the same path.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.forked import Server
from support.jobs import Stopped, captured_only, hashes, run, settings, stopped_after
from support.steps import STEPS, at

from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.jobs import finish
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import promote
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import InUseError, TakenAwayError, hold, holder, is_held
from qk_sniffer.store.segment_writers import SegmentWriters

SECTIONS: dict[str, Any] = {"inference": {"batch_size": 4, "lookahead": 10}, "capture": {"layers": [1]}}

TAKEN_AWAY = "was removed, moved or replaced|no longer holds this job|there is no dataset at"


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a segment as soon as any rows are queued, and one head after the other."""
    monkeypatch.setattr(SegmentWriters, "_is_due", lambda self: bool(self._queue))
    monkeypatch.setattr("qk_sniffer.jobs.assemble.num_threads", lambda: 1)


@pytest.fixture(scope="session")
def other(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of the same shapes with other weights."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("other") / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def everything(root: Path) -> dict[str, str]:
    """The digest of each file below `root`, without the locks and unfinished files that a job removes at its end."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix not in (".lock", ".tmp"))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def remove(root: Path) -> None:
    """Removes a data root in which other threads may be writing, which end when they see that it is gone."""
    trash = root.with_name(f"removed-{root.name}")
    root.rename(trash)
    deadline = time.monotonic() + 20
    while trash.exists():
        assert time.monotonic() < deadline
        shutil.rmtree(trash, ignore_errors=True)


@pytest.fixture(autouse=True)
def one_segment_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another thread may write its own segment, or look at the root, in the moment that a test waits for."""
    monkeypatch.setitem(JournalWriter.__init__.__kwdefaults__, "threads", 1)


IN_THREAD = ("segment",)
"""The steps during which the job computes: no other job runs in its process then."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [step for step in STEPS if step not in IN_THREAD],
)
def test_a_job_ends_when_another_one_takes_its_data_root(
    step: str,
    checkpoint: Path,
    other: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    root, left = tmp_path / "out", {}

    def take() -> None:
        remove(root)
        stopped_after(2, other, texts, root, **SECTIONS)
        left.update(everything(root))

    at(step, monkeypatch, take)
    with pytest.raises(TakenAwayError, match=TAKEN_AWAY):
        run(checkpoint, texts, root, **SECTIONS)
    assert left and everything(root) == left
    run(other, texts, root, **SECTIONS)
    whole = undisturbed(model={"name": str(other)}, **SECTIONS)
    assert hashes(root) == hashes(whole)
    made, expected = (manifests.read(each) | {"timings": {}} for each in (root, whole))
    assert made == expected and made["proof"]["proven"] is True
    assert made["proof"]["model_commit"] == made["commits"]["model"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [step for step in STEPS if step not in IN_THREAD])
def test_a_job_ends_beside_a_finished_one(
    step: str, checkpoint: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, left = tmp_path / "out", {}

    def take() -> None:
        remove(root)
        run(other, texts, root, **SECTIONS)
        left.update(everything(root))

    at(step, monkeypatch, take)
    with pytest.raises(StoreError, match=TAKEN_AWAY):
        run(checkpoint, texts, root, **SECTIONS)
    assert left and everything(root) == left


def move_away(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))


def remove_work(root: Path) -> None:
    # Moved first, because the thread of the journal still changes its files.
    shutil.rmtree(Layout(root).work.rename(root.with_name("removed")))


def remove_lock(root: Path) -> None:
    for path in Layout(root).locks():
        path.unlink()


def replace_lock(root: Path) -> None:
    for path in Layout(root).locks():
        path.rename(path.with_suffix(".old"))
        path.write_bytes(b"mine")


def remove_record(root: Path) -> None:
    Layout(root).job_file.unlink()


@pytest.mark.parametrize(
    ("harm", "step"),
    [
        (remove, "forward"),
        (remove_lock, "segment"),
        *(
            pytest.param(harm, step, marks=pytest.mark.slow)
            for harm in (remove, move_away, remove_work, remove_lock, replace_lock, remove_record)
            for step in STEPS
            if not (harm is remove_record and step in ("removal", "report", "finish"))
            if not (harm in (remove_work, remove_lock, replace_lock, remove_record) and step == "report")
        ),
    ],
)
def test_a_job_ends_when_its_data_root_or_a_part_of_it_is_gone(
    harm: Callable[[Path], None],
    step: str,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, left = tmp_path / "roots", {}
    folder.mkdir()

    def act() -> None:
        harm(folder / "out")
        left.update(everything(folder))

    at(step, monkeypatch, act)
    with pytest.raises(StoreError, match=TAKEN_AWAY):
        run(checkpoint, texts, folder / "out", **SECTIONS)
    assert everything(folder) == left


@pytest.mark.slow
@pytest.mark.parametrize("step", ["forward", "segment", "mark", "proof", "move"])
def test_a_root_that_was_away_for_a_moment_does_no_harm(
    step: str,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    root = tmp_path / "out"

    def act() -> None:
        root.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rename(root)

    at(step, monkeypatch, act)
    try:
        run(checkpoint, texts, root, **SECTIONS)
    except QkSnifferError:  # another thread that writes a segment looked at that moment
        assert step in ("forward", "segment")
        run(checkpoint, texts, root, **SECTIONS)
    assert hashes(root) == hashes(undisturbed(**SECTIONS))


@pytest.mark.slow
def test_segments_and_marks_of_another_job_do_not_count(
    checkpoint: Path,
    other: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    undisturbed: Callable[..., Path],
) -> None:
    root, theirs = tmp_path / "out", tmp_path / "theirs"
    captured_only(other, texts, theirs, monkeypatch, **SECTIONS)
    stopped_after(2, checkpoint, texts, root, **SECTIONS)
    journal = Layout(root).journal(0, 1)
    for path in Layout(theirs).journal(0, 1).iterdir():
        shutil.copy(path, journal)
    shutil.copy(Layout(theirs).shard_done(0, 1), Layout(root).work)
    assert finalize(root) == 1
    assert hashes(run(checkpoint, texts, root, **SECTIONS)) == hashes(undisturbed(**SECTIONS))
    assert "segments of another job are ignored" in caplog.text
    assert "of another job and does not count" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("has_record", [True, False])
def test_a_staged_version_of_another_job_is_not_promoted(
    has_record: bool,
    checkpoint: Path,
    other: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    root, theirs = tmp_path / "out", tmp_path / "theirs"

    def fail(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(promote, "_move", fail)
        run(other, texts, theirs, **SECTIONS)
    stopped_after(2, checkpoint, texts, root, **SECTIONS)
    shutil.copytree(Layout(theirs).staging.root, Layout(root).staging.root)
    if not has_record:
        Layout(root).job_file.unlink()
    assert hashes(run(checkpoint, texts, root, **SECTIONS)) == hashes(undisturbed(**SECTIONS))


@pytest.mark.slow
def test_the_proof_refuses_another_model_than_that_of_the_capture(
    checkpoint: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(checkpoint, model)
    captured_only(model, texts, root, monkeypatch, **SECTIONS)
    shutil.copy(other / "model.safetensors", model)
    with pytest.raises(Exception, match=r"the model and the tokenizer of the job at .* changed after the capture"):
        finalize(root)
    real = finish._prove

    def with_other_commits(config: Any, job: Any, *rest: Any) -> Any:
        record = job.record | {"commits": job.record["commits"] | {"model": "sha256:other"}}
        return real(config, replace(job, record=record), *rest)

    monkeypatch.setattr(finish, "_prove", with_other_commits)
    with pytest.raises(StoreError, match="prove nothing about its vectors"):
        run(checkpoint, texts, tmp_path / "second", **SECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["compaction", "proof", "promotion", "move", "removal", "report"])
def test_finalize_ends_when_another_job_takes_the_data_root(
    step: str, checkpoint: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, left = tmp_path / "out", {}
    for index in range(2):
        captured_only(checkpoint, texts, root, monkeypatch, **SECTIONS, shard={"index": index, "count": 2})

    def take() -> None:
        remove(root)
        run(other, texts, root, **SECTIONS)
        left.update(everything(root))

    at(step, monkeypatch, take)
    with pytest.raises(StoreError, match=TAKEN_AWAY + "|another dataset has replaced"):
        finalize(root)
    assert left and everything(root) == left
    verify(root)


def test_finalize_ends_when_another_job_has_started_by_then(
    checkpoint: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    captured_only(checkpoint, texts, root, monkeypatch, **SECTIONS)

    def take() -> None:
        remove(root)
        captured_only(other, texts, root, monkeypatch, **SECTIONS)

    at("finish", monkeypatch, take)
    with pytest.raises(TakenAwayError, match="no longer holds this job"):
        finalize(root)
    assert not (root / "manifest.json").exists() and Layout(root).shard_done(0, 1).exists()


@pytest.mark.slow
def test_a_shard_ends_when_its_data_root_is_taken(
    checkpoint: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    run(checkpoint, texts, root, **SECTIONS, shard={"index": 1, "count": 2})

    def take() -> None:
        remove(root)
        for index in range(2):
            captured_only(other, texts, root, monkeypatch, **SECTIONS, shard={"index": index, "count": 2})

    at("finish", monkeypatch, take)
    with pytest.raises(TakenAwayError, match=TAKEN_AWAY):
        run(checkpoint, texts, root, **SECTIONS, shard={"index": 0, "count": 2})
    assert finalize(root) == 0
    made = manifests.read(root)
    assert made["commits"]["model"] == made["proof"]["model_commit"] and made["proof"]["proven"] is True


@pytest.mark.slow
def test_a_job_in_another_process_ends_too(
    checkpoint: Path, other: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    root = tmp_path / "out"
    with Server(tmp_path) as server:
        child = server.start(settings(checkpoint, texts, root, **SECTIONS), held={"compaction": 1})
        assert child.reaches("compaction")
        remove(root)
        run(other, texts, root, **SECTIONS)
        left = everything(root)
        child.release("compaction")
        assert child.wait() == 1 and "TakenAwayError" in child.stderr
    assert everything(root) == left
    assert hashes(root) == hashes(undisturbed(model={"name": str(other)}, **SECTIONS))


def test_the_identity_of_a_job_is_drawn_once(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root, layout = tmp_path / "out", Layout(tmp_path / "out")
    stopped_after(1, checkpoint, texts, root, **SECTIONS, shard={"index": 0, "count": 2})
    first = json.loads(layout.job_file.read_text())["job_id"]
    stopped_after(1, checkpoint, texts, root, **SECTIONS, shard={"index": 1, "count": 2})
    stopped_after(1, checkpoint, texts, root, **SECTIONS, shard={"index": 0, "count": 2})
    assert json.loads(layout.job_file.read_text())["job_id"] == first
    stopped_after(1, checkpoint, texts, tmp_path / "second", **SECTIONS, shard={"index": 0, "count": 2})
    second = json.loads(Layout(tmp_path / "second").job_file.read_text())["job_id"]
    assert second != first and second.partition("-")[2] == first.partition("-")[2]


def test_a_lock_that_is_replaced_is_neither_removed_nor_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with pytest.raises(TakenAwayError, match="no longer the lock"), hold(path, "testing") as lock:
        lock.check()
        path.unlink()
        path.write_bytes(b"another")
        lock.check()
    assert path.read_bytes() == b"another" and not is_held(path)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_is_a_file_of_its_own(kind: str, tmp_path: Path) -> None:
    path, mine = tmp_path / "a.lock", tmp_path / "mine.txt"
    mine.write_bytes(b"mine")
    make: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(mine),
        "folder": lambda: (path / "content").mkdir(parents=True),
        "pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    with pytest.raises(StoreError, match=r"a\.lock .*remove it; in a data root, output\.overwrite=true"):
        hold(path, "testing").__enter__()
    assert not is_held(path) and holder(path) is None
    with hold(path, "testing", replace=True):
        assert is_held(path)
    assert mine.read_bytes() == b"mine" and not path.exists()


def test_a_lock_that_is_a_hard_link_is_replaced_unless_it_is_held(tmp_path: Path) -> None:
    path, mine = tmp_path / "a.lock", tmp_path / "mine.txt"
    mine.write_bytes(b"mine")
    path.hardlink_to(mine)
    with hold(path, "testing"):
        assert is_held(path) and not is_held(mine) and path.stat().st_nlink == 1
        (tmp_path / "copy").hardlink_to(path)
        for same in (path, tmp_path / "copy"):
            with pytest.raises(InUseError), hold(same, "testing", replace=True):
                pass
    assert mine.read_bytes() == b"mine" and not path.exists()
