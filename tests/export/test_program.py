"""Tests the program, the function and their outputs; the tests of each format compare its numbers."""

import errno
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from support.export_cases import statistics
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, copied, publish

import qk_sniffer
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.export import cli, write
from qk_sniffer.export.formats import FORMATS
from qk_sniffer.store import disk
from qk_sniffer.store.disk import sha256_of


@pytest.fixture
def root(undisturbed: Callable[..., Path]) -> Path:
    """The folder of a dataset with statistics alone."""
    return undisturbed(sampler={"type": "none"}, capture=statistics(), verify={"examples": 0})


def called(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", *arguments])
        return cli.main()


def test_the_program_writes_and_names_the_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "stats.pt"
    assert called(f"data_root={root}", "format=triattention", f"output={output}") == 0
    assert capsys.readouterr().out == f"Written: {output}\n"
    written = output.read_bytes()
    assert called(f"data_root={root}", "format=triattention", f"output={output}") == 1
    assert "exists: give another output, or overwrite=true to replace it" in capsys.readouterr().err
    output.write_bytes(b"")
    assert called(f"data_root={root}", "format=triattention", f"output={output}", "overwrite=true") == 0
    assert output.read_bytes() == written, "the same dataset gives the same bytes"
    assert [path.name for path in tmp_path.iterdir()] == ["stats.pt"]


def test_no_file_next_to_the_output_is_replaced_unasked(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "stats.tria"
    others = [tmp_path / "stats.tria.json", tmp_path / "stats.tria.tmp", tmp_path / "stats.tria.json.tmp"]
    for other in others:
        other.write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"stats\.tria\.json exists: give another output, or overwrite=true"):
        qk_sniffer.export(root, "tria", output)
    assert sorted(tmp_path.iterdir()) == sorted(others) and {other.read_bytes() for other in others} == {b"mine"}
    with pytest.raises(StoreError, match=r"stats\.tria\.json was not written by an export: remove it, or give another"):
        qk_sniffer.export(root, "tria", output, overwrite=True)
    assert not output.exists() and others[0].read_bytes() == b"mine"
    others[0].unlink()
    for _ in range(2):
        qk_sniffer.export(root, "tria", output, overwrite=True)
    assert json.loads(others[0].read_bytes())["made_by"].startswith("qk-sniffer")
    assert {other.read_bytes() for other in others[1:]} == {b"mine"}


def put_folder(path: Path) -> None:
    (path / "deeper").mkdir(parents=True)


def test_what_no_export_wrote_is_not_replaced(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stats"
    export = functools.partial(qk_sniffer.export, root, "kv_scales", folder, overwrite=True)
    folder.mkdir()
    export()  # an empty one
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    changes: list[tuple[str, Callable[[Path], object]]] = [
        ("provenance.json", put_folder),
        ("kv_scales.safetensors", put_folder),
        ("kv_scales.safetensors", lambda path: path.symlink_to(tmp_path / "elsewhere")),
        ("key_ranges.safetensors", os.mkfifo),
        ("provenance.json", lambda path: path.write_text('{"made_by": "me"}')),
        ("provenance.json", lambda path: None),  # as in a folder with a user's model
        ("mine", lambda path: path.write_text("mine")),
    ]
    for name, put in changes:
        disk.remove(folder / name)
        put(folder / name)
        before = sorted(folder.rglob("*"))
        with pytest.raises(StoreError, match=rf"{name} was not written by an export: remove it, or give"):
            export()
        assert sorted(folder.rglob("*")) == before and sorted(tmp_path.iterdir()) == [folder]
        disk.remove(folder / name)
        if name in written:
            (folder / name).write_bytes(written[name])
    export()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="stats is a link: give another output"):
        export()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe is a special file: give another output"):
        qk_sniffer.export(root, "triattention", tmp_path / "pipe", overwrite=True)


def test_wrong_settings(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(f"data_root={tmp_path}/nowhere", "format=triatention") == 2
    assert "format is 'triatention', did you mean triattention" in capsys.readouterr().err
    assert called("format=tria") == 2
    assert "data_root is not given" in capsys.readouterr().err
    assert called(f"data_root={tmp_path}/nowhere", "format=tria") == 1
    assert "no such folder" in capsys.readouterr().err


def test_the_help_lists_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--help") == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in FORMATS)


def test_the_function_is_callable_before_and_after_its_package_is_imported(root: Path, tmp_path: Path) -> None:
    for number in range(2):
        assert qk_sniffer.export(root, "tria", tmp_path / f"{number}.tria") == tmp_path / f"{number}.tria"
    with pytest.raises(ConfigError, match="format is 'none'; valid: triattention"):
        qk_sniffer.export(root, "none")


@pytest.mark.slow
def test_a_dataset_without_the_statistics_names_the_setting(undisturbed: Callable[..., Path]) -> None:
    with pytest.raises(StoreError, match=r"has no statistics of query vectors before RoPE: .*enabled=true and"):
        qk_sniffer.export(undisturbed(), "tria")
    post = undisturbed(capture=statistics(stages=["post"]))
    with pytest.raises(StoreError, match=r"statistics after RoPE, .*'capture\.statistics\.stages=\[pre\]'"):
        qk_sniffer.export(post, "tria")
    keys = undisturbed(capture=statistics() | {"capture_queries": False})
    for format in ("tria", "qfilters"):
        with pytest.raises(StoreError, match=r"no query vectors: capture with capture\.capture_queries=true$"):
            qk_sniffer.export(keys, format)


@pytest.mark.usefixtures("endpoint", "in_tmp")
def test_a_dataset_on_the_hub_is_exported_to_the_folder_of_outputs(
    hub: FakeHub, api: HfApi, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(copied(root, tmp_path / "copy"), REPO, BRANCH, api=api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert called(f"data_root={REPO}", f"revision={BRANCH}", "format=tria") == 0
    written = tmp_path / "outputs" / f"{BRANCH}-triattention.tria"
    provenance = json.loads(written.with_name(f"{written.name}.json").read_text())
    assert provenance["vectors_commit"] == hub.repositories[REPO].history(BRANCH)[0].id
    assert written.read_bytes() == qk_sniffer.export(root, "tria", tmp_path / "stats.tria").read_bytes()


def test_a_folder_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        qk_sniffer.export(root, "tria", tmp_path / "file" / "stats.tria")


@pytest.mark.parametrize("is_link", [False, True])
def test_what_appears_after_the_check_is_not_removed(
    is_link: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, user = tmp_path / "scales", tmp_path / "user"
    qk_sniffer.export(root, "kv_scales", folder)
    user.mkdir()
    names = ["config.json", "model.safetensors", "notes.txt"]
    for name in names:
        (user / name).write_text("the user's")
    real, calls = write._check_folder, []

    def plant(path: Path) -> None:
        real(path)
        calls.append(path)
        if len(calls) == 2:  # just before the folder is replaced
            folder.rename(tmp_path / "moved")
            folder.symlink_to(user) if is_link else user.rename(folder)

    monkeypatch.setattr(write, "_check_folder", plant)
    with pytest.raises(StoreError, match=r"scales is exported, and what was there before is not removed"):
        qk_sniffer.export(root, "kv_scales", folder, overwrite=True)
    assert (folder / "kv_scales.safetensors").exists()
    kept = user if is_link else next(tmp_path.glob(".scales-*"))
    assert sorted(path.name for path in kept.iterdir()) == names


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("triattention", "out"),
        ("tria", "out"),
        ("tria", "out.json"),
        ("kv_scales", "out"),
        ("kv_scales", "out/config.json"),
    ],
)
def test_what_appears_while_the_export_computes_is_not_replaced_unasked(
    format: str, name: str, has_links: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exports"
    mine, real = folder / name, disk.write_atomic

    def plant(path: Path, data: bytes, **options: Any) -> None:
        real(path, data, **options)
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")

    def unsupported(*_: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(disk, "write_atomic", plant)
    if not has_links:
        monkeypatch.setattr(os, "link", unsupported)
    with pytest.raises(StoreError, match=r"exports/out.* (exists: give|is a file: give|not written by an export)"):
        qk_sniffer.export(root, format, folder / "out")
    assert mine.read_text() == "mine" and not [*folder.glob(".out*")]


def test_a_folder_is_not_written_through_a_link_that_takes_its_place(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user, who may write where the export goes, sees its temporary folder."""
    group, model = tmp_path / "group", tmp_path / "model"
    for folder in (group, model):
        folder.mkdir()
    for name in ("config.json", "kv_scales.safetensors", "provenance.json"):
        (model / name).write_text("the user's")
    real = disk.write_atomic

    def plant(path: Path, data: bytes, **options: Any) -> None:
        real(path, data, **options)
        if path.parent.name.startswith(".scales-"):
            monkeypatch.setattr(disk, "write_atomic", real)
            path.parent.rename(group / "moved")
            path.parent.symlink_to(model)

    monkeypatch.setattr(disk, "write_atomic", plant)
    with pytest.raises(StoreError, match=r"was replaced while the export wrote it: give an output where nobody else"):
        qk_sniffer.export(root, "kv_scales", group / "scales")
    assert {path.read_text() for path in model.iterdir()} == {"the user's"} and not (group / "scales").exists()


def test_two_exports_to_one_output_write_their_files_one_after_the_other(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, both = tmp_path / "stats.tria", threading.Barrier(2)
    wrote: list[int] = []
    write_file = write._write_file

    def noted(*args: Any, **options: Any) -> None:
        wrote.append(threading.get_ident())
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # lets another export write now, if it can
        write_file(*args, **options)

    monkeypatch.setattr(write, "_write_file", noted)
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(qk_sniffer.export, root, "tria", output, overwrite=True) for _ in range(2)]:
            done.result()
    assert wrote[0] == wrote[1] != wrote[2] == wrote[3]
    assert json.loads((tmp_path / "stats.tria.json").read_text())["sha256"] == sha256_of(output)


@pytest.mark.slow
@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_export_leaves_a_folder_that_the_next_one_knows(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, renames: int
) -> None:
    folder = tmp_path / "scales"
    export = functools.partial(qk_sniffer.export, root, "kv_scales", folder)
    export()
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = f"""
import os, qk_sniffer
from qk_sniffer.store.open_folder import OpenFolder
real, calls = OpenFolder.rename, []
def rename(folder, name, *target):
    real(folder, name, *target)
    calls.extend([name] if name.startswith(("scales", ".scales")) else [])
    if len(calls) == {1 + renames}:
        os._exit(9)
OpenFolder.rename = rename
qk_sniffer.export({str(root)!r}, "kv_scales", {str(folder)!r}, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert folder.exists() == bool(renames) and len([*tmp_path.glob(".scales-*.old")]) == 1
    other = tmp_path / f".scales-{'0' * 16}.old"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(StoreError, match="scales exists: give another output"):
        export()
    assert ("scales is the earlier export again" in caplog.text) == (not renames)
    export(overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert [*tmp_path.glob(".scales-*.old")] == [other] and (other / "mine").exists(), "the user's"


@pytest.mark.parametrize("last", ["stats.tria", "stats.tria.json"])
def test_numbers_never_have_the_provenance_of_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    output, beside = tmp_path / "stats.tria", tmp_path / "stats.tria.json"
    output.write_bytes(b"of another dataset")
    beside.write_text('{"made_by": "qk-sniffer 0"}')
    real = write._write_file

    def failing(path: Path, data: bytes, **options: Any) -> None:
        if path.name == last:
            raise OSError("the disk is full")
        real(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_file", failing)
        with pytest.raises(StoreError, match="the disk is full"):
            qk_sniffer.export(root, "tria", output, overwrite=True)
    assert not beside.exists()
    qk_sniffer.export(root, "tria", output, overwrite=True)
    assert json.loads(beside.read_bytes())["sha256"] == disk.sha256_of(output)


def test_what_appears_beside_an_export_is_neither_removed_nor_replaced(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, beside = tmp_path / "stats.tria", tmp_path / "stats.tria.json"
    real_source, real_file = write.Source.provenance, write._write_file

    def put(source: Any) -> Any:
        beside.mkdir()
        (beside / "mine").touch()
        return real_source(source)

    with monkeypatch.context() as patch:
        patch.setattr(write.Source, "provenance", put)  # while the numbers are made
        with pytest.raises(StoreError, match=r"stats\.tria\.json was not written by an export"):
            qk_sniffer.export(root, "tria", output, overwrite=True)
    assert [*beside.iterdir()] == [beside / "mine"] and not output.exists()
    (beside / "mine").unlink()
    beside.rmdir()

    def put_file(path: Path, data: bytes, **options: Any) -> None:
        real_file(path, data, **options)
        if path == output:
            beside.write_text("my notes")

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_file", put_file)
        with pytest.raises(StoreError, match="exists: give another output"):
            qk_sniffer.export(root, "tria", output, overwrite=True)
    assert beside.read_text() == "my notes"


@pytest.mark.parametrize("format", ["triattention", "tria", "kv_scales"])
@pytest.mark.parametrize("path", [".", "", "..", "/", "a/..", "a\0b", "x" * 300])
@pytest.mark.usefixtures("in_tmp")
def test_an_output_needs_a_name(path: str, format: str, root: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"the output is .*(must name a file or folder|which has a)"):
            qk_sniffer.export(root, format, path, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_has_room_for_the_name_of_its_provenance(overwrite: bool, root: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot write .*: File name too long\. Give another output"):
        qk_sniffer.export(root, "tria", tmp_path / ("x" * 252), overwrite=overwrite)
    assert [*tmp_path.iterdir()] == []
