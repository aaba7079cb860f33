"""Quick tests find nothing of SLURM, whatever the machine has; CI passes no skipped test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.hide_slurm import PROGRAMS, path_without_slurm

ROOT = Path(__file__).parents[1]
FINDS = """
import os, shutil, subprocess
import pytest

@pytest.fixture(scope="session")
def found_by_a_session_fixture():
    return shutil.which("srun")

def sees_slurm(early):
    by_children = subprocess.run(["sh", "-c", "command -v sbatch"]).returncode == 0
    found = {early is not None, shutil.which("srun") is not None, by_children, "SLURM_JOB_ID" in os.environ}
    assert len(found) == 1
    return found == {True}

def test_quick(found_by_a_session_fixture):
    assert not sees_slurm(found_by_a_session_fixture)
    assert subprocess.check_output(["neighbour"]) == b"runs"

@pytest.mark.slow
def test_slow():
    assert sees_slurm(shutil.which("srun"))
"""
SKIPS = """
import pytest

@pytest.mark.xfail
def test_fails_as_expected():
    assert False

@pytest.mark.skipif(True, reason="lacks a GPU")
def test_marked():
    pass

def test_inside():
    pytest.skip("lacks a disk")
"""
SKIPS_ALL = "import pytest; pytest.skip('lacks a library', allow_module_level=True)"


def executable(path: Path, code: str = "exit 0") -> None:
    path.write_text(f"#!/bin/sh\n{code}\n", encoding="utf-8")
    path.chmod(0o755)


def pytest_on(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest with the plugin over the tests in `folder`, and without this repository's conftest."""
    plugin = ["-p", "support.bare_machine", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin, *arguments, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "QK_SNIFFER_NO_SKIPS": "0", **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_quick_test_finds_no_program_of_slurm(tmp_path: Path) -> None:
    for name in ("srun", "sbatch"):
        executable(tmp_path / name)
    executable(tmp_path / "neighbour", "printf runs")
    (tmp_path / "test_it.py").write_text(FINDS)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = pytest_on(tmp_path, "-m", "slow or not slow", **env)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_nor_does_this_one() -> None:
    assert not any(shutil.which(program) for program in PROGRAMS)
    assert not any(name.startswith("SLURM_") for name in os.environ)


def test_other_programs_are_found_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "mixed"):
        (tmp_path / folder).mkdir()
        executable(tmp_path / folder / "tool")
    executable(tmp_path / "mixed" / "srun")
    (tmp_path / "mixed" / "squeue").symlink_to("nowhere")
    path = path_without_slurm(f"{tmp_path}/plain:mixed:/nonexistent:", tmp_path / "links")
    assert path == f"{tmp_path}/plain:{tmp_path}/links/1:/nonexistent:"
    assert [found.name for found in (tmp_path / "links" / "1").iterdir()] == ["tool"]
    assert shutil.which("tool", path=f"{tmp_path}/links/1") is not None


@pytest.mark.slow
def test_a_skipped_test_fails_in_ci(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SKIPS)
    (tmp_path / "test_all.py").write_text(SKIPS_ALL)
    here = pytest_on(tmp_path, "-n", "0")
    assert here.returncode == 0 and "3 skipped, 1 xfailed" in here.stdout, here.stdout
    in_ci = pytest_on(tmp_path, "-n", "1", "--continue-on-collection-errors", QK_SNIFFER_NO_SKIPS="1")
    assert in_ci.returncode == 1
    assert "1 failed, 1 xfailed, 2 errors" in in_ci.stdout, in_ci.stdout
    for reason in ("lacks a GPU", "lacks a disk", "lacks a library"):
        assert f"{reason}; and QK_SNIFFER_NO_SKIPS=1" in in_ci.stdout
