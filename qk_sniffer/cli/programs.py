"""Lists the programs of this package, and finds the one that a command line names.

`sniff-qk verify outputs/mine`, `python -m qk_sniffer verify outputs/mine` and `python -m qk_sniffer.verify
outputs/mine` are the same. Without the name of a program, the command captures.
"""

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import qk_sniffer
from qk_sniffer.cli import process
from qk_sniffer.text import closest, did_you_mean, say


class Program(NamedTuple):
    """A program besides the capture."""

    module: str
    """The module with its function `main`, which reads `sys.argv` and returns the exit code."""
    about: str
    """What it does, for `--help`."""


PROGRAMS = {
    "status": Program("qk_sniffer.status", "shows the jobs and datasets of a folder"),
    "verify": Program("qk_sniffer.verify", "compares a dataset with its manifest"),
    "finalize": Program("qk_sniffer.finalize", "completes the dataset of a job that died, or publishes one"),
    "report": Program("qk_sniffer.report.cli", "shows a dataset on one HTML page"),
    "heads": Program("qk_sniffer.heads", "ranks heads by what they attend to"),
    "pictures": Program("qk_sniffer.pictures", "draws the statistics of a dataset"),
    "export": Program("qk_sniffer.export.cli", "writes the files of KV-cache methods"),
    "plasticity": Program("qk_sniffer.plasticity.cli", "measures attention plasticity"),
    "plasticity.compare": Program("qk_sniffer.plasticity.compare", "draws the plasticity of several datasets"),
}
"""By name: `python -m qk_sniffer.<name>` runs one. The modules are imported when they run."""

_CAPTURE = Program("qk_sniffer.cli.app", "captures a dataset")


def run_named() -> int:
    """Runs the program that the first argument of this process names, or else the capture; returns the exit code."""
    process.open_closed_streams()
    if process.VERSION in sys.argv[1:]:
        return process.run(lambda arguments: 0)
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    program = PROGRAMS.get(name)
    if program is not None:
        sys.argv = [sys.argv[0], *sys.argv[2:]]
    elif _runs_jobs(sys.argv[1:]):
        # Before Hydra is imported, which takes longer than a person likes to wait for a sign of life.
        say(f"qk-sniffer {qk_sniffer.__version__}: reading the settings ...", to=sys.stderr)
    return int(importlib.import_module((program or _CAPTURE).module).main())


_FLAGS_OF_JOBS = re.compile(r"--(multirun|config-(dir|name|path)(=.*)?)|-(m|cd|cn|cp)", re.DOTALL)


def _runs_jobs(arguments: Sequence[str]) -> bool:
    """Whether arguments of the capture look as if it runs jobs: other flags only print."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    return all(map(_FLAGS_OF_JOBS.fullmatch, flags)) and not (arguments and mistaken(arguments[0]))


_OF_THE_CAPTURE = ("capture", "run")
"""Words that other tools have for what the command does without one."""


def mistaken(argument: str) -> str | None:
    """Returns the problem of an argument that looks like a wrong name of a program, or a flag; None for any other."""
    if argument in _OF_THE_CAPTURE:
        return f"{argument} is not a program: without the name of one, the command captures; leave it out"
    near = [name for name in PROGRAMS if name.endswith(f".{argument}")]
    if not near and re.fullmatch("[a-zA-Z.]+", argument):
        near = closest(argument, [*PROGRAMS])
    if not near and re.fullmatch("[a-zA-Z]+[-_/][a-zA-Z]+", argument):  # otherwise it may be a Hub id
        near = closest(re.sub("[-_/]", ".", argument).lower(), [name for name in PROGRAMS if "." in name], 0.85)
    if f"--{argument}" in ("--help", process.VERSION):
        near = [f"--{argument}"]
    return f"{argument} is not a program{did_you_mean(near)}" if near else None


def mistaken_part(program: str, argument: str) -> str | None:
    """Returns the problem of the first argument of a program if both together are another one: `plasticity compare`.

    None for any other argument, and for one that is a folder.
    """
    name = f"{program}.{argument}"
    if name not in PROGRAMS or Path(argument).is_dir():
        return None
    return f"{program} {argument} is not a program{did_you_mean([name])}"


def listed() -> str:
    """Returns a line for each program, for `--help`."""
    width = max(map(len, PROGRAMS))
    return "\n".join(f"  {name:<{width}}  {program.about}" for name, program in PROGRAMS.items())
