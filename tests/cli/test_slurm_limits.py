"""What no job of a partition can get is refused before anything is submitted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.slurm_commands import SINFO, Commands

from qk_sniffer.cli import slurm_limits

FITS = {"timeout_min": 60, "mem_gb": 3, "gpus_per_node": 1, "cpus_per_task": 2, "tasks_per_node": 1}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands(tmp_path / "bin", monkeypatch)
    commands.say("sinfo", SINFO)
    return commands


def problems(**launcher: Any) -> list[str]:
    return list(slurm_limits.problems(OmegaConf.create(FITS | launcher)))


def test_what_fits_is_submitted(commands: Commands) -> None:
    assert problems() == problems(partition="main") == problems(partition="hid,short", gpus_per_node=0) == []
    assert len(commands.calls("sinfo")) == 3


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        (
            {"timeout_min": 1440},
            "hydra.launcher.timeout_min is 1440, but the time limit of partition main is 60 minutes; use "
            "hydra.launcher.timeout_min=60 (a job that reaches its time limit is requeued and resumes), or another "
            "hydra.launcher.partition: hid",
        ),
        (
            {"timeout_min": 61, "partition": "short,main"},
            "hydra.launcher.timeout_min is 61, but the time limit of the partitions main, short is 60 minutes; use "
            "hydra.launcher.timeout_min=60 (a job that reaches its time limit is requeued and resumes), or another "
            "hydra.launcher.partition: hid",
        ),
        (
            {"additional_parameters": {"time": "1-00:00:00"}, "partition": "short"},
            "hydra.launcher.additional_parameters.time is 1-00:00:00, but the time limit of partition short is 5 "
            "minutes; use hydra.launcher.additional_parameters.time=5 (a job that reaches its time limit is requeued "
            "and resumes), or another hydra.launcher.partition: hid",
        ),
        (
            {"mem_gb": 64},
            "hydra.launcher.mem_gb is 64, but no node of partition main has more memory than 4,000 MB; use "
            "hydra.launcher.mem_gb=3",
        ),
        (
            {"gpus_per_node": 1, "partition": "hid"},
            "hydra.launcher.gpus_per_node is 1, but no node of partition hid has more GPUs than 0; use "
            "hydra.launcher.gpus_per_node=0, or another hydra.launcher.partition: main, short",
        ),
        (
            {"gpus_per_node": 2},
            "hydra.launcher.gpus_per_node is 2, but no node of partition main has more GPUs than 1; use "
            "hydra.launcher.gpus_per_node=1",
        ),
        (
            {"cpus_per_task": 8},
            "hydra.launcher.cpus_per_task is 8, but no node of partition main has more CPUs than 2; use "
            "hydra.launcher.cpus_per_task=2",
        ),
        (
            {"cpus_per_task": 2, "tasks_per_node": 2},
            "hydra.launcher.cpus_per_task is 2 for each of 2 tasks, but no node of partition main has more CPUs "
            "than 2; use hydra.launcher.cpus_per_task=1",
        ),
        (
            {"partition": "mian"},
            "hydra.launcher.partition is 'mian': SLURM has no partition 'mian', did you mean main?; valid: main, "
            "short, hid, down",
        ),
    ],
)
def test_what_no_job_can_get_is_refused(launcher: Mapping[str, Any], said: str, commands: Commands) -> None:
    assert problems(**launcher) == [said]


def test_all_problems_are_told_together(commands: Commands) -> None:
    found = problems(timeout_min=1440, mem_gb=64, gpus_per_node=4, cpus_per_task=8)
    assert [problem.split()[0] for problem in found] == [
        f"hydra.launcher.{key}" for key in ("timeout_min", "mem_gb", "gpus_per_node", "cpus_per_task")
    ]


def test_no_limit_is_larger_than_any(commands: Commands) -> None:
    assert problems(timeout_min=0)[0].startswith(
        "hydra.launcher.timeout_min is 0, but the time limit of partition main is 60"
    )
    assert problems(timeout_min=0, partition="down") == []


def test_a_partition_that_accepts_no_jobs(commands: Commands) -> None:
    commands.say("sinfo", "main*|drain|1:00:00|2|gpu:1|4000\nshort|inact|5:00|2|gpu:1|4000\n")
    assert problems() == ["partition main accepts no jobs now (drain); wait, or use another hydra.launcher.partition"]
    commands.say("sinfo", SINFO.replace("short|up", "short|inact"))
    assert problems(partition="short", timeout_min=5) == [
        "partition short accepts no jobs now (inact); wait, or use another hydra.launcher.partition: main, hid"
    ]
    assert problems(partition="short,main") == []
    assert problems(partition="down") == [], "it is queued, and the reason is told"


def test_variables_of_sbatch_precede_the_settings(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "hid")
    assert problems(timeout_min=1440, gpus_per_node=0) == []
    monkeypatch.setenv("SBATCH_TIMELIMIT", "2-00")
    (found,) = problems(gpus_per_node=0)
    assert found.startswith("SBATCH_TIMELIMIT is 2-00, but the time limit of partition hid is 1440 minutes; ")
    monkeypatch.setenv("SBATCH_PARTITION", "none")
    assert problems()[0].startswith("SBATCH_PARTITION is 'none': SLURM has no partition 'none'")


@pytest.mark.parametrize(
    "extra", [{"mem": "1G"}, {"mem-per-cpu": "1G"}, {"mem_per_gpu": "1G"}], ids=lambda extra: next(iter(extra))
)
def test_a_size_that_another_parameter_gives_is_left_to_slurm(extra: dict[str, str], commands: Commands) -> None:
    assert problems(mem_gb=64, additional_parameters=extra) == []


def test_a_quality_of_service_that_lifts_the_limit(commands: Commands) -> None:
    commands.say("sacctmgr", "PartitionTimeLimit\n")
    assert problems(timeout_min=1440, qos="long") == []
    commands.say("sacctmgr", "DenyOnLimit\n")
    assert len(problems(timeout_min=1440, qos="long")) == 1


def test_limits_that_are_not_known_refuse_nothing(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"timeout_min": 10**6, "mem_gb": 10**6, "gpus_per_node": 99, "cpus_per_task": 999}
    for said in ("", "main|up|1:00|2|(null)|4\n", "main*|up|n/a|0|(null)|0\n", "main*|up|n/a|999|gpu|1\n"):
        commands.say("sinfo", said)
        assert problems(**large) == [], said or "no partition; no default; no node; no configured values"
    commands.say("sinfo", SINFO, code=1)
    assert problems(**large) == []
    commands.say("sinfo", SINFO)
    assert problems(**large, additional_parameters={"clusters": "other"}) == []
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    assert problems(**large) == []
