"""Checks the settings of Hydra itself that would end it with a traceback, before it uses them.

A job on SLURM would fail at them only when it starts. The rest is left to `run_jobs`, which words what Hydra says.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from logging.config import DictConfigurator
from logging.handlers import QueueHandler
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException, UnsupportedInterpolationType

from qk_sniffer.text import path_problem

_WAY_OUT = "correct it, or leave it out"

_OF_HANDLERS = ("class", "formatter", "level", "filters")
"""The keys of a handler that are no arguments of its class."""

_RECORD = logging.LogRecord("qk_sniffer", logging.INFO, __file__, 1, "a message", (), None)

_RESOURCES = (
    *("timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "array_parallelism"),
    *("signal_delay_s", "max_num_timeout"),
)
"""The numbers among the settings of submitit's launchers."""

_USED = ("job.name", "job.env_set", "callbacks", "verbose", "hydra_logging", "job_logging")
"""Settings of Hydra that may refer to others, and that no other check reads."""


def problems(hydra: DictConfig, callbacks: Mapping[str, str]) -> Iterator[str]:
    """Yields what is wrong with Hydra's own settings of a job or a sweep.

    Args:
        hydra: Hydra's own configuration.
        callbacks: those that the program needs, as `Application.callbacks`.
    """
    unresolved: list[str] = []
    settings = {}
    for key in _USED:
        section, _, name = key.rpartition(".")
        settings[key] = _plain(hydra[section] if section else hydra, name, f"hydra.{key}", unresolved)
    yield from unresolved
    if unresolved:
        return
    for name, kind in (("sweeper", Sweeper), ("launcher", Launcher)):
        yield from _of_plugin(hydra, name, kind)
    yield from _of_resources(hydra)
    if "/" in (name := str(settings["job.name"])) or path_problem(f"{name}.log") is not None:
        yield f"hydra.job.name is {name!r}, which cannot be the name of the log of a job; {_WAY_OUT}"
    for name, target in callbacks.items():
        if OmegaConf.select(hydra, f"callbacks.{name}._target_") != target:
            yield f"hydra.callbacks.{name} must be {target}, which the program needs: leave it as it is"
    yield from _of_verbose(settings["verbose"])
    yield from _of_environment(settings["job.env_set"])
    for name in ("hydra_logging", "job_logging"):
        yield from (f"hydra.{name}{problem}; {_WAY_OUT}" for problem in _of_log(settings[name]))


def _plain(node: DictConfig | ListConfig, name: Any, key: str, unresolved: list[str]) -> Any:
    """Returns a setting as plain data, and adds those to `unresolved` that refer to nothing.

    A value that Hydra knows only in the job, such as its number, is an empty text.
    """
    try:
        value = "" if OmegaConf.is_missing(node, name) else node[name]
    except (InterpolationKeyError, UnsupportedInterpolationType) as error:
        unresolved.append(f"{key} refers to nothing: {str(error).splitlines()[0]}; {_WAY_OUT}")
        return ""
    except OmegaConfBaseException:
        return ""
    if isinstance(value, DictConfig):
        return {str(inner): _plain(value, inner, f"{key}.{inner!s}", unresolved) for inner in value}
    if isinstance(value, ListConfig):
        return [_plain(value, place, f"{key}[{place}]", unresolved) for place in range(len(value))]
    return value


def _of_plugin(hydra: DictConfig, name: str, kind: type) -> Iterator[str]:
    target, size = (
        OmegaConf.select(hydra, f"{name}.{key}", throw_on_resolution_failure=False)
        for key in ("_target_", "max_batch_size")
    )
    known = Plugins.instance().class_name_to_class.get(str(target))
    if known is None or not issubclass(known, kind):
        what = f"hydra.{name}._target_ is {target!r}" if target else f"hydra.{name} names no class (_target_)"
        yield f"{what}; it must be an installed {name} of Hydra: choose one by hydra/{name}=..."
    elif name == "sweeper" and isinstance(size, int) and size < 1:
        yield f"hydra.sweeper.max_batch_size is {size}; it must be at least 1, or null"


def _of_resources(hydra: DictConfig) -> Iterator[str]:
    is_local = str(OmegaConf.select(hydra, "launcher._target_")).endswith(".LocalLauncher")
    for name in _RESOURCES:
        value = OmegaConf.select(hydra, f"launcher.{name}", throw_on_resolution_failure=False)
        least = 1 if is_local and name == "timeout_min" else 0  # SLURM takes 0 for no limit
        if isinstance(value, int) and value < least:
            yield f"hydra.launcher.{name} is {value}; it must be at least {least}"


def _of_verbose(value: Any) -> Iterator[str]:
    names = value if isinstance(value, list) else [value]
    if not isinstance(value, bool) and not all(isinstance(name, str) for name in names):
        yield f"hydra.verbose is {value!r}; it must be true, false, or the names of loggers"


def _of_environment(values: Any) -> Iterator[str]:
    for name, value in values.items() if isinstance(values, dict) else ():
        if not name or "=" in name or "\0" in f"{name}{value}":
            yield f"hydra.job.env_set has {name!r}, which is no variable of the environment: {_WAY_OUT}"


def _of_log(settings: Any) -> Iterator[str]:
    """Yields the problems of the configuration of a log, each with its place there. Opens no file of a handler."""
    if not isinstance(settings, dict) or ("root" in settings and settings["root"] is None):  # Hydra then sets up none
        return
    if settings.get("version") != 1:
        yield f".version is {settings.get('version')!r}, and must be 1"
    parts = {name: settings.get(name) or {} for name in ("formatters", "filters", "handlers", "loggers")}
    parts["root"] = {"": settings["root"]} if "root" in settings else {}
    if not parts["root"]:
        yield " has no root"
    for name, part in parts.items():
        if not isinstance(part, dict):
            yield f".{name} is {part!r}, which is no mapping"
            return
        for each, values in part.items():
            place = f".{name}.{each}".rstrip(".")
            if not isinstance(values, dict):
                yield f"{place} is {values!r}, which is no mapping"
                continue
            found: list[str] = []
            if name == "formatters":
                found += _of_formatter(values)
            elif name != "filters":
                found += _of_logger(values, parts)
            if name == "handlers":
                found += _of_handler(values)
            yield from (f"{place}{problem}" for problem in found)


def _of_formatter(settings: Mapping[str, Any]) -> Iterator[str]:
    try:
        maker: Any = DictConfigurator({})
        kind = maker.resolve(settings.get("class") or "logging.Formatter")
        if "()" not in settings and issubclass(kind, logging.Formatter):
            maker.configure_formatter(dict(settings)).format(_RECORD)
    except Exception as error:  # logging lets through any error of a format
        yield f": {_words(error)}"


def _of_logger(settings: Mapping[str, Any], parts: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the names and the level of a logger or a handler."""
    try:
        if (level := settings.get("level")) is not None:
            logging.Logger("").setLevel(level)
    except (TypeError, ValueError) as error:
        yield f".level: {_words(error)}"
    for key, where in (("formatter", "formatters"), ("filters", "filters"), ("handlers", "handlers")):
        value, valid = settings.get(key) or [], [*parts[where]]
        if key == "formatter" or not isinstance(value, list | str):
            value = [value] if value else []
        for name in value:  # logging takes each character of a text for a name
            if name not in valid:
                yield f".{key} has {name!r}, which is not one of its {where}: {', '.join(valid) or 'none'}"


def _of_handler(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the class of a handler and its arguments, without making one."""
    if "()" in settings:
        return
    if "class" not in settings:
        yield " has no class"
        return
    maker: Any = DictConfigurator({})
    arguments = {key: settings[key] for key in settings if key not in _OF_HANDLERS and key.isidentifier()}
    try:
        kind = maker.resolve(settings["class"])
        for value in arguments.values():
            if isinstance(value, str) and value.startswith("ext://"):
                maker.convert(value)
        if not issubclass(kind, QueueHandler):  # whose arguments depend on the version of Python
            inspect.signature(kind).bind_partial(**arguments)
    except Exception as error:  # of an import too
        yield f": {_words(error)}"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
