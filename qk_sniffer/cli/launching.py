"""What surrounds Hydra's launchers.

Before the jobs of a sweep are launched they are announced, and their code is copied; afterwards, those that the
launcher does not wait for are waited for.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

import qk_sniffer
from qk_sniffer.jobs import sweep
from qk_sniffer.jobs.sweep import PlannedJob

SETTLE_S = 30.0
"""How long jobs may take to end that an interrupt of their command has reached too."""

_SUBMITTED = "_submitted.pkl"


class Launch:
    """One command's launch of its jobs; a context manager around Hydra's part in it."""

    def __init__(self, planned: Sequence[PlannedJob]) -> None:
        self.planned = planned
        self.folder: Path | None = None
        """Of the run or the sweep, once Hydra has said it."""
        self.is_announced = False
        """Whether `planned` is what Hydra launches."""
        self._slurm_folder: str | None = None
        self._submitted_before: set[Path] = set()
        self._open = ExitStack()

    def __enter__(self) -> "Launch":
        LaunchCallback.launch = self
        self._open.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        LaunchCallback.launch = None
        self._open.__exit__(*error)

    def begin_sweep(self, hydra: DictConfig) -> None:
        """Announces the jobs; `hydra` is Hydra's own configuration."""
        self.folder = Path(hydra.sweep.dir).absolute()
        on_slurm = is_on_slurm(hydra)
        if on_slurm:
            self._slurm_folder = str(hydra.launcher.submitit_folder)
            self._submitted_before = set(self._submitted())
        if is_plain_sweep(hydra):
            self.is_announced = True
            self._open.enter_context(sweep.announced(self.folder, self.planned, outlive=on_slurm))
        wanted = self.planned[0].config.snapshot
        if on_slurm if wanted is None else wanted:
            use_snapshot(self.folder / "code")

    def wait(self) -> None:
        """Returns once all jobs that went to SLURM have ended; its launcher gives up at the first one that died."""
        if self._slurm_folder is None:
            return
        from submitit import SlurmJob

        for path in sorted(set(self._submitted()) - self._submitted_before):
            job_id = path.name.removesuffix(_SUBMITTED)
            SlurmJob[Any](folder=Path(self._slurm_folder).absolute(), job_id=job_id).wait()

    def wait_for_exit(self) -> None:
        """After an interrupt: gives jobs that end with this command the time to say so."""
        deadline = time.monotonic() + SETTLE_S
        while self._slurm_folder is None and self.folder is not None and time.monotonic() < deadline:
            if all(status.state != sweep.RUNNING for status in sweep.statuses(self.folder).values()):
                return
            time.sleep(0.2)

    def _submitted(self) -> Iterator[Path]:
        """What submitit leaves of each job that it submitted."""
        assert self._slurm_folder is not None
        folder = str(Path(self._slurm_folder).absolute() / f"*{_SUBMITTED}").replace("%j", "*")
        yield from Path("/").glob(folder.lstrip("/"))


class LaunchCallback(Callback):
    """Tells the launch of this process where Hydra keeps its jobs, which Hydra tells only to callbacks."""

    launch: ClassVar[Launch | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before a single job."""
        if self.launch is not None:
            self.launch.folder = Path(config.hydra.run.dir).absolute()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before a sweep."""
        if self.launch is not None:
            self.launch.begin_sweep(config.hydra)


def is_on_slurm(hydra: DictConfig) -> bool:
    """Whether the jobs of a sweep go to SLURM; `hydra` is Hydra's own configuration."""
    return str(hydra.launcher["_target_"]).endswith(".SlurmLauncher")


def is_plain_sweep(hydra: DictConfig) -> bool:
    """Whether the jobs of a sweep follow from its arguments alone; other sweepers draw values as they go."""
    return bool(hydra.sweeper["_target_"] == f"{BasicSweeper.__module__}.{BasicSweeper.__name__}")


def use_snapshot(folder: Path) -> None:
    """Copies this package into `folder`, and has the processes that are started from now on import it from there."""
    package = Path(qk_sniffer.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / package.name, ignore=ignored, dirs_exist_ok=True)
    for name in ("conf", "models"):
        if not (package / name).exists():  # a checkout keeps them beside the package
            shutil.copytree(package.parent / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    # The current directory comes first in a path that Python makes by itself, and may be the checkout.
    os.environ["PYTHONSAFEPATH"] = "1"
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
