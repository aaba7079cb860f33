"""Describes a program whose settings Hydra composes, for the check of its command line and for its start."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import hydra
from omegaconf import DictConfig

from qk_sniffer.cli.schema import Schema
from qk_sniffer.jobs.sweep import Job, Settings

VERSION_BASE = "1.3"
CONFIG_MODULE = "qk_sniffer.conf"


@dataclass(frozen=True)
class Application(Generic[Settings]):
    """A program whose settings Hydra composes from a dataclass and from config groups."""

    config_name: str
    """The primary config, a file of `conf/`."""
    schema: Schema
    problems: Callable[[Any, Path | None], Iterable[str]]
    """Returns what is wrong with the values of one job. The folder is where Hydra keeps the files of that job; None
    where it is not known."""
    resolve: Callable[[Any], Settings]
    """Derives the rest of a config without problems."""
    prepare: Callable[[DictConfig], None]
    """Derives the values of a composed config that its other values may refer to, in place."""
    collisions: Callable[[Sequence[Job[Settings]]], Iterable[str]]
    """Returns what is wrong with the jobs of one sweep, each without a problem, when they run next to each other."""
    default_groups: tuple[str, ...]
    """Config groups that always have a choice."""
    other_groups: Mapping[str, str] = field(default_factory=dict)
    """Config groups of another program, with the command of that program."""
    open_choices: Mapping[str, str] = field(default_factory=dict)
    """For a group that takes any name on the Hub or path: the arguments before `=` that name it."""
    described: Mapping[str, str] = field(default_factory=dict)
    """For a group whose choices describe one thing, such as a model: the key that names it."""
    filled_by_experiments: tuple[str, ...] = ()
    """Mappings that experiments fill, so that a value for the whole mapping would undo the experiment."""
    callbacks: Mapping[str, str] = field(default_factory=dict)
    """Hydra's callbacks that the program needs: the class of each by its key in `hydra.callbacks`."""

    def run_hydra(self, task: Callable[[Any], Any]) -> None:
        """Has Hydra read the command line of this process and run `task` for every job."""
        path = f"pkg://{CONFIG_MODULE}"
        hydra.main(version_base=VERSION_BASE, config_path=path, config_name=self.config_name)(task)()
