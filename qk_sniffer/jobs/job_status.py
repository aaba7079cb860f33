"""Records the state of a job: the status file in its folder, and a lock that is held while it runs."""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from qk_sniffer.config import MOST_SHARDS
from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.store import stored
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.form_types import Sha256
from qk_sniffer.store.locks import hold, is_held, restart_patience_s, slurm_restarts
from qk_sniffer.store.own_files import starts_with
from qk_sniffer.store.stored import Count, PathText, Seconds, Text, UnreadableError
from qk_sniffer.text import one_line, printable_lines

log = logger(__name__)

STATUS_FILE, LOCK = "status.json", "job.lock"

QUEUED, RUNNING, REQUEUED, DONE, PUBLISHED = "queued", "running", "requeued", "done", "published"
FAILED, INTERRUPTED, NOT_STARTED = "failed", "interrupted", "not started"
REFUSED = "refused"
"""How a job ended that failed before it began."""

_STATES = (QUEUED, RUNNING, REQUEUED, DONE, PUBLISHED, FAILED, INTERRUPTED, NOT_STARTED)
State = Annotated[str, Meta(pattern=rf"\A({'|'.join(_STATES)})\Z")]

_SLURM_ID = r"[A-Za-z0-9_+.-]{1,100}"

SlurmId = Annotated[str, Meta(pattern=rf"\A{_SLURM_ID}\Z")]
"""The id of a job in SLURM's commands."""

GOOD = (DONE, PUBLISHED)
"""The states of a job that succeeded."""


@dataclass
class Status:
    """The state of a job. `error` is the message that it failed with, in printable lines, and `code` its exit code.

    `since` is the time when it was queued or last started, in seconds since 1970. `seconds` is its duration from then.
    `restarts` counts the restarts by SLURM. `rows` are those of the whole dataset, and `manifest` is the sha256 of its
    manifest, None until it is made. `began` says that the job was not refused at its start: it captured, or made,
    checked or published a dataset.
    """

    number: Count
    data_root: PathText
    model: Text
    shard_index: Annotated[int, Meta(ge=0, lt=MOST_SHARDS)] = 0
    shard_count: Annotated[int, Meta(ge=1, le=MOST_SHARDS)] = 1
    state: State = RUNNING
    since: Seconds = field(default_factory=time.time)
    seconds: Seconds = 0.0
    rows: Count | None = None
    url: Text | None = None
    error: Text | None = None
    code: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    host: Text | None = None
    slurm_job_id: SlurmId | None = None
    restarts: Count = 0
    manifest: Sha256 | None = None
    began: bool = False

    @property
    def outcome(self) -> str | None:
        """How it ended, if it did not do what it was to do."""
        if self.state == FAILED:
            return FAILED if self.began else REFUSED
        return INTERRUPTED if self.state == INTERRUPTED else None

    @classmethod
    def of(cls, number: int, config: ResolvedConfig, *, state: State) -> "Status":
        """The status of the job of `config`."""
        root = str(config.data_root.absolute())
        shard = config.shard
        return cls(number, root, config.model.slug or "", shard.index, shard.count, state)

    @classmethod
    def here(cls, number: int, config: ResolvedConfig) -> "Status":
        """The status of a job that starts in this process."""
        status = cls.of(number, config, state=RUNNING)
        status.host = socket.gethostname()
        status.slurm_job_id = slurm_job_id()
        status.restarts = slurm_restarts()
        return status

    def succeed(self, rows: int | None, url: str | None, manifest: str | None = None) -> None:
        """Records the result of the job."""
        self.state = DONE if url is None else PUBLISHED
        self.rows, self.url, self.manifest = rows, url, manifest

    def fail(self, message: str, *, code: int = 1) -> None:
        """Records that the job failed with `message`, and its exit code."""
        shown = printable_lines(message)  # all of it: a part of a secret would not be recognized
        cut = shown if len(shown) <= _MOST_OF_ERROR else f"{shown[: _MOST_OF_ERROR - 4]} ..."
        self.state, self.error, self.code = FAILED, cut, code

    def die(self) -> None:
        """Records that the job ended without a word: what it has written is whole, as after an interrupt."""
        self.fail("ended without a message: it was killed, or its machine failed (out of memory, time limit)")
        self.state = INTERRUPTED

    def write(self, folder: Path) -> None:
        """Writes the status file to a job's folder. Replaces that of an earlier job, and no file of someone else."""
        write_atomic(folder / STATUS_FILE, stored.encode(asdict(self)), is_own=starts_with(rb'\{"number": \d+, "data_'))


_MOST_OF_ERROR = 2000
"""The most characters of a message in a status file. The log of the job has all of it."""


def in_brief(error: str) -> str:
    """Returns the first line of a message; with the next one, if it introduces that. More lines are three dots."""
    first, *others = error.split("\n")
    if first.endswith(":") and others:
        first += " " + others.pop(0).strip().removeprefix("- ")
    return one_line(f"{first} ..." if others else first, 300)


def slurm_job_id() -> str | None:
    """The id of this process's job in SLURM's commands; None outside of SLURM, and if the environment has no id."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job_id = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return job_id if re.fullmatch(_SLURM_ID, job_id) else None


@contextmanager
def recorded(status: Status, folder: Path) -> Iterator[Callable[[], None]]:
    """Writes the status file in `folder` before and after the body, which sets the state.

    Yields a function that writes it in between. If the folder is removed or replaced in the meantime, another job may
    use it: nothing more is recorded there.
    """
    start = time.monotonic()
    with hold(folder / LOCK, "running this job", wait_s=restart_patience_s(), of_user=True) as lock:

        def record() -> None:
            status.seconds = round(time.monotonic() - start, 3)
            try:
                lock.check()
                status.write(folder)
            except StoreError as error:  # it must not hide how the job ended
                log.warning("the state of this job is not recorded: %s", error)

        status.write(folder)
        try:
            yield record
        finally:
            if status.state == RUNNING:
                status.state = INTERRUPTED
            record()


def read_status(file: Path) -> Status:
    """Reads the status in `file`. A job that no longer runs and did not record its end was interrupted.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a status file.
    """
    status = recorded_status(file)
    if status.state == RUNNING and not is_held(file.with_name(LOCK)):
        status = recorded_status(file)  # it may have ended between the two reads
        if status.state == RUNNING:
            status.seconds = max(file.stat().st_mtime - status.since, 0.0)
            status.began = True  # nobody refused it
            status.die()
    return status


def recorded_status(file: Path) -> Status:
    """Reads the status in `file` as the job has recorded it. Raises the errors of `read_status`."""
    way_out = "remove it; it only tells the state of a job"
    values: Any = stored.read(file, Status, way_out=way_out)
    return status_of(values, file, way_out)


def status_of(values: dict[str, Any], file: Path, way_out: str) -> Status:
    """Returns the status of `values`, which `file` has in the form of one.

    Raises:
        UnreadableError: the data root is no path in this locale. The error names the file and the `way_out`.
    """
    try:
        os.fsencode(values["data_root"])
    except UnicodeEncodeError as error:
        problem = f"has a data_root that is no path in this locale ({values['data_root']!r})"
        raise UnreadableError(file, problem, f"set PYTHONUTF8=1, or {way_out}") from error
    return Status(**{each.name: values[each.name] for each in fields(Status) if each.name in values})
