"""What would be a command in the script of a job on SLURM, or a pattern in a path, is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from submitit.slurm.slurm import _make_sbatch_string

import qk_sniffer
from qk_sniffer.cli import launching, slurm_script
from qk_sniffer.errors import StoreError


def problems(folder: str = "outputs/.sweeps/1", **launcher: Any) -> list[str]:
    own = {"submitit_folder": "${hydra.sweep.dir}/.submitit/%j", "setup": ["module load a\nmodule load b"]}
    whole = OmegaConf.create({"hydra": {"sweep": {"dir": folder}, "launcher": own | launcher}})
    return list(slurm_script.problems(whole.hydra))


def test_usual_settings_are_submitted() -> None:
    assert problems() == problems("/a b/it's-\u00e9", comment="a 'b' \"c\" $d", additional_parameters={"x": 1}) == []


def test_a_line_break_would_be_a_command(tmp_path: Path) -> None:
    folder = tmp_path / "a\ntouch made #"
    script = _make_sbatch_string("true", folder, use_srun=False)
    subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert (tmp_path / "made").exists(), "submitit writes safe scripts by now: this check is not needed any more"
    (problem,) = problems(str(folder))
    assert "has the character '\\n' in its path" in problem and "hydra.sweep.dir" in problem


@pytest.mark.parametrize("character", ["%", "\\", "\r", "\x1b"])
def test_a_folder_that_slurm_takes_otherwise(character: str) -> None:
    (problem,) = problems(f"/x/50{character}a")
    assert f"has the character {character!r} in its path" in problem


def test_the_current_folder_is_a_part_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "100%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "has the character '%'" in problems()[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("comment", "a\ntouch made"),
        ("name", "a\rb"),
        ("additional_parameters", {"mail-user": "a\nb"}),
        ("additional_parameters", {"a\nb": 1}),
        ("srun_args", ["a", "b\n"]),
    ],
)
def test_a_setting_of_several_lines(key: str, value: Any) -> None:
    (problem,) = problems(**{key: value})
    assert problem.startswith(f"hydra.launcher.{key} has a line break")


def test_code_is_not_copied_to_where_python_does_not_find_it(tmp_path: Path) -> None:
    odd = tmp_path / f"a{os.pathsep}b"
    odd.mkdir()
    before = os.environ.get("PYTHONPATH")
    with pytest.raises(StoreError, match=r"the code cannot be copied to .*snapshot=false"):
        launching.use_snapshot(odd / "code")
    assert os.environ.get("PYTHONPATH") == before and not [*tmp_path.rglob("code")]


@pytest.mark.parametrize("searched", [True, False])
def test_jobs_look_in_the_current_folder_last(searched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a file yaml.py of someone else's folder would run, with the token in its environment."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("yaml", "json", "my_family"):
        (here / f"{name}.py").write_text("FOUND = True\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*([""] if searched else []), *filter(None, sys.path)])
    for name in ("PYTHONPATH", "PYTHONSAFEPATH", "QK_SNIFFER_LAST_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    launching.use_snapshot(tmp_path / "code")
    job = (
        "import json, yaml\n"
        "assert not hasattr(yaml, 'FOUND') and not hasattr(json, 'FOUND')\n"
        "from qk_sniffer.cli.launching import search_last_folder\n"
        "import qk_sniffer\n"
        f"assert qk_sniffer.__file__.startswith({str(tmp_path / 'code')!r})\n"
        "search_last_folder()\n"
        "import my_family\n"
    )
    done = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True)
    assert (done.returncode == 0) == searched, done.stderr
    assert searched or "No module named 'my_family'" in done.stderr


@pytest.mark.parametrize("earlier", [{}, {"PYTHONPATH": "/mine"}], ids=["unset", "set"])
def test_the_script_sets_what_a_job_needs_where_slurm_passes_no_environment(
    earlier: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, shown = r"/a${b}\${c} 'd'", ["QK_SNIFFER_SWEEP", "QK_SNIFFER_LAST_FOLDER", "PYTHONSAFEPATH"]
    for name, value in zip(shown, ("5e", odd, "1"), strict=True):
        monkeypatch.setenv(name, value)
    hydra = OmegaConf.create({"launcher": {"setup": ["export MINE=1"]}})
    OmegaConf.set_readonly(hydra, True)
    launching._set_in_script(hydra, tmp_path / "code", "# mark")
    for _ in range(2):  # as Hydra does
        OmegaConf.resolve(hydra)
    lines = [*hydra.launcher.setup]
    shown += ["MINE", "SLURM_EXPORT_ENV", "PYTHONPATH"]
    command = [*lines, *(f"printf '%s\\n' \"${name}\"" for name in shown)]
    said = subprocess.run(["/bin/bash", "-c", "\n".join(command)], env=earlier, capture_output=True, text=True).stdout
    path = [str(tmp_path / "code"), *earlier.values()]
    assert said.splitlines() == ["5e", odd, "1", "1", "ALL", ":".join(path)]


@pytest.mark.parametrize("searched", [True, False])
def test_jobs_do_not_look_in_the_current_folder_if_their_command_does_not(
    searched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml.py").write_text("FOUND = True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*([""] if searched else []), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    launching.protect_jobs()
    done = subprocess.run([sys.executable, "-c", "import yaml; yaml.FOUND"], capture_output=True)
    assert (done.returncode == 0) == searched


@pytest.mark.parametrize("kind", ["link", "broken link", "folder", "file"])
def test_code_is_copied_to_a_folder_of_its_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link would lead the copy over files of someone else, and jobs that wait would import what is copied later."""
    for name in ("PYTHONPATH", "PYTHONSAFEPATH", "QK_SNIFFER_LAST_FOLDER"):
        monkeypatch.setenv(name, "")
    (tmp_path / "other" / "qk_sniffer").mkdir(parents=True)
    (tmp_path / "other" / "qk_sniffer" / "text.py").write_text("mine")
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    if kind == "folder":
        (tmp_path / "other").rename(sweep / "code")
    elif kind == "file":
        (sweep / "code").touch()
    else:
        (sweep / "code").symlink_to(tmp_path / "other" if kind == "link" else tmp_path / "gone")
    launching.use_snapshot(sweep / "code")
    launching.use_snapshot(sweep / "code")
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(sweep / "code.3"), str(sweep / "code.2")]
    package, copy = Path(qk_sniffer.__file__).parent, sweep / "code.3" / "qk_sniffer"
    of_package = {path.relative_to(package): path.read_bytes() for path in package.rglob("*.py")}
    assert {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*.py")} == of_package
    assert not (tmp_path / "gone").exists()
    left = sweep / "code" if kind == "folder" else tmp_path / "other"
    assert [path.read_text() for path in left.rglob("*.py")] == ["mine"]
