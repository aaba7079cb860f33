"""The jobs of a run: what each was to do, the status file that it leaves, and the table of all of them.

A status file lies in the folder that Hydra makes for the job, so whoever started a sweep can read how its jobs
ended, wherever they ran.
"""

import json
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from qk_sniffer.config import Config

STATUS_FILE = "status.json"
DONE, FAILED, RUNNING, INTERRUPTED, NOT_STARTED = "done", "failed", "running", "interrupted", "not started"


@dataclass(frozen=True)
class PlannedJob:
    """One job as it would run. `config` is resolved; `arguments` are those that set it apart in its sweep."""

    number: int
    arguments: tuple[str, ...]
    config: Config

    def __str__(self) -> str:
        return describe(self.number, self.arguments)


def describe(number: int, arguments: Sequence[str]) -> str:
    """A job by its number and what sets it apart: `job 0 (model=qwen3_8b)`."""
    return f"job {number} ({' '.join(arguments)})" if arguments else f"job {number}"


@dataclass
class Status:
    """How a job stands; `error` is what it failed with, in one line, `code` its exit code, `seconds` what it took."""

    number: int
    data_root: str
    state: str = RUNNING
    seconds: float = 0.0
    error: str | None = None
    code: int = 0

    def fail(self, message: str, *, code: int = 1) -> None:
        """Notes that the job failed with `message`, and the exit code that says so."""
        self.state, self.error, self.code = FAILED, textwrap.shorten(message, 300, placeholder=" ..."), code

    def write(self, folder: Path) -> None:
        """Puts the status file into a job's folder; a reader sees the old one or the new one, never a part."""
        beside = folder / f".{STATUS_FILE}.{os.getpid()}"
        beside.write_text(json.dumps(vars(self)))
        beside.replace(folder / STATUS_FILE)


@contextmanager
def recorded(status: Status, folder: Path) -> Iterator[None]:
    """Keeps the status file in `folder` while the body runs, which sets the state when it fails."""
    status.write(folder)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        status.state = INTERRUPTED
        raise
    else:
        status.state = DONE if status.state == RUNNING else status.state
    finally:
        status.seconds = round(time.monotonic() - start, 3)
        status.write(folder)


def statuses(folder: Path) -> dict[int, Status]:
    """Every status file of the run or sweep in `folder`, by the job's number."""
    found = [Status(**json.loads(path.read_text())) for path in sorted(folder.rglob(STATUS_FILE))]
    return {status.number: status for status in found}


def table(jobs: Sequence[PlannedJob], found: dict[int, Status]) -> str:
    """The jobs of a sweep, a line each, with how they ended; one that left no status file did not start."""
    rows = [("job", "state", "seconds", "what", "where, or why not")]
    for job in jobs:
        status = found.get(job.number, Status(job.number, "", NOT_STARTED))
        last = status.error or status.data_root
        rows.append((str(job.number), status.state, f"{status.seconds:.1f}", " ".join(job.arguments), last))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class FolderCallback(Callback):
    """Remembers the folder of this process's run or sweep, which Hydra tells only to callbacks."""

    folder: ClassVar[Path | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before a single job."""
        FolderCallback.folder = Path(config.hydra.run.dir).absolute()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before a sweep."""
        FolderCallback.folder = Path(config.hydra.sweep.dir).absolute()
