"""Asks SLURM's commands why jobs wait, and which limits the partitions have.

On a machine without SLURM, or if the controller does not answer, the functions return None.
"""

import math
import os
import re
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

ANSWER_S = 10.0
"""A command that takes longer is ended, and counts as no answer."""

ASK_EVERY_S = 45.0
"""The shortest time between two questions about the queue: each takes the controller some work."""

UNDECIDED = "None"
"""The reason of a job that the scheduler has not looked at yet."""

_WAITING_STATES = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}

_ORDINARY = {UNDECIDED, "Priority", "Resources", "JobArrayTaskLimit", "WaitingForScheduling"}

_ADVICE = (
    (
        r"PartitionTimeLimit",
        "the time limit is above that of the partition; cancel the job, and rerun with a smaller "
        "hydra.launcher.timeout_min or another hydra.launcher.partition",
    ),
    (
        r"(QOS|Assoc)MaxWallDurationPerJobLimit|(QOS|Association)TimeLimit",
        "the time limit is above that of the QOS or the account; cancel the job, and rerun with a smaller "
        "hydra.launcher.timeout_min or another hydra.launcher.qos",
    ),
    (
        r"(QOS|Assoc)Max\w+MinutesPerJob(Limit)?",
        "the resources of one job, multiplied by its time limit, are above the limit of the QOS or the account; cancel "
        "the job, and rerun with a smaller hydra.launcher.timeout_min, gpus_per_node or cpus_per_task",
    ),
    (
        r"(QOS|Assoc)Max\w+Per(Job|Node)(Limit)?",
        "the resources of one job are above the limit of the QOS or the account; cancel the job, and rerun with a "
        "smaller hydra.launcher.mem_gb, gpus_per_node or cpus_per_task, or another hydra.launcher.qos",
    ),
    (
        r"QOSMin\w+",
        "the QOS demands more resources for one job; cancel the job, and rerun with another hydra.launcher.qos",
    ),
    (
        r"PartitionConfig|PartitionNodeLimit|BadConstraints|MaxMemPerLimit",
        "no node of the partition has what the job requests; cancel the job, and rerun with a smaller "
        "hydra.launcher.mem_gb, gpus_per_node or cpus_per_task, or another hydra.launcher.partition",
    ),
    (
        r"PartitionDown|PartitionInactive",
        "the partition starts no jobs until an administrator changes that; wait, or cancel the job and rerun with "
        "another hydra.launcher.partition",
    ),
    (
        r"InvalidAccount|AccountNotAllowed",
        "the account does not exist or may not use this partition; cancel the job, and rerun with another "
        "hydra.launcher.account",
    ),
    (
        r"InvalidQOS|QOSNotAllowed",
        "the QOS does not exist or may not be used here; cancel the job, and rerun with another hydra.launcher.qos",
    ),
    (
        r"(QOS|Assoc)(MaxJobs|Grp)\w+|(QOS|Association)(Job|Resource)Limit|Max\w+PerAccount|QOSMax\w+PerUser(Limit)?",
        "the account or the QOS has reached its limit; the job starts when other jobs have ended, or when the limit "
        "is raised",
    ),
    (
        r"DependencyNeverSatisfied",
        "the job depends on a job that has failed; cancel the job, and rerun without this dependency",
    ),
    (r"JobHeldUser", "the job is held; `scontrol release` and the id of the job let it start"),
    (
        r"JobHeldAdmin|JobHoldMaxRequeue|launch failed requeued held",
        "SLURM or an administrator holds the job; ask the administrators of the cluster",
    ),
    (r"ReservationDeleted", "the reservation of the job was deleted; cancel the job, and rerun without it"),
)
"""Patterns of SLURM's names for reasons that last until a person acts or other jobs end, with their meaning."""


@dataclass(frozen=True)
class Partition:
    """The limits of a partition. `cpus`, `gpus` and `memory_mb` (MiB) are the largest of any of its nodes.

    `state` is that of sinfo: `up`, `down` (jobs are queued, none starts), `drain` or `inact` (no job is accepted).
    A limit is None where SLURM does not tell it, and `minutes` is infinite where there is none.
    """

    name: str
    is_default: bool
    state: str
    minutes: float | None
    cpus: int | None
    gpus: int | None
    memory_mb: int | None


def waiting(job_ids: Collection[str]) -> dict[str, str] | None:
    """Returns, by id, the reason why each job waits; None if SLURM does not answer. Other jobs are left out.

    Ids are those of `squeue`: `12` for a job, `12_0` for a task of an array.
    """
    jobs = sorted({job_id.partition("_")[0] for job_id in job_ids if re.fullmatch(r"\d+(_\d+)?", job_id)})
    if not jobs:
        return {}
    said = _answer("squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r")
    return None if said is None else {key: reason for key, reason in reasons(said).items() if key in job_ids}


def reasons(said: str) -> dict[str, str]:
    """Returns the reason of each waiting job in the output of `squeue --format='%i|%T|%r'`, by the job's id."""
    lines = (line.split("|", 2) for line in said.splitlines() if line.count("|") >= 2)
    return {job_id.strip(): _code(reason) for job_id, state, reason in lines if state.strip() in _WAITING_STATES}


def is_ordinary(reason: str) -> bool:
    """Whether a job that waits for `reason` only waits its turn."""
    return reason in _ORDINARY


def advice(reason: str) -> str | None:
    """Returns the meaning of a reason and the way out; None if a job only waits its turn, or for an unknown one."""
    return next((text for pattern, text in _ADVICE if re.fullmatch(pattern, reason)), None)


def partitions() -> list[Partition] | None:
    """Returns all partitions, hidden ones included; None if SLURM does not answer."""
    said = _answer("sinfo", "--noheader", "--all", "--exact", "--format=%P|%a|%l|%c|%G|%m")
    return None if said is None else parse_partitions(said)


def parse_partitions(said: str) -> list[Partition]:
    """Reads the output of `sinfo --format='%P|%a|%l|%c|%G|%m'`, which has a line for each kind of node."""
    found: dict[str, Partition] = {}
    for line in said.splitlines():
        if line.count("|") != 5:
            continue
        name, state, limit, cpus, gres, memory = (cell.strip() for cell in line.split("|"))
        # A node without a configured memory has 1 MiB.
        sizes = _number(cpus), _gpus(gres), _number(memory, least=2)
        own = Partition(name.removesuffix("*"), name.endswith("*"), state, parse_minutes(limit), *sizes)
        other = found.get(own.name, own)
        found[own.name] = replace(
            own,
            cpus=_larger(own.cpus, other.cpus),
            gpus=_larger(own.gpus, other.gpus),
            memory_mb=_larger(own.memory_mb, other.memory_mb),
        )
    return list(found.values())


def parse_minutes(limit: str) -> float | None:
    """Returns a time limit in minutes, infinite for none; None if `limit` is not one.

    The forms are those of sbatch and sinfo: `60`, `60:00`, `1:00:00`, `1-00`, `1-00:00:00`, `infinite`.
    """
    if limit.lower() in ("infinite", "unlimited", "-1"):
        return math.inf
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", limit)
    if match is None:
        return None
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        minutes = days * 1440 + first * 60 + second + third / 60
    else:
        minutes = first + second / 60
    return minutes or math.inf  # zero requests no limit


def may_exceed_partition(qos: str) -> bool:
    """Whether a quality of service lifts the time limits of partitions. True if SLURM does not answer."""
    said = _answer("sacctmgr", "--noheader", "--parsable2", "show", "qos", qos, "format=flags")
    return said is None or "PartitionTimeLimit" in re.split(r"[,\s]", said)


class Reasons:
    """Asks for the reasons of waiting jobs, at most once in `ASK_EVERY_S`; in between it repeats the last answer."""

    def __init__(self) -> None:
        self._answer: dict[str, str] = {}
        self._asked = -math.inf

    def of(self, job_ids: Collection[str]) -> dict[str, str]:
        """Returns, by id, the reason why each job waits; nothing for undecided ones, or if SLURM does not answer."""
        if job_ids and time.monotonic() - self._asked >= ASK_EVERY_S:
            found = waiting(job_ids) or {}
            self._answer = {job_id: reason for job_id, reason in found.items() if reason != UNDECIDED}
            self._asked = time.monotonic()
        return self._answer


def _answer(*command: str) -> str | None:
    # Variables of the user would change the selection of jobs or the format.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SINFO_"))}
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _code(reason: str) -> str:
    """A reason without its details, such as the list of unavailable nodes, which changes often."""
    return reason.partition(",")[0].strip()[:60]


def _number(text: str, least: int = 1) -> int | None:
    """The number that begins `text`; None below `least`: sinfo shows such a number for a value that is not known."""
    match = re.match(r"\d{1,18}(?!\d)", text)
    number = int(match[0]) if match else 0
    return number if number >= least else None


def _gpus(gres: str) -> int | None:
    """The number of GPUs in a node's generic resources: `gpu:a100:4(S:0-1),nvme:1`."""
    if gres in ("", "(null)"):
        return 0
    counts: Sequence[str] = re.findall(r"(?:^|,)gpu(?::[^:,()]+)*?:(\d{1,9})(?=[,(]|$)", gres)
    return sum(map(int, counts)) if counts or "gpu" not in gres else None


def _larger(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)
