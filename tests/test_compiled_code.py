"""Code that torch has compiled is kept in a folder of the user: torch unpickles what it finds."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qk_sniffer.machine import own_compiled_code

NAME = f"qk_sniffer_compiled_{os.getuid()}"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return tmp_path


def named(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a process is given."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    own_compiled_code()
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def test_it_is_kept_for_later_jobs(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = named(monkeypatch)
    assert first == temporary / NAME == named(monkeypatch)
    assert stat.S_IMODE(first.stat().st_mode) == 0o700


def test_a_folder_that_the_environment_names_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    own_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("planted", ["link", "file", "writable by all", "writable by the group"])
def test_a_folder_that_others_may_have_made_is_not_used(
    planted: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, theirs = temporary / NAME, temporary / "theirs"
    theirs.mkdir()
    if planted == "link":
        path.symlink_to(theirs)
    elif planted == "file":
        path.touch()
    else:
        path.mkdir()
        path.chmod(0o777 if planted == "writable by all" else 0o770)
    found = named(monkeypatch)
    assert found.parent == temporary and found not in (path, theirs)
    assert stat.S_IMODE(found.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "qk_sniffer_compiled_4321").mkdir(mode=0o700)
    monkeypatch.setattr("os.getuid", lambda: 4321)
    assert named(monkeypatch).name != "qk_sniffer_compiled_4321"


@pytest.mark.slow
def test_a_job_leaves_torchs_own_place_alone(in_tmp: Path) -> None:
    temporary = in_tmp / "temporary"
    temporary.mkdir()
    here = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    command = [sys.executable, "-m", "qk_sniffer", "dataset.max_samples=1"]
    subprocess.run(command, env=here | {"TMPDIR": str(temporary)}, check=True, capture_output=True)
    assert not [*temporary.glob("torchinductor*")] and (temporary / NAME).is_dir()
