"""Runs jobs in processes that start at once: forked from one that has imported everything and run nothing.

Each child reports the steps that it starts. It can be made slow at a step, or held there until the test releases it, so
that a test can end it in the middle of any step.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

STEPS = {
    "forward": ("qk_sniffer.capture.capture", "Capture.run"),
    "segment": ("qk_sniffer.store.segment", "sync_file"),
    "compaction": ("qk_sniffer.store.compact", "_Job.write_heads"),
    "publication": ("qk_sniffer.store.promote", "sync_folder"),
    "manifest": ("qk_sniffer.store.manifest", "write_atomic"),
    "removal": ("qk_sniffer.store.work_folder", "remove"),
}
"""The steps that a child reports, just before it runs them."""

_SERVER = """
import importlib, itertools, json, logging, os, pkgutil, sys, time
import torch
torch.set_num_threads(1)
import qk_sniffer
from qk_sniffer import config
for package in ("backbone", "capture", "corpus", "dataset", "hub", "jobs", "store"):
    folder = importlib.import_module("qk_sniffer." + package)
    for module in pkgutil.iter_modules(folder.__path__, folder.__name__ + "."):
        importlib.import_module(module.name)
for name in ("datasets", "transformers.models.qwen3.modeling_qwen3"):
    importlib.import_module(name)
from qk_sniffer.jobs import run
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping("qwen3")  # fills a cache
STEPS = json.loads(sys.argv[1])

def tell(name, module, path, seconds, held, release):
    owner, (*outer, last) = importlib.import_module(module), path.split(".")
    for attribute in outer:
        owner = getattr(owner, attribute)
    real = getattr(owner, last)
    times = itertools.count(1)
    def telling(*args, **kwargs):
        number = next(times)
        os.write(1, (name + "\\n").encode())
        time.sleep(seconds)
        while number == held and not os.path.exists(release):
            time.sleep(0.01)
        return real(*args, **kwargs)
    setattr(owner, last, telling)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if (child := os.fork()) == 0:
        os.close(0)
        os.dup2(os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        for name, (module, path) in STEPS.items():
            tell(name, module, path, order["slow"].get(name, 0.0), order["held"].get(name), order["release"] + name)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        exec(order["before"])
        try:
            run.run_job(config.from_dict(order["job"]))
            code = 0
        except KeyboardInterrupt as stop:
            print(stop, file=sys.stderr, flush=True)
            code = stop.exit_code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = 1
        os.write(1, b"end\\n")
        os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print("status", status, flush=True)
"""


class Server:
    """Forks one job at a time; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, json.dumps(STEPS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def start(
        self,
        job: dict[str, Any],
        *,
        slow: dict[str, float] | None = None,
        held: dict[str, int] | None = None,
        before: str = "",
    ) -> "Child":
        """Starts `job`.

        Args:
            slow: the extra seconds of a step.
            held: a step waits at this call, counted from 1, until `Child.release`.
            before: Python code that the child runs first.
        """
        assert self._process.stdin is not None
        stderr, release = self._folder / "stderr.txt", f"{self._folder}/release-"
        stderr.write_text("")
        for step in STEPS:
            Path(release + step).unlink(missing_ok=True)
        order = {"job": job, "slow": slow or {}, "held": held or {}, "before": before}
        order |= {"stderr": str(stderr), "release": release}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        told = []
        while not (line := self._line()).isdigit():
            told.append(line)
        return Child(self, int(line), stderr, release, told)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server died"
        return line.strip()


class Child:
    """One job. `told` lists the steps that it has started, as far as they were read."""

    def __init__(self, server: Server, pid: int, stderr: Path, release: str, told: list[str]) -> None:
        self.pid = pid
        self.told = told
        self.code: int | None = None
        """The exit code, or minus the signal that killed the job; None while it runs."""
        self._server = server
        self._stderr = stderr
        self._release = release

    def reaches(self, step: str, times: int = 1) -> bool:
        """Reads until the step has started so often; returns False if the job ends before."""
        while self.told.count(step) < times and self.code is None:
            self._read()
        return self.told.count(step) >= times

    def send(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def release(self, step: str) -> None:
        """Lets a held step continue."""
        Path(self._release + step).touch()

    def says(self, text: str) -> None:
        """Waits until stderr contains `text`."""
        deadline = time.monotonic() + 60
        while text not in self.stderr:
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)

    def wait(self) -> int:
        """Reads until the job has ended; returns `code`."""
        while self.code is None:
            self._read()
        return self.code

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def _read(self) -> None:
        line = self._server._line()
        if line.startswith("status "):
            self.code = os.waitstatus_to_exitcode(int(line.removeprefix("status ")))
        else:
            self.told.append(line)
