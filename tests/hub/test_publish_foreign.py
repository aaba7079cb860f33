"""Tests that a publication sends only the files of its dataset, each of which is the one that the manifest lists."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, MakeDataset, contents, held, publish, published
from support.verify_cases import edit

from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.finalize import finalize

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("waits")]

SECRET = b"a key of the publisher"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file next to the dataset."""
    path = tmp_path / "id_rsa.png"
    path.write_bytes(SECRET)
    return path


def entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def link_head_folder(root: Path, secret: Path) -> None:
    folder = secret.parent / "other"
    (root / "l00h00q").rename(folder)
    (root / "l00h00q").symlink_to(folder)


def link_head_file(root: Path, secret: Path) -> None:
    secret.write_bytes((root / "l00h00q/data.parquet").read_bytes())
    (root / "l00h00q/data.parquet").unlink()
    (root / "l00h00q/data.parquet").symlink_to(secret)


def link_picture(root: Path, secret: Path) -> None:
    (root / "pictures").mkdir()
    (root / "pictures/a.png").symlink_to(secret)


def link_pictures(root: Path, secret: Path) -> None:
    (root / "pictures").symlink_to(secret.parent)


def hang(root: Path, secret: Path) -> None:
    (root / "pictures").mkdir()
    os.mkfifo(root / "pictures/a.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (link_head_folder, "leads out of the dataset"),
        (link_head_file, "leads out of the dataset"),
        (link_picture, "leads out of the dataset"),
        (link_pictures, "leads out of the dataset"),
        (hang, "not a file"),
    ],
)
def test_a_file_outside_is_not_sent(
    damage: Callable[[Path, Path], None],
    message: str,
    secret: Path,
    hub: FakeHub,
    api: HfApi,
    make_dataset: MakeDataset,
    tmp_path: Path,
) -> None:
    root = make_dataset(tmp_path / "a")
    damage(root, secret)
    with pytest.raises(StoreError, match=message):
        publish(root, REPO, BRANCH, api=api)
    assert hub.log == []


@pytest.mark.parametrize("name", ["{secret}", "../id_rsa.png", "pictures/../../id_rsa.png", "./README.md", ".env"])
def test_a_received_manifest_names_no_other_file(
    name: str,
    secret: Path,
    hub: FakeHub,
    endpoint: str,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    root = make_dataset(tmp_path / "a")
    name = name.format(secret=secret)
    edit(root, lambda manifest: manifest["files"].update({name: entry(SECRET)}))
    with pytest.raises(StoreError, match="is not the name of a dataset's file"):
        finalize(root, hf_repo_id=REPO)
    assert hub.log == []


def test_a_received_manifest_does_not_say_where_to_publish(
    hub: FakeHub, endpoint: str, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    root = make_dataset(tmp_path / "a")
    theirs = {"hf_repo_id": REPO, "hf_branch": BRANCH, "overwrite": True}
    edit(root, lambda manifest: manifest["config"].update(output=theirs))
    assert finalize(root) == 0
    assert hub.log == []


def test_a_listed_picture_is_the_one_of_the_manifest(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    root = make_dataset(tmp_path / "a")
    (root / "pictures").mkdir()
    (root / "pictures/a.png").write_bytes(b"changed")
    edit(root, lambda manifest: manifest["files"].update({"pictures/a.png": entry(b"picture")}))
    with pytest.raises(StoreError, match=r"pictures/a\.png is missing or has changed"):
        publish(root, REPO, BRANCH, api=api)
    assert published(hub) == 0


def test_a_file_that_changes_during_the_upload_ends_it(hub: FakeHub, make_dataset: MakeDataset, tmp_path: Path) -> None:
    """The Hub refuses large files of another sha256. Small ones are part of the commit, and are compared here."""
    root = make_dataset(tmp_path / "a")
    (root / "pictures").mkdir()
    picture = root / "pictures/a.png"
    picture.write_bytes(b"picture")

    class Late(HfApi):
        def create_commit(self, *args: Any, **kwargs: Any) -> Any:
            picture.write_bytes(SECRET)
            return super().create_commit(*args, **kwargs)

    with pytest.raises(StoreError, match=r"pictures/a\.png is missing or has changed"):
        publish(root, REPO, BRANCH, api=Late(endpoint=hub.url, token="hf_alice"))
    assert published(hub) == 0


def test_a_dataset_is_hashed_once(
    hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(path: Path) -> str:
        raise AssertionError(f"{path} is hashed before the upload, which hashes it too")

    monkeypatch.setattr("qk_sniffer.hub.publish.sha256_of", unexpected)
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, api=api)
    assert set(held(hub)) == set(contents(root)) and json.loads(held(hub)["manifest.json"])["files"]
