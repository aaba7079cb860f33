"""Tests that no program writes, replaces or removes anything outside of its folders, whatever it finds in them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO
from support.jobs import captured_only, run
from support.plasticity_cases import measure
from support.surroundings import unchanged
from support.verify_cases import edit

from qk_sniffer.dataset.reader import open_dataset
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout

ONE_HEAD: dict[str, Any] = {"capture": {"layers": [0], "heads": [0]}}


@pytest.fixture
def around(tmp_path: Path, root: Path) -> Path:
    """A folder with files of the user, two levels above a dataset."""
    (tmp_path / "below").mkdir()
    root.rename(tmp_path / "below" / "root")
    (tmp_path / ".bashrc").write_text("mine", encoding="utf-8")
    (tmp_path / "user").mkdir()
    for name in ("data.parquet", "by_head.png", "job.json"):
        (tmp_path / "user" / name).write_text("mine", encoding="utf-8")
    return tmp_path


def stage(root: Path, name: str) -> None:
    """Stages a version of the dataset that lists a file of another name."""
    staging = Layout(root).staging
    staging.root.mkdir(parents=True)
    manifest = manifests.read(root)
    manifest["files"][name] = {"bytes": 4, "sha256": "0" * 64}
    (staging.root / Path(name).name).write_text("evil", encoding="utf-8")
    staging.manifest.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("name", ["../../.bashrc", "{around}/.bashrc", "l00h00q/../../../.bashrc"])
def test_a_staged_manifest_names_no_file_outside(name: str, around: Path, checkpoint: Path, texts: Path) -> None:
    root = around / "below" / "root"
    stage(root, name.format(around=around))
    with unchanged(around, root):
        with pytest.raises(StoreError, match="is not the name of a dataset's file"):
            finalize(root)
        with pytest.raises(StoreError, match="is not the name of a dataset's file"):
            run(checkpoint, texts, root, **ONE_HEAD)
        if name.startswith("../.."):
            run(checkpoint, texts, root, **ONE_HEAD, output={"overwrite": True})
            assert manifests.read(root)["examples"] == 24


def link_head(root: Path, user: Path) -> None:
    shutil.rmtree(root / "l00h00q")
    (root / "l00h00q").symlink_to(user)


def link_examples(root: Path, user: Path) -> None:
    shutil.rmtree(root / "examples")
    (root / "examples").symlink_to(user)


@pytest.mark.parametrize("link", [link_head, link_examples])
def test_a_dataset_is_not_written_through_a_link(
    link: Callable[[Path, Path], None], around: Path, checkpoint: Path, texts: Path
) -> None:
    root = around / "below" / "root"
    link(root, around / "user")
    before = (root / "manifest.json").read_bytes()
    with unchanged(around, root), pytest.raises(StoreError, match="is not written through it; remove it"):
        run(checkpoint, texts, root, **ONE_HEAD, output={"overwrite": True})
    assert (root / "manifest.json").read_bytes() == before, "the old version stays"


def test_old_heads_are_removed_and_not_the_files_that_links_name(around: Path, checkpoint: Path, texts: Path) -> None:
    root = around / "below" / "root"
    shutil.rmtree(root / "l01h00q")
    (root / "l01h00q").symlink_to(around / "user")
    for path in (root / "l01h01q/data.parquet", root / "README.md"):
        path.unlink()
        path.symlink_to(around / "user" / "data.parquet")
    (root / "pictures").symlink_to(around / "user")
    with unchanged(around, root):
        run(checkpoint, texts, root, **ONE_HEAD, output={"overwrite": True})
    assert (root / "l01h00q").is_symlink() and not (root / "l01h01q").exists() and not (root / "README.md").is_symlink()


@pytest.mark.parametrize("name", [".work", "pictures"])
def test_results_are_not_written_through_a_link(name: str, around: Path) -> None:
    results = around / "results"
    results.mkdir()
    (results / "plasticity.json").write_text('{"format": "qk-sniffer-plasticity/1"}', encoding="utf-8")
    (results / name).symlink_to(around / "user")
    with (
        unchanged(around),
        pytest.raises(StoreError, match=f"{name} is a link, and results are not written through it"),
    ):
        measure(around / "below" / "root", results, pictures=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].update({"../../.bashrc": {"bytes": 4, "sha256": "0" * 64}}),
        lambda manifest: manifest["config"]["model"].update(name="${oc.env:HF_TOKEN}"),
        lambda manifest: manifest.update(source_rows=10**9),
    ],
)
def test_a_hostile_branch_writes_nothing_outside(
    change: Callable[[dict[str, Any]], object],
    around: Path,
    checkpoint: Path,
    texts: Path,
    hub: FakeHub,
    endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    theirs, root = around / "below" / "root", around / "below" / "new"
    edit(theirs, change)
    files = {path.relative_to(theirs).as_posix(): path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    hub.commit(REPO, files, BRANCH)
    output = {"hf_repo_id": REPO, "hf_branch": BRANCH, "resume_from_hub": True}
    with unchanged(around, root, around / "hub", around / "below"), pytest.raises(QkSnifferError) as error:
        run(checkpoint, texts, root, **ONE_HEAD, output=output)
    assert "hf_alice" not in str(error.value) + caplog.text
    assert not root.exists()


def test_a_snapshot_of_another_branch_is_not_believed(
    around: Path, checkpoint: Path, texts: Path, hub: FakeHub, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    root = around / "below" / "new"
    output = {"hf_repo_id": REPO, "hf_branch": BRANCH, "resume_from_hub": True}
    run(checkpoint, texts, root, **ONE_HEAD, output=output)
    snapshot = Layout(root).snapshot
    right = snapshot.read_bytes()
    for key, value in (("repo_id", "bob/x"), ("commit", "../../x"), ("branch", "../x")):
        snapshot.write_text(json.dumps(json.loads(right) | {key: value}), encoding="utf-8")
        with unchanged(around, root, around / "hub"):
            run(checkpoint, texts, root, **ONE_HEAD, output=output)
        assert json.loads(snapshot.read_bytes()) == json.loads(right)
    assert set(hub.repositories) == {REPO}


@pytest.mark.parametrize("reader", [open_dataset, verify, finalize])
def test_a_work_folder_that_is_a_link_is_not_followed(
    reader: Callable[[Path], Any],
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine, received = tmp_path / "mine", tmp_path / "received"
    captured_only(checkpoint, texts, mine, monkeypatch, **ONE_HEAD)
    received.mkdir()
    (received / ".qk_sniffer").symlink_to(mine / ".qk_sniffer")
    opened: list[str] = []
    inside = {str(path) for path in (mine / ".qk_sniffer").rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "open", noting_files(os.open, opened))
    said = ""
    with unchanged(tmp_path):
        try:
            said = str(reader(received))
        except QkSnifferError as error:
            said = str(error)
    assert inside and not inside & {*opened}
    assert "captured from Python" not in said and "24 examples" not in said + capsys.readouterr().out


def noting_files(real: Callable[..., int], opened: list[str]) -> Callable[..., int]:
    """Returns `os.open`, which notes the real path of each file that it opens."""

    def noting(*args: Any, **options: Any) -> int:
        descriptor = real(*args, **options)
        opened.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        return descriptor

    return noting
