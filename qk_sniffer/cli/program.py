"""The command line of the small programs (`python -m qk_sniffer.verify`): settings are key=value, as for a job.

A program's settings are a dataclass; `help` in a field's metadata is what is said of it, without a default it must be
given. The field with `positional` in its metadata may be given by its value alone, as the first argument. Values are
taken as they stand: no lists, no interpolation.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from qk_sniffer.errors import ConfigError, QkSnifferError
from qk_sniffer.text import closest, did_you_mean, expand_home

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def run(name: str, about: str, kind: type[Settings], program: Callable[[Settings], int]) -> int:
    """Runs `program` with the settings that the command line gives; returns the exit code.

    `name` is the module that was called, `about` what `--help` says of it. Exit codes: that of `program`; 1 for an
    error that it foresees, 2 for settings that are wrong, 130 interrupted.
    """
    arguments = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(arguments):
            print(_help(name, about, kind), flush=True)
            return 0
        return program(parse(arguments, kind))
    except BrokenPipeError:  # who reads, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QkSnifferError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str], kind: type[Settings]) -> Settings:
    """The settings that `arguments` give.

    Raises:
        ConfigError: with everything that is wrong.
    """
    helps = {field.name: field.metadata["help"] for field in fields(kind)}
    types = get_type_hints(kind)
    given: dict[str, Any] = {}
    problems = []
    first = next((field.name for field in fields(kind) if field.metadata.get("positional")), None)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if first is not None and argument is arguments[0] and key not in helps and not argument.startswith("-"):
            key, equals, text = first, "=", argument
        if argument.startswith("-"):
            problems.append(f"{argument}: no such flag; settings are written key=value (see --help)")
        elif not equals:
            problems.append(f"{argument}: a setting is written key=value, such as {next(iter(helps))}=...")
        elif key not in helps:
            problems.append(f"{key} is no key{did_you_mean(closest(key, list(helps)))}; valid: {', '.join(helps)}")
        elif key in given:
            problems.append(f"{key} is given twice; give it one value")
        else:
            given[key] = None
            try:
                given[key] = _read(text, types[key])
            except (ValueError, KeyError):
                problems.append(f"{key} is {text!r}; it must be {_described(types[key])}")
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]
    problems += [f"{name} is not given; it is {helps[name]}" for name in missing]
    if problems:
        raise ConfigError(problems)
    return kind(**given)


def _path(text: str) -> Path:
    if not text:
        raise ValueError
    return Path(expand_home(text))


_TYPES: dict[Any, tuple[Callable[[str], Any], str]] = {
    Path: (_path, "a path"),
    str: (str, "text"),
    int: (int, "an integer"),
    float: (float, "a number"),
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
}


def _read(text: str, annotation: Any) -> Any:
    kind, may_be_null = _plain(annotation)
    return None if may_be_null and text == "null" else _TYPES[kind][0](text)


def _described(annotation: Any) -> str:
    kind, may_be_null = _plain(annotation)
    return _TYPES[kind][1] + (", or null" if may_be_null else "")


def _plain(annotation: Any) -> tuple[Any, bool]:
    """The type, `| None` left out, and whether it was there."""
    kinds = get_args(annotation)
    return (next(kind for kind in kinds if kind is not NoneType), True) if NoneType in kinds else (annotation, False)


def _help(name: str, about: str, kind: "type[DataclassInstance]") -> str:
    required = [f"{field.name}=..." for field in fields(kind) if field.default is MISSING]
    required += [f"[{field.name.upper()}]" for field in fields(kind) if field.metadata.get("positional")]
    width = max(len(field.name) for field in fields(kind))
    lines = [f"python -m {name} {' '.join(required)}", "", about.strip(), "", "Settings:"]
    for field in fields(kind):
        default = "" if field.default is MISSING else f" (default: {_written(field.default)})"
        lines.append(f"  {field.name:<{width}}  {field.metadata['help']}{default}")
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
