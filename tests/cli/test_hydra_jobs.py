"""What the disk or SLURM refuses Hydra ends each program with one clear error."""

import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from support.rights import without_root
from support.slurm_commands import Commands

from qk_sniffer.cli import app
from qk_sniffer.cli.flags import initialized, parse_flags
from qk_sniffer.cli.hydra_jobs import run_jobs
from qk_sniffer.cli.launching import Launch
from qk_sniffer.config import Config
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.jobs.sweep import SWEEP_FILE, PlannedJob
from qk_sniffer.resolved import resolve

CAPTURE = ("qk_sniffer", "model=hf", "model.name=org/m", "dataset=pydoc")
PLASTICITY = ("qk_sniffer.plasticity", "data_root=org/m")


def no_byte_more() -> None:
    """Makes every write to a file fail, like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def as_sweep(command: tuple[str, ...]) -> tuple[str, ...]:
    module, *settings = command
    swept = {
        "qk_sniffer": ("sampler.seed=0,1", "output.data_root=out-${sampler.seed}"),
        "qk_sniffer.plasticity": ("seed=0,1", "output_dir=out-${seed}"),
    }
    return (module, "--multirun", *settings, *swept[module])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        CAPTURE,
        PLASTICITY,
        as_sweep(CAPTURE),
        as_sweep(PLASTICITY),
    ],
)
def test_a_full_disk(command: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-m", *command],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=no_byte_more,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "File too large" in done.stderr and "rerun the command" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [CAPTURE, PLASTICITY])
def test_jobs_that_sbatch_does_not_accept(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(tmp_path / "bin", monkeypatch)
    commands.say("sbatch", "", code=1, before="echo 'sbatch: error: Batch job submission failed: account' >&2")
    for name in ("srun", "sinfo", "squeue", "sacct"):
        commands.say(name, "")
    done = subprocess.run(
        [sys.executable, "-m", *as_sweep(command), "hydra/launcher=slurm"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "SLURM does not accept the jobs: sbatch: error: Batch job submission failed: account" in done.stderr


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_a_job_knows_whether_it_is_of_a_sweep(mode: RunMode, tmp_path: Path) -> None:
    is_sweep = mode == RunMode.MULTIRUN
    folders = [f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}"]
    with initialized(parse_flags(folders)):
        done = run_jobs("config", lambda _: HydraConfig.get().mode, folders, is_sweep=is_sweep)
    assert [job.return_value for job in done] == [mode]


def test_a_folder_that_the_file_system_does_not_make_is_named() -> None:
    folder = ["hydra.run.dir=/proc/nowhere/run"]  # a file system whose folders nobody makes
    with (
        initialized(parse_flags(folder)),
        pytest.raises(StoreError, match=r"cannot write /proc/nowhere[^.]*\. Give Hydra .*hydra\.run\.dir="),
    ):
        run_jobs("config", lambda _: None, folder, is_sweep=False)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (
            "+hydra.callbacks.mine._target_=nope.Mine",
            r"hydra\.callbacks\.mine: Error locating target 'nope\.Mine': .*nope",
        ),
        ("+hydra.callbacks.mine=5", r"Hydra's own settings: Cannot instantiate config of type int"),
        (
            "hydra.job_logging.handlers.file.encoding=nope",
            r"hydra\.job_logging or hydra\.hydra_logging: Unable to configure handler 'file': unknown encoding: nope",
        ),
    ],
)
def test_a_setting_with_which_hydra_fails_is_named(
    setting: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    arguments = [setting, f"hydra.run.dir={tmp_path}"]
    for is_told in (True, False):
        with initialized(parse_flags(arguments)), pytest.raises(Exception) as caught:
            run_jobs("config", lambda _: None, arguments, is_sweep=False)
        assert isinstance(caught.value, ConfigError) == is_told
        if is_told:
            assert re.search(f"{problem}.*; correct this setting, or leave it out", str(caught.value))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@pytest.mark.parametrize("is_sweep", [False, True])
def test_an_unexpected_error_of_a_job_is_no_problem_of_settings(is_sweep: bool, tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise LookupError("a fault")

    arguments = [f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}"]
    with initialized(parse_flags(arguments)), pytest.raises(LookupError, match="a fault"):
        run_jobs("config", fail, arguments, is_sweep=is_sweep)


def test_a_folder_without_rights_is_no_mistake_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as home:  # pytest's own let no other user pass
        Path(home).chmod(0o555)
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["qk_sniffer"])
        with without_root():
            assert app.main() == 1
        monkeypatch.undo()
    message = r"cannot write \S*outputs: Permission denied\. Change its rights, .*hydra\.run\.dir="
    assert re.search(message, capsys.readouterr().err)


def test_a_sweep_that_records_no_settings_does_not_take_the_folder_of_one_that_does(tmp_path: Path) -> None:
    """Each of its jobs would run with the settings of the earlier job of its number."""
    (tmp_path / SWEEP_FILE).write_text("{}")
    hydra = {"sweep": {"dir": str(tmp_path)}, "launcher": {"_target_": "x"}, "sweeper": {"_target_": "other.Sweeper"}}
    with pytest.raises(StoreError, match=r"the settings of an earlier sweep.*hydra\.sweep\.dir"):
        Launch([PlannedJob(0, (), resolve(Config()))]).begin_sweep(OmegaConf.create(hydra))


def test_jobs_of_any_sweep_do_not_look_in_the_current_folder_if_their_command_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*filter(None, sys.path)])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    arguments = [f"hydra.sweep.dir={tmp_path}"]
    with initialized(parse_flags(arguments)):
        run_jobs("config", lambda _: None, arguments, is_sweep=True)
    assert os.environ["PYTHONSAFEPATH"] == "1"
