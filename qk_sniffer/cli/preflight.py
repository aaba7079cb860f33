"""Finds all problems of a command line before Hydra runs it, in every job of a sweep.

Hydra's own loader composes the jobs from the same arguments: a job that passes here is the job that runs.
"""

import argparse
import copy
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qk_sniffer.cli import hydra_settings, slurm_limits, slurm_script
from qk_sniffer.cli.application import Application
from qk_sniffer.cli.explain import explain, replace_unresolved, without_environment
from qk_sniffer.cli.flags import initialized
from qk_sniffer.cli.hydra_files import folder_problems, job_problems
from qk_sniffer.cli.launching import is_on_slurm, is_plain_sweep
from qk_sniffer.cli.overrides import EXPERIMENT, Checker, key_of
from qk_sniffer.cli.split_settings import with_split
from qk_sniffer.errors import ConfigError
from qk_sniffer.jobs.sweep import MOST_JOBS, Job, Settings, describe
from qk_sniffer.text import leads_out, shortened

PATIENCE_S = 1.0
"""Once a job has a problem, no more jobs of a long sweep are checked after this time."""


def planned(args: argparse.Namespace, application: Application[Settings]) -> list[Job[Settings]]:
    """Returns the jobs that Hydra would run for `args`, which its own parser made. None of them has a problem.

    Raises:
        ConfigError: with the problems of all jobs.
    """
    with initialized(args) as loader:
        return Composer(loader, application, args).planned()


_SWEPT_FOLDER = (
    "hydra.sweep.dir is {} for the sweep and another folder for a job: all jobs of a sweep share one. Give one "
    "output.folder for all of them; output.data_root places each dataset on its own"
)


class Composer(Generic[Settings]):
    """Composes the jobs of a command line, and collects their problems."""

    def __init__(self, loader: ConfigLoader, application: Application[Settings], args: argparse.Namespace) -> None:
        self.loader = loader
        self.application = application
        self.schema = application.schema
        self.config_name = args.config_name or application.config_name
        self.arguments: Sequence[str] = args.overrides
        self.is_sweep = bool(args.multirun)
        """Whether Hydra runs a sweep. `planned` also finds it in the settings."""
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = cache(self._options)
        self.checker = Checker(application, self.parser, self.groups)
        self._subfolders: set[str] = set()
        """The folders of jobs that were checked, in the one of their sweep."""
        # Composing takes most of the time here, and the arguments of a single job are composed several times.
        self._cached = cache(lambda texts, mode: self.loader.load_configuration(self.config_name, list(texts), mode))

    def planned(self) -> list[Job[Settings]]:
        """Returns the jobs, in the order in which Hydra runs them.

        Raises:
            ConfigError: with the problems of all jobs.
        """
        checked = self.checker.check(self.arguments)
        if checked.whole:
            problems, jobs = self._compose_all(checked.good)
        else:
            problems, jobs = self._values_alone(checked.good), []
        # A problem that only follows from a missing argument is left out.
        news = [problem for problem in problems if not any(_mentions(problem, key) for key in checked.bad_keys)]
        found = with_split([*checked.problems, *news], checked.split) or list(self.application.collisions(jobs))
        if found:
            raise ConfigError(list(dict.fromkeys(found)))
        return jobs

    def _compose_all(self, arguments: list[str]) -> tuple[list[str], list[Job[Settings]]]:
        sweeps = [text for text in arguments if self.parser.parse_override(text).is_sweep_override()]
        # In this mode Hydra leaves out the groups that are swept.
        mode = RunMode.MULTIRUN if sweeps else RunMode.RUN
        problems, single, whole = self._refused([text for text in arguments if text not in sweeps], mode)
        if not whole:
            return [*problems, *self._values_alone([*single, *sweeps])], []
        try:
            master = self._compose(single, mode)
        except Exception as error:  # as in `_refused`
            return [*problems, self._explain(error)], []
        self.is_sweep = self.is_sweep or master.hydra.mode == RunMode.MULTIRUN
        try:
            of_jobs = list(job_problems(master.hydra))
        except OmegaConfBaseException as error:
            return [*problems, self._explain(error)], []
        # A problem of a value may quote it, and so not that of a login.
        of_hydra = [] if of_jobs else list(hydra_settings.problems(master.hydra, self.application.callbacks))
        if of_hydra:
            return [*problems, *of_hydra, *self._values_alone([*single, *sweeps])], []
        launcher = str(master.hydra.runtime.choices["hydra/launcher"])
        problems += _launcher_problems(launcher, master, is_sweep=self.is_sweep)
        problems += of_jobs
        if self.is_sweep:
            found, combinations = self._combinations(
                master, [text for text in arguments if text in sweeps or text in single]
            )
            problems += found
        else:
            problems += map(self._swept, sweeps)
            combinations = [single]
        found, jobs = self._compose_each(combinations, master)
        if not self.is_sweep:
            found = [each for each in found if not any(_mentions(each, key_of(text)) for text in sweeps)]
        return [*problems, *found], jobs

    def _swept(self, argument: str) -> str:
        """Words the problem of an argument with several values that is not in a sweep."""
        key, _, value = argument.partition("=")
        problem = f"{argument}: several values are a sweep, which needs --multirun (-m)"
        if self.schema.may_be_text(key.lstrip("+")) and '"' not in value:
            problem += f"; one value with a comma is quoted, for the shell too: '{key}=\"{value}\"'"
        return problem

    def _compose_each(self, combinations: list[list[str]], master: DictConfig) -> tuple[list[str], list[Job[Settings]]]:
        where: dict[str, list[str]] = {}
        common = set.intersection(*map(set, combinations))
        jobs: list[Job[Settings]] = []
        num_checked = 0
        start = time.monotonic()
        for number, combination in enumerate(combinations):
            own = tuple(text for text in combination if text not in common)
            found, configs = self._config(combination, master)
            num_checked += 1
            jobs += [Job(number, own, config) for config in configs]
            for problem in found:
                where.setdefault(problem, []).append(describe(number, own))
            if where and time.monotonic() - start > PATIENCE_S:
                break
        problems = []
        for problem, places in where.items():
            problems.append(problem if len(places) == num_checked else f"{problem} [{shortened(places, 1)}]")
        if num_checked < len(combinations):
            problems[-1] += f" [jobs that were checked: the first {num_checked} of {len(combinations)}]"
        return problems, jobs

    def _compose(self, arguments: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """The config with Hydra's own section. Callers must not change it."""
        return self._cached(tuple(arguments), mode)

    def _explain(self, error: BaseException) -> str:
        return explain(error, self.schema)

    def _options(self, group: str) -> list[str]:
        searchpath = [argument for argument in self.arguments if argument.startswith("hydra.searchpath=")]
        try:
            options = self.loader.get_group_options(group, config_name=self.config_name, overrides=searchpath)
        except Exception:  # the primary config or the search path is broken; composing reports it
            options = self.loader.get_group_options(group)
        return options if group else []

    def _refused(self, arguments: list[str], mode: RunMode) -> tuple[list[str], list[str], bool]:
        """Returns the problems of the arguments that Hydra refuses, the other arguments, and whether their groups
        compose."""

        def refusal(*texts: str) -> str | None:
            try:
                self._compose(texts, mode)
            except Exception as error:  # any error of Hydra here has its cause in the configuration
                return self._explain(error)
            return None

        if refusal(*arguments) is None:
            return [], arguments, True
        if primary := refusal():
            return [primary], arguments, False
        paths = [text for text in arguments if key_of(text) == "hydra.searchpath"]
        choices = [text for text in arguments if self.groups(key_of(text))]
        refusals = {text: refusal(*paths, text) for text in [*paths, *choices]}
        whole = not any(refusals.values())
        if whole and (together := refusal(*paths, *choices)):
            return [together], arguments, False
        if whole:
            refusals |= {text: refusal(*paths, *choices, text) for text in arguments if text not in refusals}
        problems = [f"{text}: {why}" for text, why in refusals.items() if why]
        return problems, [text for text in arguments if not refusals.get(text)], whole

    def _combinations(self, master: DictConfig, arguments: list[str]) -> tuple[list[str], list[list[str]]]:
        """Returns the problems of the sweep that the config itself asks for, and the arguments of every job."""
        parsed = self.parser.parse_overrides(arguments)
        of_hydra = [text for text, override in zip(arguments, parsed, strict=True) if override.is_hydra_override()]
        of_task = [text for text in arguments if text not in of_hydra]
        if not is_plain_sweep(master.hydra):  # the values of other sweepers are unknown; the rest is checked
            return [], [list(master.hydra.overrides.hydra) + list(master.hydra.overrides.task)]
        params = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
        checked = self.checker.check(params)
        # As in `BasicSweeper.sweep`: a later argument replaces an earlier one with its key.
        texts = self.parser.parse_overrides([*checked.good, *of_task])
        problems = [f"hydra.sweeper.params: {problem}" for problem in with_split(checked.problems, checked.split)]
        counts = {text.get_key_element(): len(self.checker.values_of(text)) for text in texts}
        if (count := math.prod(counts.values())) > MOST_JOBS:
            problems.append(f"the sweep has {count:,} jobs; run at most {MOST_JOBS:,} at a time")
            return problems, [of_hydra]
        combinations = BasicSweeper.split_arguments(texts, max_batch_size=None)[0]
        return problems, [[*of_hydra, *combination] for combination in combinations]

    def _config(self, arguments: list[str], master: DictConfig) -> tuple[list[str], list[Settings]]:
        """Returns the problems of one job; without any, its resolved config. `master` is the config of the sweep."""
        try:
            node = copy.deepcopy(self._compose(arguments))
            OmegaConf.copy_cache(
                master, node
            )  # as Hydra does: the times in the names of folders are those of the sweep
            folder = Path(str(node.hydra.sweep.dir if self.is_sweep else node.hydra.run.dir))
            of_sweep = Path(str(master.hydra.sweep.dir)) if self.is_sweep else folder
            keys = ["output_subdir", *(["sweep.subdir"] if self.is_sweep else [])]
            # The usual name of a job's folder is its number, which it does not have yet.
            below = [OmegaConf.select(node.hydra, key, throw_on_resolution_failure=False) for key in keys]
        except Exception as error:  # as in `_refused`
            return [self._explain(error)], []
        choices = node.hydra.runtime.choices
        with open_dict(node):
            del node["hydra"]
        with without_environment():
            self.application.prepare(node)
        problems = [] if folder == of_sweep else [_SWEPT_FOLDER.format(of_sweep)]
        if self.is_sweep and below[-1] is not None:
            problems += self._subfolder_problems(below[-1])
        unresolved = replace_unresolved(node, self.schema)
        problems += [*self._undescribed(node, choices, arguments), *unresolved]
        missing = self.schema.fill_missing(node)
        problems += self.schema.missing(missing)
        try:
            config = OmegaConf.to_object(node)
        except OmegaConfBaseException as error:
            return [*problems, self._explain(error)], []
        found = [*self.application.problems(config, folder), *folder_problems(folder, below, is_sweep=self.is_sweep)]
        replaced = [*missing, *(problem.partition(" ")[0] for problem in unresolved)]
        problems += [problem for problem in found if not any(_mentions(problem, key) for key in replaced)]
        return problems, [] if problems else [self.application.resolve(config)]

    def _subfolder_problems(self, name: str) -> Iterator[str]:
        """Yields what is wrong with the folder of a job in the one of its sweep, where its status is looked for."""
        folder = os.path.normpath(name)
        if leads_out(name):
            yield f"hydra.sweep.subdir is {name!r}, which leads out of the folder of the sweep; leave it out"
        elif folder in self._subfolders:
            yield (
                f"hydra.sweep.subdir is {name!r} for several jobs, and each has a folder of its own; leave it out, or "
                "add ${hydra.job.num} to it"
            )
        self._subfolders.add(folder)

    def _undescribed(self, node: DictConfig, choices: DictConfig, arguments: Sequence[str]) -> Iterator[str]:
        """Returns the problem of each name that is given without its description: it would get that of the default."""
        keys = {key_of(text) for text in arguments}
        for group, key in self.application.described.items():
            if group in keys or not keys & {key, EXPERIMENT}:
                continue
            default = self._compose([text for text in arguments if key_of(text) == "hydra.searchpath"])
            name, choice = OmegaConf.select(node, key), choices[group]
            is_default = choice == default.hydra.runtime.choices[group]
            if is_default and name not in (None, OmegaConf.select(default, key)):
                yield (
                    f"{key}={name} is given without {group}=..., so it would get the slug and the settings of "
                    f"{group}={choice}: set {self.application.open_choices[group]}={name}"
                )

    def _values_alone(self, arguments: Sequence[str]) -> list[str]:
        """Returns the problems of the given values where their groups do not compose."""
        values: dict[str, list[Any]] = {}
        for override in self.parser.parse_overrides(list(arguments)):
            key = override.key_or_group
            if not ("/" in key or self.groups(key) or override.is_delete() or override.is_hydra_override()):
                values[key] = self.checker.values_of(override)
        problems = []
        for index in range(max(map(len, values.values()), default=0)):
            node = self.schema.node()
            for key, choices in values.items():
                OmegaConf.update(node, key, choices[min(index, len(choices) - 1)], force_add=True)
            replace_unresolved(node, self.schema)
            found = self.application.problems(OmegaConf.to_object(node), None)
            given = tuple(f"{key}{end}" for key in values for end in " .")
            problems += [problem for problem in found if problem.startswith(given)]
        return problems


def _launcher_problems(name: str, config: DictConfig, *, is_sweep: bool) -> Iterator[str]:
    if name == "basic":
        return
    if not is_sweep:
        yield f"hydra/launcher={name} is for sweeps: add --multirun (-m), also for a single job"
    elif is_on_slurm(config.hydra):
        if shutil.which("srun") is None:
            yield f"hydra/launcher={name}: this machine has no commands of SLURM (srun); start from a login node"
        else:
            yield from slurm_script.problems(config.hydra)
            yield from slurm_limits.problems(config.hydra.launcher)


def _mentions(problem: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", problem) is not None
