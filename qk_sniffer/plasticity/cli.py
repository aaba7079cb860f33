"""The command line: finds what is wrong with it, in every job of a sweep, and hands over to Hydra.

Exit codes: 0 done, 1 a job failed or left out a head, 2 the command line or a setting is wrong, 130 interrupted.
"""

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import hydra
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qk_sniffer import config as main_config
from qk_sniffer.cli.environment import read_environment
from qk_sniffer.cli.overrides import values_of
from qk_sniffer.cli.preflight import CONFIG_MODULE, VERSION_BASE, explain
from qk_sniffer.errors import ConfigError, QkSnifferError
from qk_sniffer.plasticity.config import (
    ESTIMATORS,
    EstimatorConfig,
    PlasticityConfig,
    from_omegaconf,
    problems,
    register,
    resolved,
    schema,
)
from qk_sniffer.text import closest, did_you_mean

log = logging.getLogger(__name__)

CONFIG_NAME = "plasticity"
GROUP = "estimator"
KEYS = [field.name for field in fields(PlasticityConfig) if field.name != GROUP]
KEYS += [f"{GROUP}.{field.name}" for field in fields(EstimatorConfig)]

# A launcher's worker imports this module to find `task`, and then composes the job's config.
main_config.register()
register()


def main() -> int:
    """`python -m qk_sniffer.plasticity`; returns the exit code."""
    from qk_sniffer.cli.app import parse_flags

    try:
        args = parse_flags(sys.argv[1:])
        if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
            return _show()
        with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE):
            check(args.overrides, multirun=args.multirun)
            codes = _run(args.overrides, multirun=args.multirun)
        return max(codes)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on with the heads that are missing", file=sys.stderr)
        return 130


def task(node: DictConfig) -> int:
    """One job, wherever Hydra's launcher runs it; returns its exit code."""
    from qk_sniffer.plasticity.run import run

    try:
        read_environment()
        return run(resolved(from_omegaconf(node)))
    except QkSnifferError as error:
        log.error("%s", error)
        return 2 if isinstance(error, ConfigError) else 1


def check(arguments: list[str], *, multirun: bool) -> list[PlasticityConfig]:
    """The settings of every job that Hydra would run for `arguments`; Hydra is initialised.

    Raises:
        ConfigError: with everything that is wrong, in any job.
    """
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    found = [problem for argument in arguments for problem in _problems(argument, parser, multirun=multirun)]
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    jobs = []
    parsed = parser.parse_overrides(arguments)
    combinations = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0] if multirun else [arguments]
    for combination in combinations:
        try:
            node = loader.load_configuration(CONFIG_NAME, list(combination), RunMode.RUN)
            with open_dict(node):
                del node["hydra"]
            config = from_omegaconf(node)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([explain(error)]) from None
        found += problems(config)
        jobs.append(config)
    found = found or list(_collisions([resolved(config) for config in jobs]))
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return jobs


def _problems(argument: str, parser: OverridesParser, *, multirun: bool) -> Iterator[str]:
    """What is wrong with an argument by itself."""
    try:
        override = parser.parse_overrides([argument])[0]
    except HydraException:
        yield f"{argument}: cannot be read as key=value; quote a value with special characters: 'key=\"value\"'"
        return
    key = override.key_or_group
    if override.is_hydra_override() or key.startswith("hydra/"):
        return  # Hydra checks its own settings when it composes
    if key != GROUP and key not in KEYS:
        names = [GROUP, *KEYS]
        yield f"{key} is no key{did_you_mean(closest(key, names))}; valid: {', '.join(names)}"
    elif override.is_delete() or override.is_add() or override.is_force_add():
        yield f"{argument}: {key} is there; it is changed by {key}=..."
    elif override.is_sweep_override() and not multirun:
        yield f"{argument}: several values are a sweep, which needs --multirun (-m)"
    else:
        yield from (problem for value in values_of(override, parser) for problem in _misfit(key, value, override))


def _misfit(key: str, value: Any, override: Override) -> Iterator[str]:
    if key == GROUP:
        if value not in ESTIMATORS:
            near = did_you_mean(closest(str(value), ESTIMATORS))
            yield f"{GROUP}={value}: no such {GROUP}{near}; valid: {', '.join(ESTIMATORS)}"
        return
    try:
        OmegaConf.update(schema(), key, value)
    except (OmegaConfBaseException, AssertionError, ValueError):
        yield f"{key} is {value!r}; it must be {_described(key)}"


def _described(key: str) -> str:
    default = OmegaConf.select(schema(), key)
    kinds = {bool: "true or false", int: "an integer", float: "a number"}
    return "a number" if key == f"{GROUP}.alpha" else kinds.get(type(default), "text")


def _collisions(jobs: list[PlasticityConfig]) -> Iterator[str]:
    folders: dict[str, PlasticityConfig] = {}
    for job in jobs:
        folder = str(job.folder.resolve())
        if folder in folders:
            yield f"two jobs of the sweep would write to {job.folder}; sweep what its name is made of, or output_dir"
        folders[folder] = job


def _show() -> int:
    """Help and the like, which Hydra does by itself."""
    decorated = hydra.main(version_base=VERSION_BASE, config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(
        task
    )
    try:
        decorated()
    except Exception as error:  # for these flags Hydra lets errors through as they are
        print(explain(error), file=sys.stderr)
        return 2
    return 0


def _run(arguments: list[str], *, multirun: bool) -> list[int]:
    """Has Hydra run the jobs; returns their exit codes."""
    hydra_object = GlobalHydra.instance().hydra
    assert hydra_object is not None
    try:
        if not multirun:
            done: list[JobReturn] = [hydra_object.run(CONFIG_NAME, task, arguments)]
        else:
            done = [job for batch in hydra_object.multirun(CONFIG_NAME, task, arguments) for job in batch]
        return [job.return_value for job in done]
    except HydraException as error:
        raise ConfigError([re.sub(r"\s+", " ", explain(error))]) from None
