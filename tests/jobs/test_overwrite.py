"""`output.overwrite=true` gets out of every state of the work folder; without it, an error names the file."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Stopped, captured_only, hashes, run
from support.steps import at
from support.surroundings import deepen

from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import InUseError, hold

SECTIONS: dict[str, Any] = {"inference": {"batch_size": 4, "lookahead": 10}, "capture": {"layers": [1]}}


def replace(path: Path, make: Callable[[Path], object]) -> None:
    """Puts something else in the place of `path`."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "content").write_text("mine", encoding="utf-8")


def link(path: Path) -> None:
    """Makes a link to a folder of the user with a file of this name."""
    target = path.parents[len(path.parts) - path.parts.index(".qk_sniffer")] / "user"
    target.mkdir(exist_ok=True)
    for name in (path.name, "manifest.json"):
        (target / name).write_text("mine", encoding="utf-8")
    path.symlink_to(target)


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff{")


def without(key: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.write_text(json.dumps({name: value for name, value in RECORD.items() if name != key}), encoding="utf-8")

    return make


RECORD: dict[str, Any] = {}
"""The record of the captured job, which a test fills in."""


def of_other_settings(path: Path) -> None:
    record = RECORD | {"job_id": RECORD["job_id"][:-4] + "0000"}
    path.write_text(json.dumps(record), encoding="utf-8")


def segment(layout: Layout) -> Path:
    return next(iter(sorted(layout.journal(0, 1).glob("*.safetensors"))), layout.journal(0, 1) / "0.safetensors")


def staged(layout: Layout, content: Callable[[Path], object]) -> None:
    layout.staging.root.mkdir()
    content(layout.staging.manifest)


STATES: dict[str, Callable[[Layout], object]] = {
    "job.json is garbage": lambda layout: replace(layout.job_file, garbage),
    "job.json is empty": lambda layout: replace(layout.job_file, Path.touch),
    "job.json is a folder": lambda layout: replace(layout.job_file, folder),
    "job.json is a link": lambda layout: replace(layout.job_file, link),
    "job.json has no job_id": lambda layout: replace(layout.job_file, without("job_id")),
    "job.json has no config": lambda layout: replace(layout.job_file, without("config")),
    "job.json has the job_id of other settings": lambda layout: replace(layout.job_file, of_other_settings),
    "journal is a file": lambda layout: replace(layout.journal_folder, garbage),
    "journal is a link": lambda layout: replace(layout.journal_folder, link),
    "shard-00000-of-00001 is a file": lambda layout: replace(layout.journal(0, 1), garbage),
    "safetensors is a folder": lambda layout: replace(segment(layout), folder),
    "safetensors is a link": lambda layout: replace(segment(layout), link),
    "shard-00000-of-00001.done is garbage": lambda layout: replace(layout.shard_done(0, 1), garbage),
    "shard-00000-of-00001.done is a folder": lambda layout: replace(layout.shard_done(0, 1), folder),
    "shard-00000-of-00001.progress is a folder": lambda layout: replace(layout.progress(0, 1), folder),
    "shard-00000-of-00001.lock is a folder": lambda layout: replace(layout.shard_lock(0, 1), folder),
    "shard-00000-of-00001.lock is a link": lambda layout: replace(layout.shard_lock(0, 1), link),
    "finalize.lock is a pipe": lambda layout: replace(layout.finalize_lock, os.mkfifo),
    "start.lock is a folder": lambda layout: replace(layout.start_lock, folder),
    "staging is a link": lambda layout: replace(layout.staging.root, link),
    "staging is a file": lambda layout: replace(layout.staging.root, garbage),
    "manifest.json is garbage": lambda layout: staged(layout, garbage),
    "manifest.json is a folder": lambda layout: staged(layout, folder),
    ".qk_sniffer is a file": lambda layout: replace(layout.work, garbage),
    ".qk_sniffer is a link": lambda layout: replace(layout.work, link),
}
"""Ways to put the work folder of a captured job into another state. The first word is in the error's file name."""


@pytest.fixture(scope="module")
def captured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a captured job without a dataset, its texts next to it."""
    from support.jobs import write_texts

    here = tmp_path_factory.mktemp("captured")
    texts = write_texts(here / "texts.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        captured_only(checkpoint, texts, here / "out", patch, **SECTIONS)
    RECORD.update(json.loads(Layout(here / "out").job_file.read_text(encoding="utf-8")))
    return here


def user_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "user").glob("*")}


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_is_not_a_jobs_is_an_error_that_names_the_file_and_the_way_out(
    state: str, captured: Path, checkpoint: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    STATES[state](Layout(root))
    before = user_files(tmp_path)
    with pytest.raises(StoreError, match=rf"{state.split()[0]}.* output\.overwrite=true"):
        run(checkpoint, captured / "texts.jsonl", root, **SECTIONS)
    if state.split()[0] not in ("shard-00000-of-00001.lock", "start.lock"):  # `finalize` needs no such lock
        with pytest.raises(StoreError, match=rf"{state.split()[0]}.* output\.overwrite=true"):
            finalize(root)
    assert user_files(tmp_path) == before
    assert not (root / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_overwriting_gets_out_of_it(
    state: str, captured: Path, checkpoint: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    STATES[state](Layout(root))
    before = user_files(tmp_path)
    run(checkpoint, captured / "texts.jsonl", root, **SECTIONS, output={"overwrite": True})
    whole = undisturbed(**SECTIONS)
    assert hashes(root) == hashes(whole) and not Layout(root).work.exists()
    assert manifests.read(root) | {"timings": {}} == manifests.read(whole) | {"timings": {}}
    assert user_files(tmp_path) == before


def test_overwriting_resumes_what_can_be_used(
    captured: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    for state in ("staging is a file", "finalize.lock is a pipe", "start.lock is a folder"):
        STATES[state](Layout(root))
    monkeypatch.setattr("qk_sniffer.capture.capture.Capture.run", None)  # nothing is captured a second time
    run(checkpoint, captured / "texts.jsonl", root, **SECTIONS, output={"overwrite": True})
    assert manifests.read(root)["examples"] == 24


@pytest.mark.slow
def test_the_old_dataset_stays_until_the_new_one_is_whole(
    captured: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = captured / "texts.jsonl"
    root = run(checkpoint, texts, tmp_path / "out", **SECTIONS, dataset={"max_samples": 5})
    before = hashes(root)
    shutil.copytree(captured / "out" / ".qk_sniffer", root / ".qk_sniffer")
    for state in ("job.json is garbage", "finalize.lock is a pipe", "manifest.json is garbage"):
        STATES[state](Layout(root))

    def fail(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("qk_sniffer.jobs.finish.promote", fail)
        run(checkpoint, texts, root, **SECTIONS, output={"overwrite": True})
    assert {name: hashes(root)[name] for name in before} == before and manifests.read(root)["examples"] == 5
    run(checkpoint, texts, root, **SECTIONS, output={"overwrite": True})
    assert manifests.read(root)["examples"] == 24


def test_overwriting_respects_the_lock_of_a_running_job(captured: Path, checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    STATES["job.json is garbage"](Layout(root))
    with hold(Layout(root).shard_lock(1, 2), "capturing"), pytest.raises(InUseError, match="in use"):
        run(checkpoint, captured / "texts.jsonl", root, **SECTIONS, output={"overwrite": True})
    assert segment(Layout(root)).is_file()


def test_overwriting_respects_the_lock_of_a_job_whose_folder_was_copied_with_hard_links(
    captured: Path, checkpoint: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    for count in (1, 2):  # its own, and that of another shard
        path = Layout(root).shard_lock(count - 1, count)
        STATES["job.json is garbage"](Layout(root))
        with hold(path, "capturing") as lock:
            (tmp_path / f"backup-{count}").hardlink_to(path)
            with pytest.raises(InUseError, match="in use"):
                run(checkpoint, captured / "texts.jsonl", root, **SECTIONS, output={"overwrite": True})
            lock.check()
    assert segment(Layout(root)).is_file()


@pytest.mark.slow
def test_overwriting_finishes_or_redoes_an_interrupted_promotion(
    captured: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    root, texts = Path(shutil.copytree(captured / "out", tmp_path / "out")), captured / "texts.jsonl"

    def fail(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("qk_sniffer.store.promote._move", fail)
        run(checkpoint, texts, root, **SECTIONS)
    (lost,) = list(Layout(root).staging.root.glob("l01h00q/data.parquet"))
    lost.unlink()
    with pytest.raises(StoreError, match=r"l01h00q/data\.parquet is missing from the version .*overwrite=true"):
        run(checkpoint, texts, root, **SECTIONS)
    run(checkpoint, texts, root, **SECTIONS, output={"overwrite": True})
    assert hashes(root) == hashes(undisturbed(**SECTIONS))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["manifest.json", "README.md", "l01h00q/data.parquet", "examples/data.parquet"])
@pytest.mark.parametrize("make", [folder, garbage, link])
def test_what_no_manifest_lists_is_neither_replaced_nor_removed(
    name: str, make: Callable[[Path], object], captured: Path, checkpoint: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    (root / name).parent.mkdir(exist_ok=True)
    if make is link:
        (tmp_path / "user").write_text("mine", encoding="utf-8")
        (root / name).symlink_to(tmp_path / "user")
    else:
        make(root / name)
    before = everything(tmp_path)
    problem = rf"out holds {re.escape(name)}, which no dataset of qk-sniffer there lists"
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=problem):
            run(checkpoint, captured / "texts.jsonl", root, **SECTIONS, output={"overwrite": overwrite})
    with pytest.raises(StoreError, match=problem):
        finalize(root)
    assert everything(tmp_path) == before


def everything(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder, without the work folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".qk_sniffer" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_damaged_dataset_is_replaced_as_far_as_its_manifest_lists_it(
    captured: Path, checkpoint: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    root, texts = tmp_path / "out", captured / "texts.jsonl"
    run(checkpoint, texts, root, **SECTIONS | {"capture": {"layers": [0, 1]}}, dataset={"max_samples": 5})
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    (root / "manifest.json").write_text(json.dumps(manifest | {"proof": "of nothing"}), encoding="utf-8")
    (root / "l00h00q" / "notes.txt").write_text("mine", encoding="utf-8")
    run(checkpoint, texts, root, **SECTIONS, output={"overwrite": True})
    assert hashes(root).keys() - {"l00h00q/notes.txt"} == hashes(undisturbed(**SECTIONS)).keys()


def test_a_file_that_appears_while_the_job_runs_is_not_replaced(
    captured: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    at("promotion", monkeypatch, lambda: garbage(root / "README.md"))
    with pytest.raises(StoreError, match=r"out/README\.md is of no dataset .* move it away.* Then rerun the command"):
        run(checkpoint, captured / "texts.jsonl", root, **SECTIONS)
    assert (root / "README.md").read_bytes() == b"\xff{"
    (root / "README.md").unlink()
    monkeypatch.setattr("qk_sniffer.capture.capture.Capture.run", None)  # nothing is captured a second time
    run(checkpoint, captured / "texts.jsonl", root, **SECTIONS)
    assert manifests.read(root)["examples"] == 24


@pytest.mark.slow
def test_deep_folders_are_replaced(captured: Path, checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    layout = Layout(root)
    deepen(layout.journal(0, 1) / "x", 1100)
    deepen(layout.staging.head_file(0, 0, "q"), 1100)
    run(checkpoint, captured / "texts.jsonl", root, **SECTIONS, output={"overwrite": True})
    assert not layout.work.exists()


def test_pictures_that_the_job_has_not_drawn_stay(
    captured: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(captured / "out", tmp_path / "out"))
    (root / "pictures").mkdir()
    (root / "pictures" / "by_head.png").write_bytes(b"tEXtSoftware\0qk-sniffer")
    for name in ("mine.png", "notes.txt"):
        (root / "pictures" / name).write_text("mine")
    run(checkpoint, captured / "texts.jsonl", root, **SECTIONS)
    assert {path.name for path in (root / "pictures").iterdir()} == {"mine.png", "notes.txt"}
    assert "nothing tells that qk-sniffer has drawn pictures/mine.png, which therefore stay" in caplog.text
