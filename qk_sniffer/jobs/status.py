"""Finds the jobs and datasets below a folder, and reads from their files how far each has come."""

import errno
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qk_sniffer.config import MOST_SHARDS
from qk_sniffer.errors import RIGHTS, StoreError
from qk_sniffer.jobs import job_status, slurm, sweep
from qk_sniffer.jobs.job_status import STATUS_FILE, Status, in_brief
from qk_sniffer.jobs.progress import read_progress
from qk_sniffer.jobs.sweep import SWEEP_FILE
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.disk import walk
from qk_sniffer.store.files import Folder
from qk_sniffer.store.layout import MANIFEST, Layout, is_ours
from qk_sniffer.store.locks import holder, is_held
from qk_sniffer.store.record import read_mark, read_record
from qk_sniffer.text import folded, printable


@dataclass(frozen=True)
class Line:
    """A dataset, or a shard of an unfinished one, and its progress. None where a value is not known.

    `examples` of `total` are captured. `tokens_per_s` and `seconds_left` come from the job's last report. `rows` are
    those of the dataset, or those that a running job has captured so far. `reason` is SLURM's reason why a job waits.
    `last_attempt` says how the last job ended that did not make the dataset, and `last_error` why: `refused` at its
    start, `failed` or `interrupted`. `log` is the file with the log of the job that the line has an error of.
    """

    status: Status
    examples: int | None = None
    total: int | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    rows: int | None = None
    reason: str | None = None
    last_attempt: str | None = None
    last_error: str | None = None
    log: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, flat."""
        own = {name: value for name, value in vars(self).items() if name != "status"}
        return asdict(self.status) | own


Shard = tuple[int, int]
"""The index of a shard, and their number."""


@dataclass(frozen=True)
class _Attempt:
    """A job of a data root, by its status file; or as its sweep has announced it, before it writes one."""

    status: Status
    is_announced: bool
    file: Path

    @property
    def shard(self) -> Shard:
        return self.status.shard_index, self.status.shard_count

    @property
    def ended(self) -> float:
        return self.status.since + self.status.seconds

    @property
    def log(self) -> str | None:
        """The log of a job with an error, which Hydra has written next to its status file."""
        logs = sorted(self.file.parent.glob("*.log")) if self.status.error and not self.is_announced else []
        return str(logs[0]) if logs else None

    def order(self) -> tuple[bool, bool, float]:
        """Puts a running job last, the latest before it, and one that never started first."""
        return self.status.state == job_status.RUNNING, self.status.state != job_status.NOT_STARTED, self.ended


_WAITING = (job_status.QUEUED, job_status.REQUEUED)


def look(folder: Path, left_out: Callable[[StoreError], None] = lambda _: None) -> list[Line]:
    """Lists each dataset below `folder`, the shards of unfinished ones, and the jobs that run or wait.

    The state of a dataset is read from its own files and locks. A job that was refused changes neither. `left_out` gets
    the error of each file that cannot be read. Its job or dataset is not listed.
    """
    attempts: dict[str, list[_Attempt]] = {}
    roots: dict[str, Path] = {}
    for path in _walk(folder, left_out):
        if path.name in (SWEEP_FILE, STATUS_FILE):
            for status in _read(path, left_out):
                real = _real(status.data_root)
                attempts.setdefault(real, []).append(_Attempt(status, path.name == SWEEP_FILE, path))
                roots.setdefault(real, Path(status.data_root))
        else:
            roots[_real(path)] = path.absolute()
    lines = [line for real, path in roots.items() for line in _of_root(Layout(path), attempts.get(real, []), left_out)]
    return sorted(lines, key=lambda line: (line.status.data_root, line.status.shard_index))


def with_reasons(lines: list[Line], reasons: slurm.Reasons) -> list[Line]:
    """Adds SLURM's reasons to the jobs that wait in its queue; none if it does not answer on this machine."""
    in_queue = {
        number: line.status.slurm_job_id
        for number, line in enumerate(lines)
        if line.status.state in (job_status.QUEUED, job_status.REQUEUED) and line.status.slurm_job_id is not None
    }
    found = reasons.of(set(in_queue.values()))
    return [
        replace(line, reason=found.get(in_queue[number])) if number in in_queue else line
        for number, line in enumerate(lines)
    ]


def table(lines: list[Line], width: int | None = None) -> str:
    """A table of `lines`; below it the errors of jobs, and the meaning of reasons that need a person.

    Columns without a value are left out. A table that is wider than `width` characters leaves out where finished
    datasets were made, then the time, and then the tokens/s. If it is still wider, it has these columns, where jobs run
    is told below it, and cells are folded. None is for any width.
    """
    rows = [_COLUMNS]
    errors, places, in_short = [], [], ["where"]
    for line in lines:
        status = line.status
        name = _from_here(status.data_root)
        if status.shard_count > 1:
            name += f" (shard {status.shard_index} of {status.shard_count})"
        examples = "" if line.examples is None else f"{line.examples:,}"
        if line.examples is not None and line.total is not None and line.examples < line.total:
            examples += f" of {line.total:,} ({line.examples / line.total:.0%})"
        on_slurm = f"SLURM {status.slurm_job_id}" if status.slurm_job_id else ""
        restarts = f"restarted {status.restarts} x" if status.restarts else ""
        where = ", ".join(filter(None, [status.url, status.host, on_slurm, restarts]))
        short = status.url or "" if status.state in job_status.GOOD else where
        in_short.append(short)
        places += [f"{name}: {short}"] if short else []
        rows.append(
            (
                name,
                status.state if line.reason is None else f"{status.state}: {line.reason}",
                examples,
                "" if line.tokens_per_s is None else f"{line.tokens_per_s:,.0f}",
                "" if line.seconds_left is None else tqdm.format_interval(line.seconds_left),
                "" if line.rows is None else f"{line.rows:,}",
                tqdm.format_interval(status.seconds) if status.seconds >= 1 else "",
                line.last_attempt or "",
                where,
            )
        )
        if error := line.last_error or status.error:
            of_attempt = f" {line.last_attempt}:" if line.last_attempt else ""
            errors.append(f"{name}:{of_attempt} {in_brief(error)}")
            errors += [] if line.log is None else [f"  log: {_from_here(line.log)}"]
    known = sorted({line.reason for line in lines if line.reason is not None})
    meanings = [f"{reason}: {meaning}" for reason in known if (meaning := slurm.advice(reason)) is not None]
    columns = [*zip(*rows, strict=True)]
    shorter = [*columns[:-1], tuple(in_short)]
    told: list[str] = []
    for of_whom, left_out in ((columns, ()), (shorter, ()), (shorter, ("time",)), (shorter, ("time", "tokens/s"))):
        shown = _with_values(of_whom, left_out)
        if width is None or sum(max(map(len, map(printable, column))) + 2 for column in shown) - 2 <= width:
            break
    else:
        shown, told = _with_values(shorter, ("where",)), places
    return "\n".join(
        [folded([*zip(*shown, strict=True)], width, _OF_WORDS), *map(printable, [*told, *errors, *meanings])]
    )


def _with_values(columns: Sequence[Sequence[str]], left_out: Collection[str]) -> list[Sequence[str]]:
    return [
        column
        for column in columns
        if column[0] not in left_out and (any(column[1:]) or column[0] in ("dataset", "state"))
    ]


_COLUMNS = ("dataset", "state", "examples", "tokens/s", "left", "rows", "time", "last attempt", "where")

_OF_WORDS = {"dataset", "state", "last attempt", "where"}
"""The columns that are folded before numbers are."""


def _walk(folder: Path, left_out: Callable[[StoreError], None]) -> Iterator[Path]:
    """Yields status files, sweep files and the roots of datasets, which it does not enter: they may be large."""

    def unreadable(error: OSError) -> None:
        if isinstance(error, PermissionError):
            left_out(_unreadable(error.filename))

    for path, folders, files in walk(folder, unreadable):
        try:
            is_root = is_ours(Layout(path))
        except OSError:  # what is in it cannot be looked up: for permissions, or the length of its path
            is_root = False
        if is_root:
            folders.clear()
            yield path
            continue
        if MANIFEST in files and not os.access(path / MANIFEST, os.R_OK, effective_ids=True):
            left_out(_unreadable(path / MANIFEST))
        folders[:] = [name for name in folders if name not in (".submitit", "code", "__pycache__")]
        yield from (path / file for file in (SWEEP_FILE, STATUS_FILE) if file in files)


def _read(file: Path, left_out: Callable[[StoreError], None]) -> list[Status]:
    try:
        return [*sweep.queued(file.parent)] if file.name == SWEEP_FILE else [job_status.read_status(file)]
    except StoreError as error:
        left_out(error)
    except OSError:
        pass  # it was removed in the meantime
    return []


def _of_root(layout: Layout, attempts: list[_Attempt], left_out: Callable[[StoreError], None]) -> list[Line]:
    """The lines of a data root and of its jobs."""
    latest: dict[Shard, _Attempt] = {}
    for attempt in sorted(attempts, key=_Attempt.order):
        latest[attempt.shard] = attempt
    busy = {
        shard: attempt.status
        for shard, attempt in latest.items()
        if attempt.status.state in (job_status.RUNNING, *_WAITING)
    }
    record = manifest = None
    digest = ""
    try:
        if _exists(layout.root):
            record = read_record(layout)
        if record is None and _exists(layout.root) and os.path.lexists(layout.manifest):
            manifest, digest = manifests.with_digest(Folder(layout.root))
    except StoreError as problem:
        left_out(problem)
    except PermissionError as error:
        left_out(_unreadable(error.filename))
    except OSError:
        pass  # it was removed in the meantime
    slug = None if record is None else record["config"]["model"]["slug"]
    found = _held(layout) if record is None else _of_shards(layout, record, left_out)
    lines = {shard: _unfinished(layout, status, slug) for shard, status in (found | busy).items()}
    if manifest is not None and not lines:
        return [_finished(layout, manifest, digest, attempts)]
    if record is None and manifest is None:
        for shard, attempt in latest.items():
            if shard not in lines and _tells_of_no_dataset(attempt, attempts):
                lines[shard] = Line(attempt.status, rows=attempt.status.rows, log=attempt.log)
    known = max((attempt.ended for shard, attempt in latest.items() if shard in lines), default=0.0)
    for shard, attempt in latest.items():
        # A job with another number of shards was refused, and has no line.
        target = shard if shard in lines or attempt.ended < known else min(lines, default=None)
        if attempt.status.outcome is not None and target in lines and lines[target].last_attempt is None:
            lines[target] = _with_last(lines[target], attempt)
    return [*lines.values()]


def _with_last(line: Line, attempt: _Attempt) -> Line:
    """Adds the last attempt to a line, unless its state says the same."""
    outcome, error = attempt.status.outcome, attempt.status.error
    return replace(
        line,
        last_attempt=None if outcome == line.status.state else outcome,
        last_error=None if error == line.status.error else error,
        log=attempt.log,
    )


def _tells_of_no_dataset(attempt: _Attempt, attempts: list[_Attempt]) -> bool:
    """Whether the last job of a data root without a dataset and without work is shown.

    A mistake and an interrupt are not: the command has told them, and has left nothing. A sweep shows all of its jobs.
    A dataset that was removed is not shown, but one that is on the Hub alone.
    """
    state = attempt.status.state
    if state in job_status.GOOD:
        return state == job_status.PUBLISHED and _exists(attempt.status.data_root)
    if state in (job_status.FAILED, job_status.INTERRUPTED):
        of_sweep = any(each.is_announced and each.shard == attempt.shard for each in attempts)
        was_killed = state == job_status.INTERRUPTED and attempt.status.error is not None
        return of_sweep or was_killed or attempt.status.outcome == job_status.FAILED
    return True


def _finished(layout: Layout, manifest: dict[str, Any], digest: str, attempts: list[_Attempt]) -> Line:
    """The line of a finished dataset, with the time of the job that made it.

    Only a job that has recorded this manifest tells where the dataset is published.
    """
    made = [each for each in attempts if each.status.state in job_status.GOOD and each.status.manifest == digest]
    chosen = max(made, key=lambda each: (each.status.url is not None, each.ended), default=None)
    root = str(layout.root)
    status = Status(0, root, manifest["config"]["model"]["slug"], state=job_status.DONE)
    if chosen is not None:
        maker = min(made, key=lambda each: each.ended)  # a command that found it finished took no time for it
        status = replace(chosen.status, data_root=root, shard_index=0, shard_count=1, seconds=maker.status.seconds)
    line = Line(status, manifests.texts(manifest)[1], rows=manifest["rows"])
    since = max((each.ended for each in made), default=0.0)
    with suppress(OSError):
        since = max(since, layout.manifest.stat().st_mtime)
    later = [each for each in attempts if each.status.outcome is not None and each.ended > since]
    last = max(later, key=lambda each: each.ended, default=None)
    return line if last is None else _with_last(line, last)


def _of_shards(layout: Layout, record: dict[str, Any], left_out: Callable[[StoreError], None]) -> dict[Shard, Status]:
    """The states of the shards of an unfinished job, by its locks, marks and journals."""
    slug, count = record["config"]["model"]["slug"], record["config"]["shard"]["count"]
    held = _held(layout)
    statuses = {}
    for index in range(count):
        status = Status(0, str(layout.root), slug, index, count)
        is_captured = False
        try:
            is_captured = read_mark(layout, index, count, record["job_id"]) is not None
        except StoreError as problem:
            left_out(problem)
        begun = (layout.progress(index, count), layout.journal(index, count))
        if (index, count) in held:
            status = replace(held[index, count], model=slug)
        elif count == 1 and is_held(layout.finalize_lock):
            _name_holder(status, layout.finalize_lock)
        elif is_captured and count > 1:
            status.state = job_status.DONE
        elif is_captured or any(map(os.path.lexists, begun)):
            status.state = job_status.INTERRUPTED
        else:
            status.state = job_status.NOT_STARTED
        statuses[index, count] = status
    return statuses


def _held(layout: Layout) -> dict[Shard, Status]:
    """The jobs that hold the lock of a shard in a data root."""
    statuses = {}
    for lock in layout.locks() if _exists(layout.work) else ():
        shard = re.fullmatch(r"shard-(\d{5,6})-of-(\d{5,6})\.lock", lock.name)
        if shard is not None and int(shard[1]) < int(shard[2]) <= MOST_SHARDS and is_held(lock):
            status = Status(0, str(layout.root), "", int(shard[1]), int(shard[2]))
            _name_holder(status, lock)
            statuses[status.shard_index, status.shard_count] = status
    return statuses


def _name_holder(status: Status, lock: Path) -> None:
    if (by := holder(lock)) is not None:
        status.host, status.slurm_job_id = by.host, by.slurm_job_id


def line_of_job(layout: Layout, status: Status) -> Line:
    """The line of a job of a sweep, by its status. It has the progress of a job that has started and not ended."""
    if status.state in (job_status.RUNNING, job_status.REQUEUED):
        return _unfinished(layout, status, status.model)
    return Line(status, rows=status.rows)


def _unfinished(layout: Layout, status: Status, slug: str | None) -> Line:
    """The line of a shard with its progress, if the report is of this job: `slug` is the model of the stored one."""
    progress = read_progress(layout.progress(status.shard_index, status.shard_count))
    is_running = status.state == job_status.RUNNING
    if is_running:
        status.seconds = max(time.time() - status.since, 0.0)
    is_new = is_running and bool(progress) and progress["at"] >= status.since
    if not progress or status.state == job_status.NOT_STARTED or not (is_new or status.model in (slug, "")):
        return Line(status, rows=status.rows)
    return Line(
        status,
        progress["examples"],
        progress["total"],
        progress["tokens_per_s"] if is_new else None,
        progress["seconds_left"] if is_new else None,
        progress["rows"],
    )


def _unreadable(path: str | Path) -> StoreError:
    return StoreError(f"{path} cannot be read: {os.strerror(errno.EACCES)}: {RIGHTS}")


def _real(path: str | Path) -> str:
    return os.path.realpath(path)


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # no file can have this name
        return False


def _from_here(path: str) -> str:
    """Returns a path as a user of the current folder writes it."""
    return os.path.relpath(path) if Path(_real(path)).is_relative_to(_real(Path.cwd())) else path
