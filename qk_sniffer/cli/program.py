"""Runs a small program (`python -m qk_sniffer.verify`) from its command line, whose settings are key=value.

The settings are a dataclass, as `schema.py` describes. One argument without a key gives the field with `positional` in
its metadata; it comes first. Values are literal: no lists, no interpolation.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from qk_sniffer.cli.schema import Schema, not_a_setting, repeated, unknown_flag
from qk_sniffer.errors import ConfigError, QkSnifferError
from qk_sniffer.hub.endpoint import check_address
from qk_sniffer.logs import escape_libraries
from qk_sniffer.text import hide_in_addresses, say, say_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

DATA_ROOT = {"help": "the dataset: a folder, or a repository on the Hub"}
REVISION = {"help": "branch, tag or commit of a dataset on the Hub; null: main"}
"""The metadata of the fields `data_root` and `revision`, for programs that read a dataset of either place."""


def run(name: str, about: str, kind: type[Settings], program: Callable[[Settings], int]) -> int:
    """Runs `program` with the settings of the command line.

    Args:
        name: the module that was called.
        about: the text of `--help` above the settings.
        kind: the dataclass of the settings.
        program: returns its exit code.

    Returns:
        the exit code: that of `program`; 1 for a `QkSnifferError`, 2 for wrong settings, 130 when interrupted.
    """
    escape_libraries()
    arguments = sys.argv[1:]
    hide_in_addresses(" ".join(arguments))
    try:
        if {"-h", "--help"} & set(arguments):
            say_text(_help(name, about, kind))
            sys.stdout.flush()
            return 0
        settings = parse(arguments, kind)
        check_address()
        return program(settings)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QkSnifferError as error:
        say_text(error, to=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        say("interrupted", to=sys.stderr)
        return 130


def parse(arguments: Sequence[str], kind: type[Settings]) -> Settings:
    """Returns the settings of a command line.

    Raises:
        ConfigError: with all problems.
    """
    schema = Schema(kind)
    keys = list(schema.types)
    positional = _positional(kind)
    problems = []
    values: dict[str, Any] = {}
    given: list[str] = []
    for place, argument in enumerate(arguments):
        key, equals, text = argument.partition("=")
        if place == 0 and positional and key not in keys and not argument.startswith("-"):
            key, equals, text = positional[0], "=", argument
        if argument.startswith("-"):
            problems.append(unknown_flag(argument))
        elif not equals:
            problems.append(not_a_setting(argument, keys[0]))
        elif key not in keys:
            problems.append(schema.unknown(key))
        else:
            given.append(key)
            try:
                values[key] = schema.read(key, text)
            except ValueError:
                problems.append(schema.mistyped(key, text))
    problems += repeated(given)
    problems += schema.missing(key for key in schema.required() if key not in given)
    if problems:
        raise ConfigError(problems)
    return kind(**values)


def _positional(kind: "type[DataclassInstance]") -> list[str]:
    return [field.name for field in fields(kind) if field.metadata.get("positional")]


def _help(name: str, about: str, kind: "type[DataclassInstance]") -> str:
    schema = Schema(kind)
    arguments = [*(f"{key}=..." for key in schema.required()), *(f"[{key.upper()}]" for key in _positional(kind))]
    return "\n".join([f"python -m {name} {' '.join(arguments)}", "", about.strip(), "", "Settings:", schema.help()])
