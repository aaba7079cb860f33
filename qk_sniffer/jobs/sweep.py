"""Tracks the jobs of a sweep: their settings at submission, their states, and the table of all.

The folder of a sweep holds `sweep.json`, its jobs as they were submitted, and a lock that is held while its command
runs. Hydra's folder of each job holds `status.json`, and a lock that is held while the job runs. So anyone who sees
these folders can read the states of the jobs, wherever they run.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, NotRequired, TypedDict, TypeVar, cast

from msgspec import Meta
from tqdm import tqdm

from qk_sniffer.config import from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.job_status import (
    FAILED,
    GOOD,
    LOCK,
    NOT_STARTED,
    QUEUED,
    STATUS_FILE,
    Status,
    in_brief,
    read_status,
    recorded_status,
    status_of,
)
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig, resolve
from qk_sniffer.store import stored
from qk_sniffer.store.disk import explained, walk, write_atomic
from qk_sniffer.store.locks import Lock, TakenAwayError, hold, is_held
from qk_sniffer.store.own_files import starts_with
from qk_sniffer.store.stored import LARGE, Text, UnreadableError
from qk_sniffer.text import compact_ranges, folded, printable, shortened

log = logger(__name__)

SWEEP_FILE = "sweep.json"

NONCE = "QK_SNIFFER_SWEEP"
"""The variable that tells the jobs of a sweep which `sweep.json` has their settings. A launcher's processes inherit
it."""

_NO_SETTINGS = "none"
"""The value of this variable for the jobs of a sweep that records no settings."""

Settings = TypeVar("Settings")

MOST_JOBS = 10_000
"""The most jobs of a sweep. Each of them reads the settings of all, and `status` too."""

_SUBMIT_AGAIN = "move it away, and start the sweep again"


@dataclass(frozen=True)
class Job(Generic[Settings]):
    """One job of any program, as it would run. `arguments` differ between the jobs of its sweep."""

    number: int
    arguments: tuple[str, ...]
    config: Settings

    def __str__(self) -> str:
        return describe(self.number, self.arguments)


PlannedJob = Job[ResolvedConfig]
"""A job of the capture."""


def describe(number: int, arguments: Sequence[str]) -> str:
    """Names a job by its number and its own arguments: `job 0 (model=qwen3_8b)`."""
    return f"job {number} ({' '.join(arguments)})" if arguments else f"job {number}"


class _SweepJob(TypedDict):
    status: Status
    config: dict[str, Any]


class _Sweep(TypedDict):
    nonce: NotRequired[Text]
    outlive: bool
    ended: bool
    jobs: Annotated[list[_SweepJob], Meta(max_length=MOST_JOBS)]


def statuses(
    folder: Path, unreadable: Callable[[UnreadableError], None] = lambda error: log.warning("%s", error)
) -> dict[int, Status]:
    """Reads every status of the run or sweep in `folder`, by the job's number, queued jobs included.

    A file that cannot be read is left out. `unreadable` gets its error, and by default logs a warning. A folder that
    the user has named may also hold other runs and sweeps, whose jobs have the same numbers: they do not count.
    """
    jobs: dict[int, Status] = {}
    with _left_out(unreadable):
        jobs |= {status.number: status for status in queued(folder)}
    found = dict(jobs)
    for path in _status_files(folder):
        with _left_out(unreadable):
            status = read_status(path)
            if not jobs or (status.number in jobs and _is_of(status, jobs[status.number])):
                found[status.number] = status
    return found


def _is_of(status: Status, job: Status) -> bool:
    """Whether a status is of the dataset and shard of `job`."""
    of_each = [(each.data_root, each.shard_index, each.shard_count) for each in (status, job)]
    return of_each[0] == of_each[1]


def _status_files(folder: Path) -> list[Path]:
    """Returns the status files of the run or sweep in `folder`, and not those of sweeps in folders of it."""
    found = []
    for path, folders, files in walk(folder):
        folders[:] = [name for name in folders if not os.path.lexists(path / name / SWEEP_FILE)]
        if STATUS_FILE in files:
            found.append(path / STATUS_FILE)
    return sorted(found)


def _left_by_a_sweep(folder: Path, jobs: Sequence[PlannedJob]) -> Iterator[Path]:
    """Yields the status files in `folder` that would be taken for those of `jobs`, or are of its earlier sweep.

    A folder that the user has named may also hold other runs and sweeps, and files of other programs.
    """
    own = [Status.of(job.number, job.config, state=QUEUED) for job in jobs]
    with suppress(UnreadableError):
        own += queued(folder)
    for path in _status_files(folder):
        with suppress(OSError, UnreadableError):
            status = recorded_status(path)
            if any(status.number == job.number and _is_of(status, job) for job in own):
                yield path


@contextmanager
def _left_out(unreadable: Callable[[UnreadableError], None]) -> Iterator[None]:
    try:
        yield
    except UnreadableError as error:
        unreadable(error)
    except OSError:
        pass  # it was removed in the meantime


@contextmanager
def announced(folder: Path, jobs: Sequence[PlannedJob], *, outlive: bool) -> Iterator[Callable[[Sequence[str]], None]]:
    """Records the jobs of a sweep in `folder`, while its command runs and afterwards.

    Processes that start within the block are jobs of this sweep, and take the settings of no other.
    `outlive` says that the jobs continue when the command ends, even if it was interrupted. Yields a function that
    records the jobs' ids on SLURM, those of the first jobs, once they are known.

    Raises:
        StoreError: the folder cannot be written, a sweep runs in it, jobs of an earlier one run or may still start, or
            the settings of all jobs are too large.
    """
    with explained(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / SWEEP_FILE
    facts: dict[str, Any] = {
        "nonce": secrets.token_hex(16),
        "outlive": outlive,
        "ended": False,
        "jobs": [
            {"status": asdict(Status.of(job.number, job.config, state=QUEUED)), "config": job.config.to_dict()}
            for job in jobs
        ],
    }
    if len(stored.encode(facts)) > LARGE:
        raise StoreError(
            f"the settings of all jobs of this sweep are larger than {LARGE >> 20:,} MB, and each job reads all: run "
            "it as several sweeps"
        )

    with hold(folder / LOCK, "running this sweep", of_user=True) as lock:
        _refuse_while_jobs_wait(folder)
        with explained(folder, "write"):
            left = [*_left_by_a_sweep(folder, jobs)]
            _refuse_while_jobs_run(folder, left)
            for file_of_job in left:
                file_of_job.unlink()

        def record_slurm_ids(job_ids: Sequence[str]) -> None:
            for job, job_id in zip(facts["jobs"], job_ids, strict=False):
                job["status"]["slurm_job_id"] = job_id
            if _is_held_still(lock):
                _write(file, facts)

        _write(file, facts)
        os.environ[NONCE] = facts["nonce"]
        try:
            yield record_slurm_ids
        finally:
            os.environ.pop(NONCE, None)
        if _is_held_still(lock):
            _write(file, facts | {"ended": True})


def _refuse_while_jobs_wait(folder: Path) -> None:
    """Refuses to replace the settings of jobs that SLURM may still start: their command ended before they did.

    Raises:
        StoreError: the folder has such jobs.
    """
    facts = _announced(folder)
    if facts is None or facts["ended"] or not facts["outlive"]:
        return
    waiting = {job["status"].number: job["status"] for job in facts["jobs"]}
    for file in _status_files(folder):
        with suppress(OSError, UnreadableError):
            status = recorded_status(file)
            # SLURM may restart a job in any other state.
            has_ended = status.state in (*GOOD, FAILED)
            if has_ended and status.number in waiting and _is_of(status, waiting[status.number]):
                del waiting[status.number]
    if waiting:
        raise StoreError(
            f"{folder} is the folder of an earlier sweep, whose jobs {compact_ranges(waiting)} may still start on "
            "SLURM with the settings in it. Give this sweep another folder (hydra.sweep.dir=...). If squeue shows that "
            f"none of them waits or runs, remove {folder / SWEEP_FILE}"
        )


def _refuse_while_jobs_run(folder: Path, files: Sequence[Path]) -> None:
    """Refuses to start a sweep next to jobs of an earlier one, whose command was killed.

    They hold the folders of the new jobs, and their states would be taken for those of the new jobs. `files` are the
    status files in `folder`.

    Raises:
        StoreError: a job with one of these runs.
    """
    running = [file.parent for file in files if is_held(file.with_name(LOCK))]
    if running:
        raise StoreError(
            f"{folder} is the folder of an earlier sweep, whose jobs still run in "
            f"{shortened([str(path.relative_to(folder)) for path in running], 5)}. Wait for them or end them, or give "
            "this sweep another folder (hydra.sweep.dir=...)"
        )


@contextmanager
def unannounced(folder: Path) -> Iterator[None]:
    """Has the processes that start within the block take the settings of no sweep: theirs records none.

    Raises:
        StoreError: the folder has the settings of another sweep.
    """
    if os.path.lexists(folder / SWEEP_FILE):
        raise StoreError(
            f"{folder} has the settings of an earlier sweep, whose jobs have the numbers of those of this one. Give it "
            "another folder (hydra.sweep.dir=...)"
        )
    os.environ[NONCE] = _NO_SETTINGS  # another sweep may take the folder while these jobs run
    try:
        yield
    finally:
        os.environ.pop(NONCE, None)


def _is_held_still(lock: Lock) -> bool:
    try:
        lock.check()
    except TakenAwayError as error:
        log.warning("the state of this run is not recorded: %s", error)
        return False
    return True


def submitted(folder: Path, number: int) -> ResolvedConfig | None:
    """The config with which a job of the sweep in `folder` was submitted; None if the sweep records no such job.

    Raises:
        UnreadableError: the file of the sweep cannot be read.
        StoreError: it was removed, is that of another sweep than the one that started this process, or lacks the job.
    """
    nonce = os.environ.get(NONCE)
    if nonce == _NO_SETTINGS:
        return None
    facts = _announced(folder)
    # Jobs of a command that was killed outlive it, and another sweep may have taken the folder before they read this.
    if nonce is not None and (facts is None or facts.get("nonce") != nonce):
        raise StoreError(
            f"{folder / SWEEP_FILE} was removed or is that of another sweep: the settings of job {number} are gone, "
            "and it does not run those of another job. Start its sweep again, in a folder of its own "
            "(hydra.sweep.dir=...)"
        )
    for job in facts["jobs"] if facts is not None else ():
        if job["status"].number == number:
            try:
                return resolve(from_dict(job["config"]))
            except ValueError as error:
                raise UnreadableError(
                    folder / SWEEP_FILE, f"is not understood (config of job {number}: {error})", _SUBMIT_AGAIN
                ) from error
    if nonce is not None:
        raise UnreadableError(folder / SWEEP_FILE, f"has no job {number}, which this process runs", _SUBMIT_AGAIN)
    return None


def queued(folder: Path) -> Iterator[Status]:
    """The jobs of the sweep in `folder`, as if none of them had started.

    Raises:
        UnreadableError: the file of the sweep cannot be read.
    """
    facts = _announced(folder)
    if facts is None:
        return
    waits = not facts["ended"] and (facts["outlive"] or is_held(folder / LOCK))
    for job in facts["jobs"]:
        yield replace(job["status"], state=QUEUED if waits else NOT_STARTED)


def _write(file: Path, facts: dict[str, Any]) -> None:
    write_atomic(file, stored.encode(facts), is_own=starts_with(rb'\{("nonce"|"outlive"): '))


def _announced(folder: Path) -> _Sweep | None:
    try:
        file = folder / SWEEP_FILE
        facts: Any = stored.read(file, _Sweep, way_out=_SUBMIT_AGAIN, most_bytes=LARGE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    jobs = [
        _SweepJob(status=status_of(job["status"], file, _SUBMIT_AGAIN), config=job["config"]) for job in facts["jobs"]
    ]
    return cast(_Sweep, facts | {"jobs": jobs})


def table(jobs: Sequence[PlannedJob], found: dict[int, Status], width: int | None = None) -> str:
    """A table of the jobs of a sweep and their results, folded to `width` characters; None is for any width."""
    rows = [("job", "model", "state", "rows", "time", "where", "its own arguments")]
    for job in jobs:
        status = found.get(job.number) or Status.of(job.number, job.config, state=NOT_STARTED)
        where = status.url or str(job.config.data_root)
        count = "" if status.rows is None else f"{status.rows:,}"
        taken = tqdm.format_interval(status.seconds) if status.state not in (QUEUED, NOT_STARTED) else ""
        rows.append((str(job.number), status.model, status.state, count, taken, where, " ".join(job.arguments)))
    messages = [(job, found[job.number].error) for job in jobs if job.number in found]
    errors = [f"{job}: {in_brief(message)}" for job, message in messages if message]
    return "\n".join([folded(rows, width, ("model", "where", "its own arguments")), *map(printable, errors)])
