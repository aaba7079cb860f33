"""Runs a small program (`python -m qk_sniffer.verify`) from its command line, whose settings are key=value.

The settings are a dataclass, as `schema.py` describes. Its first field is what the program works on, mostly
`data_root`: an argument without a key gives it. `also` in the metadata of a field is a second name of its key. Values
are literal: no lists, no interpolation.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qk_sniffer.cli import process
from qk_sniffer.cli.help_text import fitted
from qk_sniffer.cli.schema import Schema, not_a_setting, repeated, unknown_flag, without_key
from qk_sniffer.errors import ConfigError
from qk_sniffer.hub.endpoint import check_address
from qk_sniffer.text import path_problem, say_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

DATA_ROOT = {"help": "the dataset: a folder, or a repository on the Hub", "is_place": True}
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

    def body(arguments: list[str]) -> int:
        if {"-h", "--help"} & {*arguments}:
            say_text(fitted(_help(name, about, kind)))
            return 0
        settings = parse(arguments, kind)
        check_address()
        return program(settings)

    return process.run(body)


def parse(arguments: Sequence[str], kind: type[Settings]) -> Settings:
    """Returns the settings of a command line.

    Raises:
        ConfigError: with all problems.
    """
    schema = Schema(kind)
    keys, others = [*schema.types], _other_names(kind)
    problems = []
    values: dict[str, Any] = {}
    given: list[str] = []
    first = without_key(arguments, keys[0])
    for place, argument in enumerate(arguments):
        key, equals, text = (keys[0], "=", argument) if place == first else argument.partition("=")
        key = others.get(key, key)
        if argument.startswith("-"):
            problems.append(unknown_flag(argument))
        elif not equals:
            problems.append(
                schema.one_only(argument, keys[0]) if keys[0] in given else not_a_setting(argument, keys[0])
            )
        elif key not in keys:
            problems.append(schema.unknown(key))
        else:
            given.append(key)
            try:
                values[key] = schema.read(key, text)
            except ValueError:
                problems.append(schema.mistyped(key, text))
    problems += repeated(given)
    problems += [
        f"{key} is {str(value)!r}, which {problem}"
        for key, value in values.items()
        if (schema.plain_type(key) is Path or schema.is_place(key))
        and value is not None
        and (problem := path_problem(value)) is not None
    ]
    problems += schema.missing(key for key in schema.required() if key not in given)
    if problems:
        raise ConfigError(problems)
    return kind(**values)


def _other_names(kind: "type[DataclassInstance]") -> dict[str, str]:
    return {field.metadata["also"]: field.name for field in fields(kind) if "also" in field.metadata}


def _help(name: str, about: str, kind: "type[DataclassInstance]") -> str:
    schema = Schema(kind)
    first, *others = schema.types
    usage = [f"python -m {name}", first.upper() if first in schema.required() else f"[{first.upper()}]"]
    usage += [f"{key}=..." for key in schema.required() if key != first]
    if others:
        usage.append("[key=value ...]")
    title = f"Settings ({first.upper()} is {first}=..., and the key may be left out):"
    return "\n".join([" ".join(usage), "", about.strip(), "", title, schema.help()])
