"""Hydra writes into the folders of its run or sweep alone: it would follow links out of them."""

import os
from pathlib import Path

import pytest

from qk_sniffer.cli.flags import initialized, parse_flags
from qk_sniffer.cli.hydra_files import folder_problems
from qk_sniffer.cli.hydra_jobs import run_jobs
from qk_sniffer.errors import StoreError


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Returns a folder that nothing may be written to, with a file."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "file").write_text("mine")
    return folder


def linked(link: Path, target: Path) -> Path:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link


def test_outputs_itself_may_be_a_link(tmp_path: Path, elsewhere: Path) -> None:
    folder = linked(tmp_path / "outputs", elsewhere) / ".runs" / "2026-01-01" / "12-00-00"
    assert not [*folder_problems(folder, is_sweep=False)]
    folder.mkdir(parents=True)
    assert not [*folder_problems(folder, is_sweep=False)]


@pytest.mark.parametrize("link", [".runs", ".runs/2026-01-01", ".runs/2026-01-01/12-00-00", ".runs/2026-01-01/gone"])
def test_a_folder_in_outputs_may_not(link: str, tmp_path: Path, elsewhere: Path) -> None:
    target = elsewhere / "gone" if link.endswith("gone") else elsewhere
    linked(tmp_path / "outputs" / link, target)
    folder = tmp_path / "outputs" / ".runs" / "2026-01-01" / ("gone" if link.endswith("gone") else "12-00-00")
    (problem,) = folder_problems(folder, is_sweep=False)
    assert f"is refused: {tmp_path / 'outputs' / link} is a link" in problem and "hydra.run.dir" in problem


@pytest.mark.parametrize("name", ["multirun.yaml", ".submitit", "0"])
def test_nor_what_hydra_writes_in_the_folder_of_a_sweep(name: str, tmp_path: Path, elsewhere: Path) -> None:
    sweep = linked(tmp_path / "mine", elsewhere)  # the user has named it
    linked(elsewhere / "texts", tmp_path)
    assert not [*folder_problems(sweep, is_sweep=True)]
    linked(elsewhere / name, elsewhere / "file")
    (problem,) = folder_problems(sweep, is_sweep=True)
    assert f"{sweep / name} is a link" in problem and "hydra.sweep.dir" in problem


@pytest.mark.parametrize("name", ["7/7_0_log.out", "7"])
def test_nor_what_submitit_writes_there(name: str, tmp_path: Path, elsewhere: Path) -> None:
    link = linked(tmp_path / "mine" / ".submitit" / name, elsewhere / "file")
    (problem,) = folder_problems(tmp_path / "mine", is_sweep=True)
    assert f"{link} is a link" in problem and "hydra.sweep.dir" in problem
    link.unlink()
    assert not [*folder_problems(tmp_path / "mine", is_sweep=True)]


@pytest.mark.parametrize(("name", "is_sweep"), [("multirun.yaml", True), (".hydra/hydra.yaml", False)])
def test_a_file_of_someone_else_is_not_replaced_by_that_of_hydra(name: str, is_sweep: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("hydra:\n  run:\n    dir: a\n")
    assert not [*folder_problems(tmp_path, is_sweep=is_sweep)]
    (tmp_path / name).write_text("mine: 1\n")
    (problem,) = folder_problems(tmp_path, is_sweep=is_sweep)
    assert f"{tmp_path / name} was not written by Hydra, which would replace it. Move it away" in problem


@pytest.mark.few(3)
@pytest.mark.parametrize("planted", ["qk_sniffer.log", ".hydra", ".hydra/overrides.yaml"])
@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
def test_a_job_does_not_write_through_what_it_finds_in_its_folder(
    planted: str, kind: str, tmp_path: Path, elsewhere: Path
) -> None:
    path = tmp_path / "run" / planted
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(elsewhere / "file" if path.suffix else elsewhere)
    elif kind == "second name":
        path.hardlink_to(elsewhere / "file")
    else:
        os.mkfifo(path)
    arguments = [f"hydra.run.dir={tmp_path / 'run'}"]
    with initialized(parse_flags(arguments)), pytest.raises(StoreError, match=f"{path}: it is a link, or is no file"):
        run_jobs("config", lambda _: None, arguments, is_sweep=False)
    assert [*elsewhere.iterdir()] == [elsewhere / "file"] and (elsewhere / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["l00h00q", "examples/deeper", "pictures", ".qk_sniffer", "statistics/0"])
@pytest.mark.parametrize("is_sweep", [False, True])
def test_hydra_writes_into_no_folder_of_a_dataset(root: Path, name: str, is_sweep: bool) -> None:
    key = f"hydra.{'sweep' if is_sweep else 'run'}.dir"
    (problem,) = folder_problems(root / name, is_sweep=is_sweep)
    assert "is refused" in problem and f"choose another {key}" in problem
    (problem,) = folder_problems(root, [None, name], is_sweep=is_sweep)
    assert "is refused" in problem and f"choose another {key}" in problem
    assert not [*folder_problems(root.parent / "mine", [".hydra", "0"], is_sweep=is_sweep)]
