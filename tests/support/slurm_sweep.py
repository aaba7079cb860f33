"""Runs sweeps of the capture on a SLURM of the tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qk_sniffer.store.layout import Layout
from support.slurm_cluster import Cluster


class Sweep:
    """`python -m qk_sniffer --multirun` with our launcher, in its own folder."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        texts: Path,
        flags: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.cluster, self.folder, self.environment = cluster, folder, environment
        self.command = [
            *(sys.executable, "-m", "qk_sniffer", "--multirun", *flags, "hydra/launcher=slurm"),
            *("hydra.launcher.mem_gb=1", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"),
            *("model.dtype=float32", "dataset=hf", f"dataset.path={texts}"),
            *("sampler=uniform", "sampler.min_bucket_size=16", "inference.batch_size=1", "inference.segment_mb=1"),
            *arguments,
        ]
        self.before = set(cluster.jobs())
        self.process = self._start()

    def again(self) -> None:
        """Runs the same command again."""
        self.before = set(self.cluster.jobs())
        self.process = self._start()

    def wait(self) -> tuple[int, str]:
        """The exit code and the output."""
        said, _ = self.process.communicate(timeout=300)
        return self.process.returncode, said

    def dataset(self, model: Path) -> Path:
        """The data root of the job of a model."""
        return self.folder / "outputs" / f"{model.name}-texts-uniform"

    def jobs(self) -> dict[str, str]:
        """The states of its jobs on the cluster."""
        return {job: state for job, state in self.cluster.jobs().items() if job not in self.before}

    def job(self, number: int) -> str:
        """The id of one job of the sweep."""
        return next(job for job in self.jobs() if job.endswith(f"_{number}"))

    def status(self) -> list[dict[str, Any]]:
        """The output of `python -m qk_sniffer.status`, by dataset and shard."""
        command = [sys.executable, "-m", "qk_sniffer.status", str(self.folder), "format=json"]
        said = subprocess.run(command, env=self.cluster.env, capture_output=True, text=True, check=True).stdout
        found: list[dict[str, Any]] = json.loads(said)
        return found

    def until(self, is_so: Callable[[], object], what: str, *, patience_s: float = 120) -> None:
        """Waits for a condition while the sweep runs."""
        deadline = time.monotonic() + patience_s
        while not is_so():
            assert self.process.poll() is None, f"the sweep ended before {what}:\n{self.process.communicate()[0]}"
            assert time.monotonic() < deadline, f"{what}: not after {patience_s} s; {self.jobs()}"
            time.sleep(0.1)

    def until_captures(self, root: Path, shard: tuple[int, int] = (0, 1)) -> None:
        """Waits until a job is in the middle of its texts."""
        self.until(lambda: any(Layout(root).journal(*shard).glob("*.safetensors")), f"{root} is being captured")

    def _start(self) -> "subprocess.Popen[str]":
        # The jobs get the environment of the submission.
        env = (
            self.cluster.env
            | dict(self.environment)
            | {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        )
        return subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell that runs the tests in the background makes them and their children ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


@contextmanager
def sweeps(cluster: Cluster, folder: Path, texts: Path) -> Iterator[Callable[..., Sweep]]:
    """Yields a function that starts a sweep in `folder`; ends all of them, and their jobs."""
    started: list[Sweep] = []
    default = texts

    def start(
        *arguments: str,
        texts: Path = default,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Sweep:
        started.append(Sweep(cluster, folder, texts, flags, arguments, environment or {}))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        for job in each.jobs():
            subprocess.run(["scancel", "--quiet", job], env=cluster.env, check=False)
