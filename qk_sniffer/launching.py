"""What surrounds Hydra's launchers.

Before the jobs of a sweep are launched they are announced, and their code is copied; afterwards, those that the
launcher does not wait for are waited for.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

import qk_sniffer
from qk_sniffer import sweep
from qk_sniffer.sweep import PlannedJob


class Launch:
    """One command's launch of its jobs; a context manager around Hydra's part in it."""

    def __init__(self, planned: Sequence[PlannedJob]) -> None:
        self.planned = planned
        self.folder: Path | None = None
        """Of the run or the sweep, once Hydra has said it."""
        self.is_announced = False
        """Whether `planned` is what Hydra launches."""
        self._slurm_folder: str | None = None
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
        launcher = str(hydra.launcher["_target_"])
        is_slurm = launcher.endswith(".SlurmLauncher")
        if is_slurm:
            self._slurm_folder = str(hydra.launcher.submitit_folder)
        # Another sweeper draws its values as it goes: what it will launch is not known.
        if str(hydra.sweeper["_target_"]).endswith(f".{BasicSweeper.__name__}"):
            self.is_announced = True
            self._open.enter_context(sweep.announced(self.folder, self.planned, outlive=is_slurm))
        wanted = self.planned[0].config.snapshot
        if is_slurm if wanted is None else wanted:
            use_snapshot(self.folder / "code")

    def wait(self) -> None:
        """Returns once all jobs that went to SLURM have ended; its launcher gives up at the first one that died."""
        if self._slurm_folder is None:
            return
        from submitit import SlurmJob

        suffix = "_submitted.pkl"
        folder = Path(self._slurm_folder).absolute()
        for path in sorted(Path("/").glob(str(folder / f"*{suffix}").replace("%j", "*").lstrip("/"))):
            SlurmJob[Any](folder=folder, job_id=path.name.removesuffix(suffix)).wait()


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
