"""The jobs of a run: what each was to do, the status file that it leaves, and the table of all of them.

In the folder of a sweep, `sweep.json` holds its jobs as they were submitted, and a lock beside it is held while the
command that began it runs. In the folder that Hydra makes for each job, `status.json` says how the job stands, and a
lock beside it is held while it runs. So whoever started a sweep, or anybody else, can read how its jobs stand, wherever
they run.
"""

import json
import os
import socket
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qk_sniffer.config import from_dict
from qk_sniffer.resolved import ResolvedConfig, resolve
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.locks import hold, is_held, restart_patience_s
from qk_sniffer.text import aligned

STATUS_FILE, SWEEP_FILE, LOCK = "status.json", "sweep.json", "job.lock"

QUEUED, RUNNING, REQUEUED, DONE, PUBLISHED = "queued", "running", "requeued", "done", "published"
FAILED, INTERRUPTED, NOT_STARTED = "failed", "interrupted", "not started"

GOOD = (DONE, PUBLISHED)
"""The states of a job that came to its end."""


@dataclass(frozen=True)
class PlannedJob:
    """One job as it would run. `arguments` are those that differ between the jobs of its sweep."""

    number: int
    arguments: tuple[str, ...]
    config: ResolvedConfig

    def __str__(self) -> str:
        return describe(self.number, self.arguments)


def describe(number: int, arguments: Sequence[str]) -> str:
    """A job by its number and what sets it apart: `job 0 (model=qwen3_8b)`."""
    return f"job {number} ({' '.join(arguments)})" if arguments else f"job {number}"


@dataclass
class Status:
    """How a job stands. `error` is what it failed with, in one line, and `code` its exit code.

    `since` is when it was queued, or began for the last time (seconds since 1970), `seconds` what it took since then,
    `restarts` how often SLURM has begun it anew; `rows` are those of the whole dataset, once it is made.
    """

    number: int
    data_root: str
    model: str
    shard_index: int = 0
    shard_count: int = 1
    state: str = RUNNING
    since: float = field(default_factory=time.time)
    seconds: float = 0.0
    rows: int | None = None
    url: str | None = None
    error: str | None = None
    code: int = 0
    host: str | None = None
    slurm_job_id: str | None = None
    restarts: int = 0

    @classmethod
    def of(cls, number: int, config: ResolvedConfig, *, state: str) -> "Status":
        """The status of the job of `config`."""
        root = str(config.data_root.absolute())
        shard = config.shard
        return cls(number, root, config.model.slug or "", shard.index, shard.count, state)

    @classmethod
    def here(cls, number: int, config: ResolvedConfig) -> "Status":
        """The status of a job that begins in this process."""
        status = cls.of(number, config, state=RUNNING)
        status.host = socket.gethostname()
        status.slurm_job_id = slurm_job_id()
        status.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return status

    def succeed(self, rows: int | None, url: str | None) -> None:
        """Notes what the job left."""
        self.state = DONE if url is None else PUBLISHED
        self.rows, self.url = rows, url

    def fail(self, message: str, *, code: int = 1) -> None:
        """Notes that the job failed with `message`, and the exit code that says so."""
        self.state, self.error, self.code = FAILED, textwrap.shorten(message, 300, placeholder=" ..."), code

    def write(self, folder: Path) -> None:
        """Puts the status file into a job's folder."""
        _write(folder / STATUS_FILE, asdict(self))


def slurm_job_id() -> str | None:
    """This process's job as SLURM's commands name it, None outside of SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


@contextmanager
def recorded(status: Status, folder: Path) -> Iterator[None]:
    """Keeps the status file in `folder` while the body runs, which sets the state when it ends."""
    start = time.monotonic()
    with hold(folder / LOCK, "running this job", wait_s=restart_patience_s()):
        status.write(folder)
        try:
            yield
        finally:
            if status.state == RUNNING:
                status.state = INTERRUPTED
            status.seconds = round(time.monotonic() - start, 3)
            status.write(folder)


def read_status(file: Path) -> Status:
    """The status in `file`; a job that left no last word has failed."""
    status = Status(**json.loads(file.read_text()))
    if status.state == RUNNING and not is_held(file.with_name(LOCK)):
        status = Status(**json.loads(file.read_text()))  # it may have ended in between
        if status.state == RUNNING:
            status.seconds = max(file.stat().st_mtime - status.since, 0.0)
            status.fail("ended without a word: it was killed, or its machine failed (out of memory, time limit)")
    return status


def statuses(folder: Path) -> dict[int, Status]:
    """Every status of the run or sweep in `folder`, by the job's number: those that wait in a queue too."""
    found = {status.number: status for status in queued(folder)}
    for path in sorted(folder.rglob(STATUS_FILE)):
        status = read_status(path)
        found[status.number] = status
    return found


@contextmanager
def announced(folder: Path, jobs: Sequence[PlannedJob], *, outlive: bool) -> Iterator[None]:
    """Says in `folder` what the jobs of a sweep are, while and after its command runs.

    `outlive`: the jobs go on when the command is gone, and wait for their turn although the block was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SWEEP_FILE
    facts: dict[str, Any] = {
        "outlive": outlive,
        "ended": False,
        "jobs": [
            {"status": asdict(Status.of(job.number, job.config, state=QUEUED)), "config": job.config.to_dict()}
            for job in jobs
        ],
    }
    for left in folder.rglob(STATUS_FILE):  # by an earlier sweep in the same folder
        if not is_held(left.with_name(LOCK)):
            left.unlink()
    with hold(folder / LOCK, "running this sweep"):
        _write(file, facts)
        yield
        _write(file, facts | {"ended": True})


def submitted(folder: Path, number: int) -> ResolvedConfig | None:
    """The config with which a job of the sweep in `folder` was submitted; None where none was announced."""
    for job in _announced(folder).get("jobs", ()):
        if job["status"]["number"] == number:
            return resolve(from_dict(job["config"]))
    return None


def queued(folder: Path) -> Iterator[Status]:
    """The jobs that were announced in `folder`, as if none of them had begun."""
    facts = _announced(folder)
    waits = not facts.get("ended") and (facts.get("outlive") or is_held(folder / LOCK))
    for job in facts.get("jobs", ()):
        yield Status(**job["status"] | {"state": QUEUED if waits else NOT_STARTED})


def _write(file: Path, facts: dict[str, Any]) -> None:
    write_atomic(file, json.dumps(facts).encode())


def _announced(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / SWEEP_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return facts


def table(jobs: Sequence[PlannedJob], found: dict[int, Status]) -> str:
    """The jobs of a sweep, a line each, with how they ended."""
    rows = [("job", "model", "state", "rows", "time", "where", "what set it apart")]
    for job in jobs:
        status = found.get(job.number) or Status.of(job.number, job.config, state=NOT_STARTED)
        where = status.url or str(job.config.data_root)
        count = "" if status.rows is None else f"{status.rows:,}"
        taken = tqdm.format_interval(status.seconds) if status.state not in (QUEUED, NOT_STARTED) else ""
        rows.append((str(job.number), status.model, status.state, count, taken, where, " ".join(job.arguments)))
    errors = [f"{job}: {found[job.number].error}" for job in jobs if job.number in found and found[job.number].error]
    return "\n".join([aligned(rows), *errors])
