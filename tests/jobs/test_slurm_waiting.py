"""Jobs that a real SLURM cannot start as they are: some are refused, and of the others the reason is told."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.slurm_cluster import Cluster, why_not
from support.slurm_sweep import Sweep, sweeps

from qk_sniffer.jobs.slurm import ASK_EVERY_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2) as cluster:
        yield cluster


@pytest.fixture
def sweep(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a b c d e f g h"}) + "\n")
    with sweeps(cluster, tmp_path, texts) as start:
        yield start


def test_what_no_job_can_get_is_refused_at_submission(
    sweep: Callable[..., Sweep], cluster: Cluster, tmp_path: Path
) -> None:
    too_much = {"timeout_min": 1440, "mem_gb": 64, "gpus_per_node": 2, "cpus_per_task": 999}
    running = sweep(*(f"hydra.launcher.{key}={value}" for key, value in too_much.items()))
    code, said = running.wait()
    assert code == 2 and "4 problems in the configuration" in said, said
    for problem in (
        "timeout_min is 1440, but the time limit of partition main is 60 minutes; use hydra.launcher.timeout_min=60 ",
        "mem_gb is 64, but no node of partition main has more memory than 4,000 MB; use hydra.launcher.mem_gb=3",
        "gpus_per_node is 2, but no node of partition main has more GPUs than 1; use hydra.launcher.gpus_per_node=1",
        f"cpus_per_task is 999, but no node of partition main has more CPUs than {os.cpu_count()}; use ",
    ):
        assert f"  - hydra.launcher.{problem}" in said
    running = sweep("hydra.launcher.partition=shrt")
    code, said = running.wait()
    assert code == 2 and "SLURM has no partition 'shrt', did you mean short?; valid: main, short" in said
    cluster.run("scontrol", "update", "PartitionName=short", "State=DRAIN")
    try:
        running = sweep("hydra.launcher.partition=short", "hydra.launcher.timeout_min=5")
        code, said = running.wait()
    finally:
        cluster.run("scontrol", "update", "PartitionName=short", "State=UP")
    assert code == 2 and "partition short accepts no jobs now (drain); wait, or use another" in said
    assert not running.jobs() and not (tmp_path / "outputs").exists()


def test_the_reason_is_told_within_a_minute_and_again_when_it_changes(
    sweep: Callable[..., Sweep], cluster: Cluster
) -> None:
    short = ("scontrol", "update", "PartitionName=short")
    cluster.run(*short, "State=DOWN")
    running = sweep(
        *("hydra.launcher.partition=short", "hydra.launcher.timeout_min=5", "sampler.seed=0,1"),
        "output.data_root=outputs/seed-${sampler.seed}",
    )
    assert running.process.stdout is not None
    out = running.process.stdout.fileno()
    os.set_blocking(out, False)
    said = ""

    def is_told(reason: str) -> bool:
        nonlocal said
        with suppress(BlockingIOError):
            said += os.read(out, 1 << 20).decode()
        return f"{reason}: " in said

    def is_shown(reason: str) -> bool:
        lines = running.status()
        return len(lines) == 2 and all((line["state"], line["reason"]) == ("queued", reason) for line in lines)

    running.until(running.jobs, "the jobs are queued")
    for reason, change in (("PartitionDown", ()), ("PartitionTimeLimit", ("State=UP", "MaxTime=4"))):
        if change:
            cluster.run(*short, *change)
        running.until(lambda reason=reason: is_told(reason), f"{reason} is told", patience_s=60)  # type: ignore[misc]
        assert is_shown(reason)
    repeated = time.monotonic() + ASK_EVERY_S + 5
    running.until(lambda: is_told("None") or time.monotonic() > repeated, "the launcher has asked again")
    cluster.run(*short, "MaxTime=5")
    os.set_blocking(out, True)
    code, rest = running.wait()
    assert code == 0, said + rest
    told = [line for line in (said + rest).splitlines() if "SLURM does not start" in line]
    assert len(told) == 2, told
    array = running.job(0).partition("_")[0]
    for line, reason in zip(told, ("PartitionDown", "PartitionTimeLimit"), strict=True):
        assert f"SLURM does not start jobs 0-1 (SLURM {array}): {reason}: " in line
