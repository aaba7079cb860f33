"""Prepares the launch of jobs by Hydra, and waits for their end.

Before the launch of a sweep it announces the jobs and copies their code. While they wait on SLURM, it tells why. After
the launch it waits for the jobs that the launcher does not wait for.
"""

import glob
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

import qk_sniffer
from qk_sniffer.cli.queue_watch import QueueWatch
from qk_sniffer.cli.sweep_watch import SweepWatch
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.jobs import job_status, sweep
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.logs import logger
from qk_sniffer.store.disk import explained
from qk_sniffer.store.open_folder import OpenFolder
from qk_sniffer.text import counted

log = logger(__name__)

SETTLE_S = 30.0
"""Time for jobs to end after an interrupt that reaches them together with their command."""

_SUBMITTED = "_submitted.pkl"

_MARK = "# qk-sniffer launch "
"""The start of the line of a script of SLURM that tells which command has submitted it."""

_LAST_FOLDER = "QK_SNIFFER_LAST_FOLDER"
"""The variable that tells the jobs of a sweep the folder that it was started in, if its command imports from there."""


class Launch:
    """The launch of one command's jobs; a context manager around the call of Hydra."""

    def __init__(self, planned: Sequence[PlannedJob]) -> None:
        self.planned = planned
        self.folder: Path | None = None
        """The folder of the run or the sweep; None until Hydra names it."""
        self.is_announced = False
        """Whether Hydra launches exactly the jobs in `planned`."""
        self.error: QkSnifferError | None = None
        """The error that ended the launch before Hydra started a job."""
        self._slurm_folder: str | None = None
        self._mark = _MARK + secrets.token_hex(16)
        """The line of this launch in the scripts of its jobs: a user may give several sweeps one submitit_folder."""
        self._open = ExitStack()

    def __enter__(self) -> "Launch":
        LaunchCallback.launch = self
        self._open.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        LaunchCallback.launch = None
        self._open.__exit__(*error)

    def begin_sweep(self, hydra: DictConfig) -> None:
        """Announces the jobs, and copies the code for them; `hydra` is Hydra's own configuration."""
        self.folder = Path(hydra.sweep.dir).absolute()
        on_slurm = is_on_slurm(hydra)
        if on_slurm:
            self._slurm_folder = str(hydra.launcher.submitit_folder)
        record: Callable[[Sequence[str]], None] | None = None
        if is_plain_sweep(hydra):
            self.is_announced = True
            record = self._open.enter_context(sweep.announced(self.folder, self.planned, outlive=on_slurm))
        else:
            self._open.enter_context(sweep.unannounced(self.folder))
        reasons: Callable[[], Mapping[int, str]] = dict
        if on_slurm:
            queue = self._open.enter_context(QueueWatch(self.planned, self._submitted_ids, record))
            reasons = lambda: queue.reasons  # noqa: E731
        wanted, copy = self.planned[0].config.snapshot, None
        if on_slurm if wanted is None else wanted:
            with explained(self.folder, "copy the code to"):
                copy = use_snapshot(self.folder / "code")
        if on_slurm:
            _set_in_script(hydra, copy, self._mark)
        log.info("%s %s; logs: %s", counted(len(self.planned), "job"), _where(hydra, len(self.planned)), self.folder)
        if self.is_announced and _is_submitit(hydra):
            self._open.enter_context(SweepWatch(self.planned, self.folder, reasons))

    def wait(self) -> None:
        """Waits until all jobs on SLURM have ended; its launcher stops waiting when a job dies."""
        if self._slurm_folder is None:
            return
        from submitit import SlurmJob

        for job_id in self._submitted_ids():
            SlurmJob[Any](folder=Path(self._slurm_folder).absolute(), job_id=job_id).wait()

    def wait_for_exit(self) -> None:
        """Waits, after an interrupt, until the jobs that end with this command have written their status."""
        deadline = time.monotonic() + SETTLE_S
        while self._slurm_folder is None and self.folder is not None and time.monotonic() < deadline:
            if all(status.state != job_status.RUNNING for status in sweep.statuses(self.folder).values()):
                return
            time.sleep(0.2)

    def _submitted_ids(self) -> list[str]:
        """Returns the ids of this launch's jobs on SLURM, in the order of the jobs."""
        assert self._slurm_folder is not None
        folder = glob.escape(str(Path(self._slurm_folder).absolute())).replace("%j", "*")
        # submitit writes such a file for each job that it submits, after the script of the job or of its array.
        names = (path.name for path in Path("/").glob(f"{folder.lstrip('/')}/*{_SUBMITTED}"))
        ids = (name.removesuffix(_SUBMITTED) for name in names)
        by_array: dict[str, list[str]] = {}
        for job_id in ids:
            if re.fullmatch(r"\d+(_\d+)?", job_id):
                by_array.setdefault(job_id.partition("_")[0], []).append(job_id)
        # An array, or the only job of a sweep, is submitted at once; later batches of a sweep have larger ids.
        return sorted(
            chain.from_iterable(of_array for array, of_array in by_array.items() if self._has_submitted(array)),
            key=lambda job_id: [int(part) for part in job_id.split("_")],
        )

    def _has_submitted(self, array: str) -> bool:
        """Whether the script of an array, or of a single job, is of this launch."""
        folder = Path(str(self._slurm_folder).replace("%j", array)).absolute()
        try:
            script = (folder / f"{array}_submission.sh").read_text(errors="replace")
        except OSError:  # it was removed
            return False
        return self._mark in script.splitlines()


class LaunchCallback(Callback):
    """Tells the launch of this process what Hydra passes only to callbacks: the folder and the start of jobs."""

    launch: ClassVar[Launch | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes the folder of a single job; Hydra calls it before the job."""
        if self.launch is not None:
            self.launch.folder = Path(config.hydra.run.dir).absolute()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Starts the launch of a sweep; Hydra calls it before the sweep."""
        if self.launch is not None:
            try:
                self.launch.begin_sweep(config.hydra)
            except QkSnifferError as error:
                # Hydra makes a warning of an exception of a callback, and starts the jobs all the same.
                self.launch.error = error
                raise SystemExit(1) from error

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Names a job that runs in the process of its sweep; Hydra calls it before the job."""
        if self.launch is not None and self.launch.is_announced:
            log.info("%s", self.launch.planned[config.hydra.job.num])


def _is_submitit(hydra: DictConfig) -> bool:
    """Whether submitit starts the jobs: in processes of their own, whose logs are files."""
    return str(hydra.launcher["_target_"]).endswith((".SlurmLauncher", ".LocalLauncher"))


def _where(hydra: DictConfig, num_jobs: int) -> str:
    if is_on_slurm(hydra):
        return "on SLURM"
    if _is_submitit(hydra):
        return "in processes of their own"
    is_basic = str(hydra.launcher["_target_"]).endswith(".BasicLauncher")
    if not is_basic:
        return f"by {hydra.launcher['_target_']}"
    return "one after another" if num_jobs > 1 else "in this process"


def is_on_slurm(hydra: DictConfig) -> bool:
    """Whether the jobs of a sweep run on SLURM; `hydra` is Hydra's own configuration."""
    return str(hydra.launcher["_target_"]).endswith(".SlurmLauncher")


def is_plain_sweep(hydra: DictConfig) -> bool:
    """Whether the arguments of a sweep alone determine its jobs; other sweepers choose values while they run."""
    return bool(hydra.sweeper["_target_"] == f"{BasicSweeper.__module__}.{BasicSweeper.__name__}")


def _set_in_script(hydra: DictConfig, copy: Path | None, mark: str) -> None:
    """Adds what jobs need of this process's environment, and the `mark` of a launch, to the script that SLURM runs.

    With `--export=NONE`, or `SBATCH_EXPORT=NONE` as some clusters set it, SLURM passes no variable of a submission.
    A job would run other code than the `copy`, and might take the settings of another sweep. SLURM_EXPORT_ENV makes
    `srun` pass to the job what the script sets.
    """
    lines = [mark, "export SLURM_EXPORT_ENV=ALL"]
    for name in (sweep.NONCE, _LAST_FOLDER, "PYTHONSAFEPATH"):
        if name in os.environ:
            lines.append(f"export {name}={_quoted(os.environ[name])}")
    if copy is not None:
        lines.append('test -z "$PYTHONPATH" || PYTHONPATH=":$PYTHONPATH"')
        lines.append(f'export PYTHONPATH={_quoted(str(copy))}"$PYTHONPATH"')
    with read_write(hydra):
        hydra.launcher.setup = [*(hydra.launcher.setup or []), *lines]


def _quoted(text: str) -> str:
    """Returns a text as a word of a shell, and not as an interpolation of Hydra, which resolves settings twice."""
    return shlex.quote(text).replace("${", "$''{")


def use_snapshot(folder: Path) -> Path:
    """Copies this package into a new folder, makes new processes import it from there, and returns the folder.

    Its name is that of `folder`, or has a number after it if something has this name: a link would lead the copy
    elsewhere, and jobs of an earlier sweep may still import a copy.

    Raises:
        StoreError: a path with this name would be two paths.
        OSError: the copy cannot be written.
    """
    if os.pathsep in str(folder):
        raise StoreError(
            f"the code cannot be copied to {folder}: Python takes the character {os.pathsep!r} in it for the end of a "
            "path. Give the sweep another folder (hydra.sweep.dir=...), or set snapshot=false"
        )
    package = Path(qk_sniffer.__file__).parent
    # A checkout keeps two folders of the package next to it.
    beside = (package.parent / name for name in ("conf", "models") if not (package / name).exists())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with OpenFolder.at(folder.parent) as parent:
        taken, names = parent.names(), chain([folder.name], (f"{folder.name}.{number}" for number in count(2)))
        copy = parent.new_folder(next(name for name in names if name not in taken))
    with copy:
        for source in (package, *beside):
            with copy.new_folder(source.name) as inner:
                _copy(source, inner)
    # Python puts the current directory, which may be the checkout, first in its path.
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(copy.path), *filter(None, [os.environ.get("PYTHONPATH")])])
    if _imports_from_here():
        os.environ[_LAST_FOLDER] = str(Path.cwd())
    return copy.path


def _copy(source: Path, target: OpenFolder) -> None:
    """Copies the files of a folder, and of the folders in it."""
    for path in source.iterdir():
        if path.name == "__pycache__":
            continue
        if path.is_dir():
            with target.new_folder(path.name) as inner:
                _copy(path, inner)
        else:
            with path.open("rb") as file, target.create(path.name) as copied:
                shutil.copyfileobj(file, copied)


def protect_jobs() -> None:
    """Keeps the current folder out of the places that jobs import from, unless this process imports from there.

    A launcher starts them by `python -m`, which looks there first.
    """
    if not _imports_from_here():
        os.environ["PYTHONSAFEPATH"] = "1"


def _imports_from_here() -> bool:
    return bool({"", str(Path.cwd())} & {*sys.path})


def search_last_folder() -> None:
    """Makes modules of the folder that a sweep with copied code was started in importable, after all others.

    Such as that of `model.family`. The variable PYTHONPATH would put them before the standard library.
    """
    folder = os.environ.get(_LAST_FOLDER)
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
