"""Tests that a publication sends only the files of its dataset, each of which is the one that the manifest lists."""

import base64
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
from qk_sniffer.store.disk import open_file
from qk_sniffer.store.open_folder import Access

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("waits")]

SECRET = b"a key of the publisher"
DRAWN = b"\x89PNG Software\0qk-sniffer " + b"picture" * 10
"""The content of a picture with the mark of this package."""


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


def link_hard(root: Path, secret: Path) -> None:
    (root / "pictures").mkdir()
    os.link(secret, root / "pictures/a.png")


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
        (link_hard, r"a\.png was not drawn by qk-sniffer, and is not published"),
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
    picture.write_bytes(DRAWN)

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
    hashed: list[str] = []

    def counting(file: Any) -> bytes:
        hashed.append(os.path.realpath(f"/proc/self/fd/{file.fileno()}"))
        return hashlib.file_digest(file, "sha256").digest()

    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", counting)
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, api=api)
    assert set(held(hub)) == set(contents(root)) and json.loads(held(hub)["manifest.json"])["files"]
    files = [name for name in contents(root) if name not in ("README.md", "manifest.json")]
    assert sorted(hashed) == sorted(str(root / name) for name in files)


HEAD = "l00h00q/data.parquet"


def as_link(path: Path, secret: Path) -> None:
    path.unlink()
    path.symlink_to(secret)


def as_file(path: Path, secret: Path) -> None:
    secret.replace(path)


@pytest.mark.parametrize("swapped", [as_link, as_file])
@pytest.mark.parametrize("name", [HEAD, "pictures/new.png"])
@pytest.mark.parametrize("moment", ["before it is opened", "after it is checked"])
def test_a_file_that_is_swapped_while_it_is_published_is_not_sent(
    moment: str,
    name: str,
    swapped: Callable[[Path, Path], None],
    secret: Path,
    hub: FakeHub,
    api: HfApi,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large files are sent from the descriptor that was checked; small ones are compared when the commit reads them."""
    root = make_dataset(tmp_path / "a")
    (root / "pictures").mkdir()
    (root / "pictures/new.png").write_bytes(DRAWN)
    before = (root / name).read_bytes()
    secret.write_bytes(SECRET.ljust(len(before))[: len(before)])
    sent = secret.read_bytes()
    step = "preupload_lfs_files" if moment == "after it is checked" else "list_repo_commits"
    call = getattr(api, step)

    def swapping(*args: Any, **kwargs: Any) -> Any:
        if secret.exists() and not (root / name).is_symlink():
            swapped(root / name, secret)
        return call(*args, **kwargs)

    monkeypatch.setattr(api, step, swapping)
    if moment == "after it is checked" and name == HEAD:
        publish(root, REPO, BRANCH, api=api)
        assert held(hub)[name] == before
    else:
        with pytest.raises(StoreError, match=r"leads out of the dataset|missing or has changed"):
            publish(root, REPO, BRANCH, api=api)
        assert published(hub) == 0
    assert not any(sent in body or base64.b64encode(sent) in body for body in hub.received)


def test_a_picture_is_listed_as_it_was_checked(
    hub: FakeHub, api: HfApi, secret: Path, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(tmp_path / "a")
    picture = root / "pictures/a.png"
    picture.parent.mkdir()
    picture.write_bytes(DRAWN)

    def late(path: Path, access: Access) -> Any:
        if path.name == picture.name:
            as_link(picture, secret)
        return open_file(path, access)

    monkeypatch.setattr("qk_sniffer.store.files.open_file", late)
    with pytest.raises(StoreError, match=r"a\.png cannot be published: a link, which is not followed"):
        publish(root, REPO, BRANCH, api=api)
    assert hub.log == []


@pytest.mark.parametrize("keeps_its_content", [True, False])
def test_a_file_that_is_written_to_during_its_upload(
    keeps_its_content: bool,
    hub: FakeHub,
    api: HfApi,
    make_dataset: MakeDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make_dataset(tmp_path / "a")
    upload, content = api.preupload_lfs_files, (root / HEAD).read_bytes()

    def writing(*args: Any, **kwargs: Any) -> None:
        upload(*args, **kwargs)
        (root / HEAD).write_bytes(content if keeps_its_content else content[::-1])

    monkeypatch.setattr(api, "preupload_lfs_files", writing)
    if keeps_its_content:
        publish(root, REPO, BRANCH, api=api)
        assert published(hub) == 1
        return
    with pytest.raises(StoreError, match=r"l00h00q/data\.parquet is missing or has changed"):
        publish(root, REPO, BRANCH, api=api)
    assert published(hub) == 0
