"""A command that waits for its jobs on SLURM tells why they wait."""

import logging
import time
from pathlib import Path

import pytest
from support.slurm_commands import Commands

from qk_sniffer.cli import queue_watch
from qk_sniffer.cli.launching import Launch
from qk_sniffer.cli.queue_watch import QueueWatch
from qk_sniffer.config import from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import slurm
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.resolved import resolve


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Commands:
    caplog.set_level(logging.INFO)
    return Commands(tmp_path / "bin", monkeypatch)


def jobs(count: int) -> list[PlannedJob]:
    config = resolve(from_dict({"model": {"name": "org/m"}}))
    return [PlannedJob(number, (f"sampler.seed={number}",), config) for number in range(count)]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    caplog.clear()
    return found


def queue(*reasons: str) -> str:
    return "".join(f"12_{number}|PENDING|{reason}\n" for number, reason in enumerate(reasons) if reason)


def test_a_reason_is_told_once_and_again_when_it_changes(commands: Commands, caplog: pytest.LogCaptureFixture) -> None:
    watch = QueueWatch(jobs(3), lambda: ["12_0", "12_1", "12_2"], None)
    watch.find()
    commands.say("squeue", queue("None", "None", "None"))
    watch.tell()
    assert told(caplog) == []
    commands.say("squeue", queue("PartitionTimeLimit", "PartitionTimeLimit", "Priority"))
    for _ in range(2):
        watch.tell()
    first, second = told(caplog)
    assert first.startswith("WARNING SLURM does not start jobs 0-1 (SLURM 12): PartitionTimeLimit: the time limit is ")
    assert "hydra.launcher.timeout_min" in first
    assert second == "INFO SLURM has not started job 2 (sampler.seed=2) (SLURM 12_2): Priority"
    commands.say("squeue", queue("PartitionTimeLimit", "PartitionDown", "Resources"))
    watch.tell()
    (changed,) = told(caplog)
    assert changed.startswith("WARNING SLURM does not start job 1 (sampler.seed=1) (SLURM 12_1): PartitionDown: ")
    commands.say("squeue", "", code=1)
    watch.tell()
    commands.say("squeue", queue("None", "PartitionDown", ""))
    watch.tell()
    assert told(caplog) == [], "nothing changed that is known"
    commands.say("squeue", queue("PartitionTimeLimit", "PartitionDown", "Priority"))
    watch.tell()
    assert told(caplog) == ["INFO SLURM has not started job 2 (sampler.seed=2) (SLURM 12_2): Priority"], "queued again"


def test_ids_of_jobs_are_those_whose_script_this_launch_has_submitted(tmp_path: Path) -> None:
    launch, other = Launch(jobs(12)), Launch(jobs(2))
    folder = tmp_path / "a [b]*" / ".submitit"
    launch._slurm_folder = other._slurm_folder = str(folder / "%j")

    def submit(mark: str, *job_ids: str) -> None:
        for job_id in job_ids:
            array = job_id.partition("_")[0]
            for name in (f"{array}/{array}_submission.sh", f"{job_id}/{job_id}_submitted.pkl"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(f"#!/bin/bash\n# setup\n{mark}\n")

    submit("export MINE=1", "7_0", "7_1")
    assert launch._submitted_ids() == []
    submit(launch._mark, *(f"12_{number}" for number in range(11)), "112", "x")
    submit(other._mark, "13_0", "13_1")  # of a command that runs at the same time, in the same folder
    submit("", "14")
    (folder / "14" / "14_submission.sh").unlink()
    assert launch._submitted_ids() == [*(f"12_{number}" for number in range(11)), "112"]
    assert other._submitted_ids() == ["13_0", "13_1"]


def test_ids_of_jobs_in_one_folder(tmp_path: Path) -> None:
    launch = Launch(jobs(1))
    launch._slurm_folder = str(tmp_path)
    for array, mark in ((3, launch._mark), (4, "")):
        (tmp_path / f"{array}_submission.sh").write_text(mark)
        (tmp_path / f"{array}_0_submitted.pkl").touch()
    assert launch._submitted_ids() == ["3_0"]


def test_ids_are_recorded_and_reasons_told_while_a_command_waits(
    commands: Commands, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_watch, "FIND_EVERY_S", 0.01)
    monkeypatch.setattr(queue_watch, "FIRST_S", 0.02)
    monkeypatch.setattr(slurm, "ASK_EVERY_S", 0.02)
    commands.say("squeue", queue("PartitionTimeLimit"))
    submitted: list[str] = []
    recorded = []
    with QueueWatch(jobs(1), lambda: list(submitted), recorded.append):
        submitted.append("12_0")
        deadline = time.monotonic() + 20
        while len(commands.calls("squeue")) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert recorded == [["12_0"]]
        submitted.append("13")  # ends with the command
    assert recorded == [["12_0"], ["12_0", "13"]]
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("error", [StoreError("disk full"), OSError("stale file handle")])
def test_a_file_system_that_fails_does_not_end_the_wait(error: Exception) -> None:
    def fail(*_: object) -> list[str]:
        raise error

    QueueWatch(jobs(1), lambda: ["12"], fail).find()
    QueueWatch(jobs(1), fail, None).find()
