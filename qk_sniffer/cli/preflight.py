"""Finds everything that is wrong with a command line before Hydra runs it, in every job of a sweep.

The jobs are composed by Hydra's own loader from the same arguments, so what passes here is what runs.
"""

import argparse
import copy
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from hydra import initialize_config_dir, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qk_sniffer import validation
from qk_sniffer.cli import overrides
from qk_sniffer.cli.collisions import collisions
from qk_sniffer.cli.launching import is_on_slurm, is_plain_sweep
from qk_sniffer.config import from_omegaconf, schema
from qk_sniffer.errors import ConfigError
from qk_sniffer.jobs.sweep import PlannedJob, describe
from qk_sniffer.resolved import ResolvedConfig, resolve
from qk_sniffer.text import shortened

VERSION_BASE = "1.3"
CONFIG_MODULE = "qk_sniffer.conf"
CONFIG_NAME = "config"
PATIENCE_S = 1.0
"""Once something is wrong, no more jobs of a long sweep are looked at after this time."""


def planned(args: argparse.Namespace) -> list[PlannedJob]:
    """The jobs that Hydra would run for `args`, which come from its own parser; each of them is sound.

    Raises:
        ConfigError: with everything that is wrong, in any job.
    """
    with _loader(args) as loader:
        composer = _Composer(loader, args.config_name or CONFIG_NAME, args.overrides)
        return composer.planned(multirun=args.multirun)


def explain(error: BaseException) -> str:
    """What Hydra or OmegaConf says in `error`, in one line, with what is valid where a key is unknown."""
    text = str(error)
    if to_add := re.match(r"Could not override '(.+)'\.\s+To append to your config use (.+)", text):
        return f"{to_add[1]} has nothing there to change; to add it, write {to_add[2]}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}\n{error.__cause__}"
    where = re.match(r"In '([^']+)':(?: \w+ raised while composing config:)?", text)
    file = f"{where[1]}.yaml: " if where else ""
    unknown = re.search(r"Key '[^']+' not in '\w+'\s+full_key: (\S+)", text)
    if unknown and not unknown[1].startswith("hydra."):
        return file + overrides.unknown_key(unknown[1])
    key = re.search(r"full_key: (\S+)", text)
    noise = ("reference_type=", "object_type=", "full_key:", "See https:", "Config search path:", "provider=")
    lines = [line.strip() for line in text[where.end() if where else 0 :].splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith(noise))
    return f"{file}{f'{key[1]}: ' if key else ''}{said or type(error).__name__}"


class _Composer:
    """Composes jobs with a loader, and collects what is wrong on the way."""

    def __init__(self, loader: ConfigLoader, config_name: str, arguments: Sequence[str]) -> None:
        self.loader = loader
        self.config_name = config_name
        self.arguments = arguments
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = cache(self._options)
        # Composing is what takes time here, and the arguments of a single job are wanted several times.
        self._cached = cache(lambda texts, mode: self.loader.load_configuration(self.config_name, list(texts), mode))

    def planned(self, *, multirun: bool) -> list[PlannedJob]:
        checked = overrides.check(self.arguments, self.parser, self.groups)
        if checked.whole:
            problems, jobs = self._compose_all(checked.good, multirun=multirun)
        else:
            problems, jobs = self._values_alone(checked.good), []
        # What follows from the lack of an argument that had to be left out is no news.
        bad = [_key(argument) for argument in self.arguments if argument not in checked.good]
        news = [problem for problem in problems if not any(_mentions(problem, key) for key in bad)]
        found = [*checked.problems, *news] or collisions(jobs)
        if found:
            raise ConfigError(list(dict.fromkeys(found)))
        return jobs

    def _compose_all(self, arguments: list[str], *, multirun: bool) -> tuple[list[str], list[PlannedJob]]:
        sweeps = [text for text in arguments if self.parser.parse_override(text).is_sweep_override()]
        # In this mode Hydra does without the groups that are swept.
        mode = RunMode.MULTIRUN if sweeps else RunMode.RUN
        problems, single, whole = self._refused([text for text in arguments if text not in sweeps], mode)
        if not whole:
            return [*problems, *self._values_alone([*single, *sweeps])], []
        try:
            master = self._compose(single, mode)
        except Exception as error:  # as in `_refused`
            return [*problems, explain(error)], []
        sweep = multirun or master.hydra.mode == RunMode.MULTIRUN
        problems += _launcher(str(master.hydra.runtime.choices["hydra/launcher"]), master, sweep=sweep)
        if sweep:
            found, combinations = self._combinations(
                master, [text for text in arguments if text in sweeps or text in single]
            )
            problems += found
        else:
            problems += [f"{text}: several values are a sweep, which needs --multirun (-m)" for text in sweeps]
            combinations = [single]
        found, jobs = self._compose_each(combinations, sweep=sweep)
        return [*problems, *found], jobs

    def _compose_each(self, combinations: list[list[str]], *, sweep: bool) -> tuple[list[str], list[PlannedJob]]:
        where: dict[str, list[str]] = {}
        common = set.intersection(*map(set, combinations))
        jobs, looked_at = [], 0
        start = time.monotonic()
        for number, combination in enumerate(combinations):
            own = tuple(text for text in combination if text not in common)
            config, found = self._config(combination, sweep=sweep)
            looked_at += 1
            if config is not None:
                jobs.append(PlannedJob(number, own, config))
            for problem in found:
                where.setdefault(problem, []).append(describe(number, own))
            if where and time.monotonic() - start > PATIENCE_S:
                break
        problems = []
        for problem, places in where.items():
            problems.append(problem if len(places) == looked_at else f"{problem} [{shortened(places, 1)}]")
        if looked_at < len(combinations):
            problems[-1] += f" [only the first {looked_at} of {len(combinations)} jobs were looked at]"
        return problems, jobs

    def _compose(self, arguments: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """The config with Hydra's own part; not to be changed."""
        return self._cached(tuple(arguments), mode)

    def _options(self, group: str) -> list[str]:
        searchpath = [argument for argument in self.arguments if argument.startswith("hydra.searchpath=")]
        try:
            options = self.loader.get_group_options(group, config_name=self.config_name, overrides=searchpath)
        except Exception:  # the primary config or the search path is broken, which composing will report
            options = self.loader.get_group_options(group)
        return options if group else []

    def _refused(self, arguments: list[str], mode: RunMode) -> tuple[list[str], list[str], bool]:
        """What is wrong with the arguments that Hydra refuses, the other ones, and whether their groups compose."""

        def refusal(*texts: str) -> str | None:
            try:
                self._compose(texts, mode)
            except Exception as error:  # whatever Hydra stumbles over, it is the configuration that made it
                return explain(error)
            return None

        if refusal(*arguments) is None:
            return [], arguments, True
        if primary := refusal():
            return [primary], arguments, False
        paths = [text for text in arguments if _key(text) == "hydra.searchpath"]
        choices = [text for text in arguments if self.groups(_key(text))]
        refusals = {text: refusal(*paths, text) for text in [*paths, *choices]}
        whole = not any(refusals.values())
        if whole and (together := refusal(*paths, *choices)):
            return [together], arguments, False
        if whole:
            refusals |= {text: refusal(*paths, *choices, text) for text in arguments if text not in refusals}
        problems = [f"{text}: {why}" for text, why in refusals.items() if why]
        return problems, [text for text in arguments if not refusals.get(text)], whole

    def _combinations(self, master: DictConfig, arguments: list[str]) -> tuple[list[str], list[list[str]]]:
        """What is wrong with the sweep that the config itself asks for, and the arguments of every job."""
        parsed = self.parser.parse_overrides(arguments)
        of_hydra = [text for text, override in zip(arguments, parsed, strict=True) if override.is_hydra_override()]
        of_task = [text for text in arguments if text not in of_hydra]
        if not is_plain_sweep(master.hydra):  # what it does not sweep can be looked at
            return [], [list(master.hydra.overrides.hydra) + list(master.hydra.overrides.task)]
        params = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
        checked = overrides.check(params, self.parser, self.groups)
        # As `BasicSweeper.sweep` does it: later arguments take the place of earlier ones with their key.
        texts = self.parser.parse_overrides([*checked.good, *of_task])
        combinations = BasicSweeper.split_arguments(texts, max_batch_size=None)[0]
        problems = [f"hydra.sweeper.params: {problem}" for problem in checked.problems]
        return problems, [[*of_hydra, *combination] for combination in combinations]

    def _config(self, arguments: list[str], *, sweep: bool) -> tuple[ResolvedConfig | None, list[str]]:
        """The resolved config of one job, or else what is wrong with it."""
        try:
            node = self._compose(arguments)
            folder = str(node.hydra.sweep.dir if sweep else node.hydra.run.dir)
        except Exception as error:  # as in `_refused`
            return None, [explain(error)]
        node = copy.deepcopy(node)
        with open_dict(node):
            del node["hydra"]
        problems = _resolve(node)
        try:
            config = from_omegaconf(node)
        except OmegaConfBaseException as error:
            return None, [*problems, explain(error)]
        resolved = resolve(config)
        problems += [*validation.problems(config), *_hydra_folder(folder, resolved)]
        return (None if problems else resolved), problems

    def _values_alone(self, arguments: Sequence[str]) -> list[str]:
        """What is wrong with the given values where the groups that they belong to cannot be composed."""
        values: dict[str, list[Any]] = {}
        for override in self.parser.parse_overrides(list(arguments)):
            key = override.key_or_group
            if not ("/" in key or self.groups(key) or override.is_delete() or override.is_hydra_override()):
                values[key] = overrides.values_of(override, self.parser)
        problems = []
        for index in range(max(map(len, values.values()), default=0)):
            node = schema()
            for key, choices in values.items():
                OmegaConf.update(node, key, choices[min(index, len(choices) - 1)], force_add=True)
            _resolve(node)
            found = validation.problems(from_omegaconf(node))
            given = tuple(f"{key}{end}" for key in values for end in " .")
            problems += [problem for problem in found if problem.startswith(given)]
        return problems


class _ConfigDir(SearchPathPlugin):
    """Hydra's --config-dir for what is composed here; its own code for it runs only in `hydra.main`."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.append("command-line", f"file://{self.folder}")


@contextmanager
def _loader(args: argparse.Namespace) -> Iterator[ConfigLoader]:
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise ConfigError([f"--config-dir {args.config_dir}: there is no such folder (seen from {Path.cwd()})"])
    Plugins.instance().register(_ConfigDir)
    _ConfigDir.folder = None if args.config_dir is None else Path(args.config_dir).absolute()
    try:
        with _initialized(args.config_path):
            yield GlobalHydra.instance().config_loader()
    finally:
        _ConfigDir.folder = None


def _initialized(config_path: str | None) -> AbstractContextManager[None]:
    context: Any
    if config_path is None or config_path.startswith("pkg://"):
        module = CONFIG_MODULE if config_path is None else config_path.removeprefix("pkg://")
        context = initialize_config_module(module, version_base=VERSION_BASE)
    elif Path(config_path).is_absolute():
        context = initialize_config_dir(config_path, version_base=VERSION_BASE)
    else:
        raise ConfigError(
            [
                f"--config-path {config_path} takes the place of all groups and must be an absolute folder; "
                "to add groups of your own, use --config-dir"
            ]
        )
    return context  # type: ignore[no-any-return]


def _resolve(node: DictConfig, section: str = "") -> list[str]:
    """Puts the schema's default where a value refers to nothing, and says where that was."""
    problems: list[str] = []
    for name in map(str, node):
        key = f"{section}.{name}" if section else name
        if OmegaConf.is_interpolation(node, name):
            try:
                node[name]
            except OmegaConfBaseException as error:
                problems.append(_unresolved(key, node, name, error))
                node[name] = OmegaConf.select(_defaults(), key)
        elif not OmegaConf.is_missing(node, name) and isinstance(node[name], DictConfig):
            problems += _resolve(node[name], key)
    return problems


@cache
def _defaults() -> DictConfig:
    return schema()


def _unresolved(key: str, node: DictConfig, name: str, error: OmegaConfBaseException) -> str:
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    reference = re.fullmatch(r"\$\{([\w.]+)\}", str(raw[name]))
    if reference and OmegaConf.select(node._get_root(), reference[1], default=0) is None:
        return f"{key} comes from {reference[1]}, which is null here; give {reference[1]}=..."
    return f"{key} is {raw[name]}: {explain(error)}"


def _launcher(name: str, config: DictConfig, *, sweep: bool) -> Iterator[str]:
    if name == "basic":
        return
    if not sweep:
        yield f"hydra/launcher={name} is for sweeps: add --multirun (-m), also for a single job"
    elif is_on_slurm(config.hydra) and shutil.which("srun") is None:
        yield f"hydra/launcher={name}: this machine has no commands of SLURM (srun); start from a login node"


def _hydra_folder(folder: str, config: ResolvedConfig) -> Iterator[str]:
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        yield f"Hydra's own folder for this run, {folder}, cannot be made: {there} is no folder that can be written to"
    root = str(config.data_root)
    if path.resolve().is_relative_to(Path(root).resolve()):
        yield (
            f"output.data_root is {root!r}, in which Hydra keeps its own folders ({folder}); "
            "give the dataset a folder of its own, such as outputs/mine"
        )


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0].partition("@")[0]


def _mentions(problem: str, key: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", problem) is not None
