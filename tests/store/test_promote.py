"""Tests promotion, where a crash at any moment leaves the old or the new dataset, and the locks of the data root."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rights import without_root
from support.store_cases import (
    HEADS,
    SAMPLER,
    Captured,
    Piece,
    captured_journal,
    file_bytes,
    job_facts,
    make_dataset,
    put,
)

from qk_sniffer.errors import StoreError
from qk_sniffer.store import disk, manifest, promote, stored, work_folder
from qk_sniffer.store.compact import compact
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Head, HeadKey, Layout, head_name, parse_head_name
from qk_sniffer.store.locks import Holder, TakenAwayError, hold, holder, restart_patience_s
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import Checked
from qk_sniffer.store.work_folder import discard_work, prepare_data_root, remove_leftovers


def test_names() -> None:
    layout = Layout(Path("/data"))
    assert head_name(0, 0, "q") == "l00h00q" and head_name(101, 7, "k") == "l101h07k"
    assert str(layout.head_file(3, 12, "k")) == "/data/l03h12k/data.parquet"
    assert parse_head_name("l101h07k") == HeadKey(101, 7, "k")
    assert parse_head_name("l00h00v") == HeadKey(0, 0, "v") and parse_head_name("l00h00o") == HeadKey(0, 0, "o")
    for name in ("l0h00q", "l00h00x", "l00h00q.bak", "l001h00q", "examples"):
        assert parse_head_name(name) is None
    assert str(layout.journal(3, 8)) == "/data/.qk_sniffer/journal/shard-00003-of-00008"


def test_a_dataset_is_whole(tmp_path: Path) -> None:
    layout, written = make_dataset(tmp_path, Captured())
    found = manifest.read(tmp_path)
    assert not layout.work.exists()
    assert set(found["files"]) | {"manifest.json"} == set(file_bytes(tmp_path))
    for name, entry in found["files"].items():
        data = (tmp_path / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert found["rows"] == written.rows == sum(sum(rows.values()) for rows in found["rows_by_bucket"].values())
    assert found["examples"] == 12 and found["tokens"] == sum(Captured().length(index) for index in range(12))


def test_equal_datasets_are_equal_files(tmp_path: Path) -> None:
    make_dataset(tmp_path / "one", Captured(batch=5), threads=2)
    make_dataset(tmp_path / "two", Captured(batch=2))
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "two")


def test_a_root_without_manifest_is_incomplete(tmp_path: Path) -> None:
    prepare_data_root(tmp_path)
    with pytest.raises(StoreError, match=r"incomplete: no manifest\.json.*rerun the command"):
        manifest.read(tmp_path)
    with pytest.raises(StoreError, match="no such folder"):
        manifest.read(tmp_path / "none")
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="not a manifest of qk-sniffer"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        manifest.read(tmp_path)


class Crash(BaseException):
    pass


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ends the program at the `steps`-th change to the names of files."""
    left = steps

    def counted(method: str) -> None:
        original = getattr(os, method)

        def step(*args: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return original(*args, **options)

        monkeypatch.setattr(os, method, step)

    for method in ("rename", "replace", "unlink", "rmdir"):
        counted(method)


@pytest.mark.slow
def test_a_crash_anywhere_leaves_the_old_dataset_or_one_that_is_finished(tmp_path: Path) -> None:
    old, new = Captured(num_examples=4), Captured()
    heads = [head for head in HEADS if head.layer == 0]
    start, _ = make_dataset(tmp_path / "start", old)
    prepare_data_root(start.root)
    journal = captured_journal(start.journal(0, 1), new)
    before = file_bytes(start.root)
    written = compact(start, [journal], heads, SAMPLER)
    card = b"# new card\n"
    built = manifest.with_files(manifest.build(job_facts(), written), {"README.md": FileEntry.of(card)})
    crashes = 0
    for step in range(100):
        root = tmp_path / f"root{step}"
        shutil.copytree(start.root, root)
        layout = Layout(root)
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_after(monkeypatch, step)
            try:
                promote.promote(layout, built, card=card)
            except Crash:
                crashes += 1
        whole = layout.staging.manifest.exists()
        if layout.manifest.exists():  # a reader sees a dataset: the old one or the new one, with all its files
            seen = manifest.read(root)
            assert seen == built or (file_bytes(root) == before and list(layout.journals()))
            assert all((root / name).exists() for name in seen["files"])
        assert promote.finish_promotion(layout) == whole
        if whole or layout.manifest.read_bytes() != before["manifest.json"]:
            assert manifest.read(root) == built
            remove_leftovers(layout, layout.shard_lock(0, 1))  # as the next start does, if the staging is half removed
            assert set(file_bytes(root)) == {*built["files"], "manifest.json"}
            assert not layout.work.exists()
        if crashes == step:
            break
    assert crashes > 20


def test_compaction_does_not_touch_a_staged_version(tmp_path: Path) -> None:
    layout = prepare_data_root(tmp_path)
    journal = captured_journal(layout.journal(0, 1), Captured())
    written = compact(layout, [journal], HEADS, SAMPLER)
    built = manifest.build(job_facts(), written)
    manifest.write(layout.staging, built | {"sha256": stored.digest(built)})
    with pytest.raises(StoreError, match="staged version that is not promoted yet"):
        compact(layout, [journal], HEADS, SAMPLER)
    assert promote.finish_promotion(layout)
    assert manifest.read(tmp_path)["examples"] == 12


def staged_version(layout: Layout, heads: Sequence[Head] = HEADS) -> dict[str, Any]:
    """Stages a version with some heads; returns its manifest."""
    prepare_data_root(layout.root)
    written = compact(layout, [captured_journal(layout.journal(0, 1), Captured())], heads, SAMPLER)
    return manifest.build(job_facts(), written)


def test_only_what_the_old_manifest_lists_is_removed(tmp_path: Path) -> None:
    layout, _ = make_dataset(tmp_path, Captured(num_examples=4))
    built = staged_version(layout, [head for head in HEADS if head.layer == 0])
    mine = {"l03h00q/notes.txt", "pictures/mine.png", "pictures/mine.svg", "notes.txt", "manifest.json.tmp"}
    drawn = {"pictures/norms.png": b"\x89PNG\r\n\x1a\n...tEXtSoftware\0qk-sniffer...", "pictures/norms.svg": b""}
    drawn["pictures/norms.svg"] = b"<svg><dc:title>qk-sniffer</dc:title>"
    for name in (*mine, *drawn):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(drawn.get(name, b"the user's"))
    promote.promote(layout, built, card=b"# new\n")
    assert {*file_bytes(tmp_path)} == {*built["files"], "README.md", "manifest.json", *mine}
    assert {(tmp_path / name).read_bytes() for name in mine} == {b"the user's"}
    assert not (tmp_path / "l03h01q").exists()


@pytest.mark.parametrize("name", ["README.md", "manifest.json", "l00h00q/data.parquet", "examples/data.parquet"])
def test_a_file_that_no_manifest_lists_is_not_replaced(name: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    built = staged_version(layout)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"the user's")
    with pytest.raises(StoreError, match=rf"{tmp_path / name} is of no dataset .* move it away.* Then rerun"):
        promote.promote(layout, built, card=b"# new\n")
    with pytest.raises(StoreError, match="move it away"):
        promote.finish_promotion(layout)
    assert file_bytes(tmp_path) == {name: b"the user's"}
    (tmp_path / name).unlink()
    assert promote.finish_promotion(layout)
    assert {*file_bytes(tmp_path)} == {*built["files"], "README.md", "manifest.json"}


def test_what_an_interrupted_promotion_moved_is_removed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = make_dataset(tmp_path, Captured(num_examples=4))
    built = staged_version(layout, [head for head in HEADS if head.layer == 0])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(promote, "_remove_others", lambda *_: (_ for _ in ()).throw(Crash))
        promote.promote(layout, built, card=b"# new\n")
    assert not layout.manifest.exists() and layout.head_file(3, 0, "q").exists()
    (tmp_path / "l00h00q" / "data.parquet").write_bytes(b"the user's")
    with pytest.raises(StoreError, match=r"l00h00q/data\.parquet is missing .*, or has changed"):
        promote.finish_promotion(layout)
    with hold(layout.finalize_lock, "testing") as lock:
        promote.abandon_promotion(layout, lock)
    assert file_bytes(tmp_path) == {"l00h00q/data.parquet": b"the user's"} and not layout.staging.root.exists()


@pytest.mark.few(3)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", ["README.md", "l03h01q/data.parquet", "statistics/layer-09.safetensors"])
def test_a_work_folder_of_someone_else_replaces_and_removes_no_file(name: str, listed: bool, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    built = staged_version(layout, [head for head in HEADS if head.layer == 0])
    names = (name, "pictures/plot.png")
    claimed = {each: None if listed else hashlib.sha256(b"a guess").hexdigest() for each in names}
    planted = manifest.with_files(built, {"README.md": FileEntry.of(b"# new\n")}) | {"replaces": claimed}
    (layout.staging.root / "README.md").write_bytes(b"# new\n")
    manifest.write(layout.staging, planted | {"sha256": stored.digest(planted)})
    for each in names:
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_bytes(b"the user's")
    with pytest.raises(StoreError, match=rf"{tmp_path / name} is of no dataset .* move it away.* Then rerun"):
        promote.finish_promotion(layout)
    assert file_bytes(tmp_path) == dict.fromkeys(names, b"the user's")
    with hold(layout.finalize_lock, "testing") as lock:
        promote.abandon_promotion(layout, lock)
    assert file_bytes(tmp_path) == dict.fromkeys(names, b"the user's") and not layout.staging.root.exists()


def test_a_file_that_changes_while_a_promotion_is_interrupted_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = make_dataset(tmp_path, Captured(num_examples=4))
    built = staged_version(layout, [head for head in HEADS if head.layer == 0])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(promote, "_remove_others", lambda *_: (_ for _ in ()).throw(Crash))
        promote.promote(layout, built, card=b"# new\n")
    mine = layout.head_file(3, 0, "q")
    before = mine.read_bytes()
    mine.write_bytes(b"the user's")
    with pytest.raises(StoreError, match=rf"{mine} is of no dataset"):
        promote.finish_promotion(layout)
    mine.write_bytes(before)
    assert promote.finish_promotion(layout)
    assert {*file_bytes(tmp_path)} == {*built["files"], "README.md", "manifest.json"}


def test_preparing_creates_the_folder(tmp_path: Path) -> None:
    assert prepare_data_root(tmp_path / "a" / "b").root.is_dir()
    prepare_data_root(tmp_path / "a" / "b")


def test_two_shards_prepare_a_root_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = work_folder.is_ours

    def other_comes(layout: Layout) -> bool:
        answer = real(layout)
        layout.work.mkdir(exist_ok=True)
        return answer

    monkeypatch.setattr(work_folder, "is_ours", other_comes)
    assert prepare_data_root(tmp_path).work.is_dir()


def test_a_root_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"not empty.*thesis\.tex.*output\.data_root"):
        prepare_data_root(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        prepare_data_root(tmp_path / "thesis.tex")
    with pytest.raises(StoreError, match="cannot write"):
        prepare_data_root(tmp_path / "thesis.tex" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="not empty"):
        prepare_data_root(tmp_path)


def test_a_root_that_cannot_be_written_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        with without_root(), pytest.raises(StoreError, match=r"cannot write.*Permission denied"):
            prepare_data_root(Path(folder))


def test_work_is_discarded_but_nothing_else(tmp_path: Path) -> None:
    layout, _ = make_dataset(tmp_path, Captured())
    prepare_data_root(tmp_path)
    captured_journal(layout.journal(0, 1), Captured())
    layout.job_file.write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    before = {name: data for name, data in file_bytes(tmp_path).items() if ".qk_sniffer" not in name}
    own = layout.shard_lock(0, 1)
    with hold(own, "capturing"), hold(layout.start_lock, "starting"):
        discard_work(layout, own)
        assert not layout.journals() and not layout.job_file.exists()
    assert {name: data for name, data in file_bytes(tmp_path).items() if ".qk_sniffer" not in name} == before


def test_a_lock_is_released_on_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a sweep in one process: the disk could not be unmounted, and no later job would get the lock."""
    path = Layout(tmp_path).finalize_lock
    before = {*Path("/proc/self/fd").iterdir()}

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "the disk fails")

    with pytest.raises(OSError, match="the disk fails"), monkeypatch.context() as failing, hold(path, "finalizing"):
        failing.setattr(type(Path()), "stat", fails)
    assert {*Path("/proc/self/fd").iterdir()} == before
    with hold(path, "finalizing") as lock:
        lock.check()


def test_a_held_lock_names_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = prepare_data_root(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from qk_sniffer.store.locks import hold\n"
        "with hold(Path(sys.argv[1]), 'test'): print('held', flush=True); time.sleep(60)"
    )
    lock = layout.shard_lock(0, 1)
    environment = os.environ | {"SLURM_JOB_ID": "4711"}
    other = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(StoreError, match=rf"process {other.pid} on .*SLURM job 4711 is capturing"),
            hold(lock, "capturing"),
        ):
            pass
        with pytest.raises(StoreError, match="4711"):
            discard_work(layout, layout.shard_lock(1, 2))
        with hold(layout.shard_lock(1, 2), "another shard"):
            pass
    finally:
        other.kill()
        other.communicate()
    assert lock.exists()
    with hold(lock, "capturing"):  # a dead holder does not block it
        assert holder(lock) == Holder.me()
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(StoreError, match=str(os.getpid())), hold(lock, "again"):
            pass
        second = subprocess.run([sys.executable, "-c", code, lock], capture_output=True, text=True, timeout=30)
        assert "is in use" in second.stderr
    assert not lock.exists()


def test_a_second_lock_is_taken_in_the_folder_of_the_first(tmp_path: Path) -> None:
    layout, user, moved = Layout(tmp_path / "root"), tmp_path / "user", tmp_path / "moved"
    layout.root.mkdir()
    user.mkdir()

    def replace() -> None:
        if not moved.exists():
            layout.root.rename(moved)
            layout.root.mkdir()
            layout.work.symlink_to(user)

    with hold(layout.shard_lock(0, 1), "capturing") as lock:
        with hold(layout.finalize_lock, "testing", access=lock):
            assert layout.finalize_lock.exists()
        access = Checked(lock, replace)  # replaces the data root just after the first check
        with pytest.raises(TakenAwayError), hold(layout.finalize_lock, "testing", access=access):
            pass
        with pytest.raises(TakenAwayError), hold(layout.start_lock, "testing", access=lock):
            pass
    assert [*user.iterdir()] == []


@pytest.mark.parametrize("part", ["root", "root/.qk_sniffer"])
def test_a_lock_in_a_copy_of_its_folder_with_hard_links_is_lost(part: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "root")
    layout.root.mkdir()
    with hold(layout.shard_lock(0, 1), "capturing") as lock:
        shutil.copytree(tmp_path / part, tmp_path / "copy", copy_function=os.link)
        lock.check()
        (tmp_path / part).rename(tmp_path / "moved")
        (tmp_path / "copy").rename(tmp_path / part)
        with pytest.raises(TakenAwayError):
            lock.check()
        with pytest.raises(TakenAwayError), hold(layout.finalize_lock, "testing", access=lock):
            pass


def test_leftover_locks_with_hard_links_are_removed_from_their_folder_alone(tmp_path: Path) -> None:
    layout = prepare_data_root(tmp_path / "root")
    for path in (layout.shard_lock(1, 2), layout.finalize_lock):
        path.touch()
        os.link(path, tmp_path / path.name)
    with hold(layout.shard_lock(0, 1), "capturing") as lock:
        remove_leftovers(layout, lock.path, lock)
        assert layout.locks() == [lock.path]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finalize.lock", "root", layout.shard_lock(1, 2).name]


def test_a_lock_whose_folder_moved_to_another_root_is_lost(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "root")
    layout.root.mkdir()
    with hold(layout.shard_lock(0, 1), "capturing") as lock:
        layout.root.rename(tmp_path / "moved")
        layout.root.mkdir()
        (tmp_path / "moved" / layout.work.name).rename(layout.work)
        with pytest.raises(TakenAwayError):
            lock.check()


@pytest.mark.slow
def test_a_forked_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    lock = Layout(tmp_path).shard_lock(0, 1)
    code = (
        "import os, sys, time; from pathlib import Path; from qk_sniffer.store.locks import hold\n"
        "with hold(Path(sys.argv[1]), 'test'):\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(1); print(os.getpid(), flush=True); time.sleep(60)\n"
        "    time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        with pytest.raises(StoreError, match="in use"), hold(lock, "test"):
            pass
        parent.kill()
        parent.wait()
        with hold(lock, "test"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.slow
def test_only_one_holds_a_lock_whose_file_comes_and_goes(tmp_path: Path) -> None:
    lock, inside, held = Layout(tmp_path).finalize_lock, [0], [0]
    end = time.monotonic() + 1

    def job() -> None:
        while (now := time.monotonic()) < end or (held[0] <= 50 and now < end + 30):  # longer on a busy machine
            with suppress(StoreError), hold(lock, "test"):
                inside[0] += 1
                time.sleep(0.001)
                assert inside[0] == 1
                held[0] += 1
                inside[0] -= 1

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(job) for _ in range(6)]:
            future.result()
    assert held[0] > 50


def test_a_job_that_slurm_restarts_waits_for_the_lock_of_its_previous_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert restart_patience_s() == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert restart_patience_s() > 90
    with ExitStack() as last_run:
        last_run.enter_context(hold(tmp_path / "work" / "a.lock", "capturing"))
        threading.Timer(0.3, last_run.close).start()
        with hold(tmp_path / "work" / "a.lock", "capturing", wait_s=restart_patience_s()):
            pass


def test_locks_leave_no_empty_work_folder(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with hold(layout.finalize_lock, "finalising"):
        assert layout.finalize_lock.exists()
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_an_error_with_both_figures(tmp_path: Path) -> None:
    disk.ensure_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(StoreError, match=r"about 1,000,000,000\.0 GB are needed.* [\d,.]+ GB are free\. Or none$"):
        disk.ensure_space(tmp_path / "not" / "there", 10**18, way_out="Or none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_estimate_covers_a_real_dataset(tmp_path: Path, dtype: torch.dtype) -> None:
    count, layout = 20_000, Layout(tmp_path)
    journal = Journal(layout.journal(0, 1))
    with JournalWriter(journal, queue_bytes=1 << 30, segment_bytes=1 << 20) as writer:
        vectors = torch.randn(2, count, 128).to(dtype)
        put(writer, Piece.of(0, "q", vectors, np.zeros(count, np.int32), np.arange(count)))
        writer.complete([Captured().record(0)])
    compact(layout, [journal], [Head(0, head, "q", 0, 128, None, head) for head in range(2)], SAMPLER)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert used < disk.required_bytes(2 * count, 128, dtype.itemsize) < 1.3 * used
