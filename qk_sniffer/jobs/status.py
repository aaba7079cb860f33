"""Finds the jobs and datasets below a folder, and reads from their files how far each has come."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import job_status, slurm, sweep
from qk_sniffer.jobs.job_status import STATUS_FILE, Status
from qk_sniffer.jobs.progress import read_progress
from qk_sniffer.jobs.sweep import SWEEP_FILE
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.disk import walk
from qk_sniffer.store.layout import Layout, is_ours
from qk_sniffer.store.locks import holder, is_held
from qk_sniffer.store.record import read_mark, read_record
from qk_sniffer.text import aligned, printable


@dataclass(frozen=True)
class Line:
    """A job, or a dataset without a job, and its progress. None where a value is not known.

    `examples` of `total` are captured. `tokens_per_s` and `seconds_left` come from the job's last report. `rows` are
    those of the dataset, or those that a running job has captured so far. `reason` is SLURM's reason why a job waits.
    """

    status: Status
    examples: int | None = None
    total: int | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    rows: int | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, flat."""
        own = {name: value for name, value in vars(self).items() if name != "status"}
        return asdict(self.status) | own


def look(folder: Path, left_out: Callable[[StoreError], None] = lambda _: None) -> list[Line]:
    """Lists the last job of each dataset and shard below `folder`, and each dataset without a job.

    `left_out` gets the error of each file that cannot be read. Its job or dataset is not listed.
    """
    latest: dict[tuple[str, int, int], Status] = {}
    roots: dict[str, Path] = {}
    for path in _walk(folder):
        if path.name in (SWEEP_FILE, STATUS_FILE):
            for status in _read(path, left_out):
                key = (_real(status.data_root), status.shard_index, status.shard_count)
                if key not in latest or _counts(status) >= _counts(latest[key]):
                    latest[key] = status
        else:
            roots[_real(path)] = path
    known = {root for root, _, _ in latest}
    statuses = [_now(status) for status in latest.values()]
    for root, path in roots.items():
        if root not in known:
            statuses += _of_dataset(Layout(path), left_out)
    # A successful job without a data root: the dataset was removed or moved.
    existing = (status for status in statuses if status.state not in job_status.GOOD or _exists(status.data_root))
    return [_line(status) for status in sorted(existing, key=lambda status: (status.data_root, status.shard_index))]


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


def table(lines: list[Line]) -> str:
    """A table of `lines`; below it the errors of failed jobs, and the meaning of reasons that need a person."""
    rows = [("dataset", "shard", "state", "examples", "tokens/s", "left", "rows", "time", "where")]
    errors = []
    for line in lines:
        status = line.status
        name = os.path.relpath(status.data_root) if _is_below(status.data_root, Path.cwd()) else status.data_root
        shard = f"{status.shard_index} of {status.shard_count}" if status.shard_count > 1 else ""
        examples = "" if line.examples is None else f"{line.examples:,}"
        if line.examples is not None and line.total is not None and line.examples < line.total:
            examples += f" of {line.total:,} ({line.examples / line.total:.0%})"
        on_slurm = f"SLURM {status.slurm_job_id}" if status.slurm_job_id else ""
        restarts = f"restarted {status.restarts} x" if status.restarts else ""
        rows.append(
            (
                name,
                shard,
                status.state if line.reason is None else f"{status.state}: {line.reason}",
                examples,
                "" if line.tokens_per_s is None else f"{line.tokens_per_s:,.0f}",
                "" if line.seconds_left is None else tqdm.format_interval(line.seconds_left),
                "" if line.rows is None else f"{line.rows:,}",
                tqdm.format_interval(status.seconds) if status.seconds else "",
                ", ".join(filter(None, [status.url, status.host, on_slurm, restarts])),
            )
        )
        if status.error:
            errors.append(f"{name}{f' (shard {shard})' if shard else ''}: {status.error}")
    known = sorted({line.reason for line in lines if line.reason is not None})
    meanings = [f"{reason}: {meaning}" for reason in known if (meaning := slurm.advice(reason)) is not None]
    return "\n".join([aligned(rows), *map(printable, [*errors, *meanings])])


def _walk(folder: Path) -> Iterator[Path]:
    """Yields status files, sweep files and the roots of datasets, which it does not enter: they may be large."""
    for path, folders, files in walk(folder):
        try:
            is_root = is_ours(Layout(path))
        except OSError:  # what is in it cannot be looked up: for permissions, or the length of its path
            is_root = False
        if is_root:
            folders.clear()
            yield path
            continue
        folders[:] = [name for name in folders if name not in (".submitit", "code", "__pycache__")]
        yield from (path / file for file in (SWEEP_FILE, STATUS_FILE) if file in files)


def _counts(status: Status) -> tuple[bool, bool, float]:
    """Orders the statuses of one dataset: a running job last, the latest before it, one that never started first."""
    ended = status.since + status.seconds
    return status.state == job_status.RUNNING, status.state != job_status.NOT_STARTED, ended


def _read(file: Path, left_out: Callable[[StoreError], None]) -> list[Status]:
    try:
        return [*sweep.queued(file.parent)] if file.name == SWEEP_FILE else [job_status.read_status(file)]
    except StoreError as error:
        left_out(error)
    except OSError:
        pass  # it was removed in the meantime
    return []


def _now(status: Status) -> Status:
    """The status, or that of a finished job if another job finished the dataset of this failed one later."""
    layout = Layout(Path(status.data_root))
    if status.state in (job_status.FAILED, job_status.INTERRUPTED) and not os.path.lexists(layout.job_file):
        with suppress(OSError):
            if layout.manifest.stat().st_mtime > status.since + status.seconds:
                return replace(status, state=job_status.DONE, error=None, code=0)
    return status


def _of_dataset(layout: Layout, left_out: Callable[[StoreError], None]) -> list[Status]:
    """The statuses of a dataset without a job below the folder, from its own files."""
    try:
        record = read_record(layout)
        if record is not None:
            return _of_shards(layout, record)
        if os.path.lexists(layout.manifest):
            slug = manifests.read(layout.root)["config"]["model"]["slug"]
            return [Status(0, str(layout.root.absolute()), slug, state=job_status.DONE)]
    except StoreError as error:
        left_out(error)
    except OSError:
        pass  # it was removed in the meantime
    return []


def _of_shards(layout: Layout, record: dict[str, Any]) -> list[Status]:
    root, config = str(layout.root.absolute()), record["config"]
    slug, count = config["model"]["slug"], config["shard"]["count"]
    statuses = []
    for index in range(count):
        lock = layout.shard_lock(index, count)
        status = Status(0, root, slug, index, count)
        if is_held(lock) and (by := holder(lock)) is not None:
            status.host, status.slurm_job_id = by.host, by.slurm_job_id
        elif read_mark(layout, index, count, record["job_id"]) is not None:
            status.state = job_status.DONE
        else:
            status.state = job_status.INTERRUPTED
        statuses.append(status)
    return statuses


def _line(status: Status) -> Line:
    layout = Layout(Path(status.data_root))
    progress = read_progress(layout.progress(status.shard_index, status.shard_count))
    if status.state == job_status.RUNNING:
        status.seconds = max(time.time() - status.since, 0.0)
    if progress and status.state != job_status.NOT_STARTED:
        is_running = status.state == job_status.RUNNING and progress["at"] >= status.since
        return Line(
            status,
            progress["examples"],
            progress["total"],
            progress["tokens_per_s"] if is_running else None,
            progress["seconds_left"] if is_running else None,
            progress["rows"],
        )
    if status.shard_count == 1 and status.state in (*job_status.GOOD, job_status.FAILED):
        with suppress(OSError, StoreError):
            manifest = manifests.read(layout.root)
            return Line(status, manifests.texts(manifest)[1], rows=manifest["rows"])
    return Line(status, rows=status.rows)


def _real(path: str | Path) -> str:
    return os.path.realpath(path)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # no file can have this name
        return False


def _is_below(path: str, folder: Path) -> bool:
    return Path(_real(path)).is_relative_to(_real(folder))
