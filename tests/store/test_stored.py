"""Tests that stored files are read with limits, and that everything else about them ends in one clear error."""

import json
import os
import threading
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import pytest
from msgspec import Meta
from support.hostile import far_link

from qk_sniffer.config import Config, DatasetConfig, from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.store import stored
from qk_sniffer.store.files import inside
from qk_sniffer.store.layout import is_dataset_file


class Form(TypedDict):
    """A file of two facts."""

    number: Annotated[int, Meta(ge=0, le=9)]
    names: NotRequired[dict[str, list[str]]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"number": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b"[]", "is not understood"),
        (b"null", "is not understood"),
        (b"{}", "missing required field `number`"),
        (b'{"number": "1"}', "Expected `int`, got `str`"),
        (b'{"number": true}', "Expected `int`, got `bool`"),
        (b'{"number": 10}', "Expected `int` <= 9"),
        (b'{"number": 1e400}', "Expected `int`, got `float`"),
        (b'{"number": 1, "names": {"a": [null]}}', "Expected `str`, got `null`"),
        (b'{"number": 1, "more": ' + b"[" * 60 + b"]" * 60 + b"}", "nested deeper than 40 levels"),
        (b'{"number": 1, "more": "' + b"x" * 1_000_000 + b'"}', None),
        (b'{"number": 1, "more": "' + b"x" * 1_100_000 + b'"}', "is larger than 1 MB"),
    ],
)
def test_only_data_of_the_form_is_returned(content: bytes, problem: str | None, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_bytes(content)
    if problem is None:
        assert stored.read(file, Form, way_out="remove it")["number"] == 1
        return
    with pytest.raises(stored.UnreadableError) as error:
        stored.read(file, Form, way_out="remove it")
    assert str(error.value).startswith(f"{file} is ") and str(error.value).endswith("; remove it")
    assert problem in str(error.value)


def test_keys_without_a_form_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text('{"number": 1, "later": [1.5, {"a": null}]}', encoding="utf-8")
    assert stored.read(file, Form, way_out="") == {"number": 1, "later": [1.5, {"a": None}]}


def test_a_path_of_any_bytes_is_read_back(tmp_path: Path) -> None:
    names = {"names": {"é €": [os.fsdecode(b"caf\xe9/\xff"), "${oc.env:HOME}", "\u2028\x1b"]}, "number": 1}
    file = tmp_path / "facts.json"
    file.write_bytes(stored.encode(names))
    assert stored.read(file, Form, way_out="") == names
    assert json.loads(file.read_text(encoding="utf-8")) == names


def test_links_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text('{"number": 1}', encoding="utf-8")
    link.symlink_to(target)
    os.mkfifo(pipe)
    assert stored.read(link, Form, way_out="", follow_links=True) == {"number": 1}
    with pytest.raises(StoreError, match="is a link, which is not followed; remove it"):
        stored.read(link, Form, way_out="remove it")
    found: list[str] = []

    def read(path: Path) -> None:
        with pytest.raises(StoreError) as error:
            stored.read(path, Form, way_out="remove it", follow_links=True)
        found.append(str(error.value))

    for path in (pipe, tmp_path, Path("/dev/zero")):
        thread = threading.Thread(target=read, args=[path], daemon=True)
        thread.start()
        thread.join(10)
    assert found == [f"{path} is not a file; remove it" for path in (pipe, tmp_path, Path("/dev/zero"))]
    with pytest.raises(FileNotFoundError):
        stored.read(tmp_path / "none", Form, way_out="")


def test_stored_settings_are_not_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    config = Config(dataset=DatasetConfig(path="a${b}.jsonl", filter={"key": "${oc.env:HF_TOKEN}"}))
    assert from_dict(config.to_dict()) == config
    assert from_dict({"model": {"name": "${oc.env:HF_TOKEN}"}}).model.name == "${oc.env:HF_TOKEN}"
    with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `\$.sampler.seed`"):
        from_dict({"sampler": {"seed": "${oc.env:HF_TOKEN}"}})


@pytest.mark.parametrize(
    "name", ["README.md", "examples/data.parquet", "l00h07q/data.parquet", "l123h10k/data.parquet"]
)
def test_the_names_of_a_dataset(name: str) -> None:
    assert is_dataset_file(name)
    assert is_dataset_file("pictures/norms_by_layer.png") and is_dataset_file("pictures/norms_by_layer.svg")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../../.bashrc",
        "l00h00q/../../x",
        "l00h00q/data.parquet\n",
        "l00h00q",
        "l0h00q/data.parquet",
        "l000h00q/data.parquet",
        "l٠٠h00q/data.parquet",
        "l00h00z/data.parquet",
        "./README.md",
        "readme.md",
        "manifest.json",
        "pictures/../../x.png",
        "pictures/.png",
        "pictures/.svg",
        "pictures/a.jpg",
        "pictures/a/b.png",
        "pictures/a.png\n",
        ".qk_sniffer/job.json",
        "examples/data.parquet/",
        "l00h00q\\data.parquet",
        "l00h00q/data.parquet\x00",
    ],
)
def test_no_other_name_is_one_of_a_dataset(name: str) -> None:
    assert not is_dataset_file(name)


def test_no_link_leads_out_of_a_dataset(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "l00h00q").mkdir(parents=True)
    other.mkdir()
    (other / "data.parquet").touch()
    (root / "l00h01q").symlink_to(other)
    (root / "l00h00q" / "data.parquet").symlink_to(other / "data.parquet")
    (root / "README.md").touch()
    (root / "examples").mkdir()
    (root / "examples" / "data.parquet").symlink_to(root / "README.md")
    for name in ("README.md", "examples/data.parquet", "l00h05q/data.parquet"):
        assert inside(root, name) == root / name
    for name in ("l00h01q/data.parquet", "l00h00q/data.parquet"):
        with pytest.raises(StoreError, match="leads out of the dataset"):
            inside(root, name)


def test_no_link_leads_out_of_a_dataset_over_a_path_that_is_too_long(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").touch()
    (root / "README.md").symlink_to(far_link(root, tmp_path / "secret"))
    assert (root / "README.md").is_file()
    with pytest.raises(StoreError, match="leads over a path that is longer than the system allows"):
        inside(root, "README.md")


def test_a_folder_in_the_cache_of_the_hub_is_read(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "abc", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").touch()
    (snapshot / "README.md").symlink_to(Path("../../blobs/123"))
    assert inside(snapshot, "README.md").is_symlink()
