"""SLURM's answers are read; where there is none, nothing fails."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.slurm_commands import SINFO, SQUEUE, Commands

from qk_sniffer.jobs import slurm
from qk_sniffer.jobs.slurm import Partition


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(tmp_path / "bin", monkeypatch)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("60", 60),
        ("60:00", 60),
        ("5:00", 5),
        ("1:30", 1.5),
        ("1:00:00", 60),
        ("1-00", 1440),
        ("1-12:30", 2190),
        ("1-00:00:00", 1440),
        ("7-00:00:00", 10080),
        ("infinite", math.inf),
        ("UNLIMITED", math.inf),
        ("0", math.inf),
        ("n/a", None),
        ("", None),
        ("soon", None),
        ("9" * 5000, None),
        ("1-" + "9" * 5000, None),
    ],
)
def test_time_limits(text: str, minutes: float | None) -> None:
    assert slurm.parse_minutes(text) == minutes


def test_partitions() -> None:
    main, *others = slurm.parse_partitions(SINFO)
    assert main == Partition("main", is_default=True, state="up", minutes=60, cpus=2, gpus=1, memory_mb=4000)
    assert [(each.name, each.minutes, each.gpus) for each in others] == [
        ("short", 5, 1),
        ("hid", 1440, 0),
        ("down", math.inf, 1),
    ]


def test_a_partition_with_several_kinds_of_nodes_has_the_limits_of_the_largest() -> None:
    said = "gpu*|up|2-00:00:00|64|gpu:a100:4(S:0-1),nvme:1|515000\ngpu*|up|2-00:00:00|128|gpu:h100:2,gpu:l40:6|256000\n"
    assert slurm.parse_partitions(said) == [Partition("gpu", True, "up", 2880, 128, 8, 515000)]


@pytest.mark.parametrize(
    ("line", "partition"),
    [
        ("a|up|n/a|0|(null)|0", Partition("a", False, "up", None, None, 0, None)),
        (f"a|up|{'9' * 5000}|{'9' * 5000}|gpu:{'9' * 5000}|{'9' * 5000}", Partition("a", False, "up", *[None] * 4)),
        ("a|up|infinite|16|gpu|1", Partition("a", False, "up", math.inf, 16, None, None)),
        (
            "a|up|infinite|16|nic:4,gpu:1g.5gb:7(S:0,2)|2000+",
            Partition("a", False, "up", math.inf, 16, 7, 2000),
        ),
    ],
)
def test_a_limit_that_is_not_told_is_unknown(line: str, partition: Partition) -> None:
    assert slurm.parse_partitions(f"CLUSTER: x\n{line}\n") == [partition]


def test_reasons_of_waiting_jobs() -> None:
    found = slurm.reasons(SQUEUE)
    assert found["12_0"] == "PartitionTimeLimit" and found["12_3"] == "None" and "7" not in found
    assert found["17"] == "ReqNodeNotAvail", "the list of nodes changes often"
    assert slurm.reasons("12|PENDING|see|the admins\nno line\n") == {"12": "see|the admins"}


@pytest.mark.parametrize(
    ("reason", "setting"),
    [
        ("PartitionTimeLimit", "hydra.launcher.timeout_min"),
        ("QOSMaxWallDurationPerJobLimit", "hydra.launcher.timeout_min"),
        ("AssocMaxCpuMinutesPerJobLimit", "hydra.launcher.timeout_min"),
        ("QOSMaxGRESPerJob", "gpus_per_node"),
        ("AssocMaxMemPerNode", "hydra.launcher.mem_gb"),
        ("PartitionConfig", "hydra.launcher.mem_gb"),
        ("BadConstraints", "hydra.launcher.mem_gb"),
        ("InvalidAccount", "hydra.launcher.account"),
        ("InvalidQOS", "hydra.launcher.qos"),
        ("QOSMinGRES", "hydra.launcher.qos"),
        ("PartitionDown", "hydra.launcher.partition"),
        ("AssocMaxJobsLimit", "when other jobs have ended"),
        ("QOSMaxJobsPerUserLimit", "when other jobs have ended"),
        ("AssocGrpCPURunMinutesLimit", "when other jobs have ended"),
        ("DependencyNeverSatisfied", "without this dependency"),
        ("JobHeldUser", "scontrol release"),
    ],
)
def test_a_reason_that_does_not_end_by_itself_has_a_way_out(reason: str, setting: str) -> None:
    assert setting in str(slurm.advice(reason)) and not slurm.is_ordinary(reason)


@pytest.mark.parametrize("reason", ["Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Licenses"])
def test_a_job_that_waits_its_turn_needs_no_advice(reason: str) -> None:
    assert slurm.advice(reason) is None


def test_one_call_for_all_jobs_whatever_the_user_has_set(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.say("squeue", SQUEUE, before='[ -z "$SQUEUE_STATES" ] || exit 3')
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    assert slurm.waiting({"12_0", "12_2", "9", "7", "12_9"}) == {
        "12_0": "PartitionTimeLimit",
        "12_2": "Priority",
        "9": "PartitionDown",
    }
    assert commands.calls("squeue") == ["--noheader --array --jobs=12,7,9 --format=%i|%T|%r"]


def test_only_ids_of_slurm_are_asked_for(commands: Commands) -> None:
    commands.say("squeue", SQUEUE)
    assert slurm.waiting({"--all", "1,2", "1\0", ""}) == {} and not commands.calls("squeue")


@pytest.mark.parametrize("how", ["missing", "fails", "hangs", "garbage"])
def test_no_answer_is_no_error(how: str, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ANSWER_S", 0.2)
    for name in ("squeue", "sinfo", "sacctmgr"):
        if how == "garbage":
            commands.say(name, "\xff|\n\n|||||||\n1|PENDING\n")
        elif how != "missing":
            commands.say(name, SQUEUE, code=int(how == "fails"), before="exec sleep 30" if how == "hangs" else "")
    if how == "garbage":
        assert (slurm.waiting({"12"}), slurm.partitions()) == ({}, [])
    else:
        assert (slurm.waiting({"12"}), slurm.partitions()) == (None, None)
        assert slurm.may_exceed_partition("long"), "it cannot be known"
    assert slurm.Reasons().of({"12"}) == {}


def test_a_quality_of_service_may_lift_the_limits_of_partitions(commands: Commands) -> None:
    for said, lifts in [("DenyOnLimit,PartitionTimeLimit\n", True), ("DenyOnLimit\n", False), ("", False)]:
        commands.say("sacctmgr", said)
        assert slurm.may_exceed_partition("long") == lifts


def test_reasons_are_asked_for_from_time_to_time(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.say("squeue", SQUEUE)
    clock = [1000.0]
    monkeypatch.setattr(slurm, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    reasons = slurm.Reasons()
    assert reasons.of(set()) == {} and commands.calls("squeue") == []
    assert reasons.of({"9", "12_3"}) == {"9": "PartitionDown"}, "None is no reason"
    for clock[0] in (1001.0, 1044.0):
        assert reasons.of({"9"}) == {"9": "PartitionDown"}
    assert len(commands.calls("squeue")) == 1
    clock[0] = 1045.0
    commands.say("squeue", "")
    assert reasons.of({"9"}) == {} and len(commands.calls("squeue")) == 2
