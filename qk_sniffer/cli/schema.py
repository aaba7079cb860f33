"""Checks settings against the dataclass that declares them, and words each problem once for all programs.

A program hands over its dataclass. A field without a default is a required setting. `help` in a field's metadata says
what the setting is. A field of a dataclass type is a section, whose fields have keys such as `sampler.seed`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qk_sniffer.config import structured
from qk_sniffer.text import as_yaml, closest, did_you_mean, expand_home


class Schema:
    """The settings that a program takes.

    Args:
        kind: the dataclass of the settings.
        former: returns the answer to a key of an earlier version or of another program; None for any other key.
    """

    def __init__(self, kind: type, former: Callable[[str], str | None] = lambda key: None) -> None:
        self.kind = kind
        self._former = former
        walked = list(_walk(kind))
        self.types: dict[str, Any] = {key: annotation for key, annotation, _ in walked}
        """Every key with its type, sections included."""
        self._fields: dict[str, Field[Any]] = {key: field for key, _, field in walked}

    def children(self, section: str) -> list[str]:
        """Returns the names directly in `section`; an empty section is the top level."""
        return [key.rpartition(".")[2] for key in self.types if key.rpartition(".")[0] == section]

    def is_section(self, key: str) -> bool:
        """Whether `key` names a section."""
        return is_dataclass(self.types.get(key))

    def is_free(self, key: str) -> bool:
        """Whether `key` lies inside a mapping whose keys the user chooses."""
        parents = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        return any(self.types.get(parent) is Any or get_origin(self.types.get(parent)) is dict for parent in parents)

    def plain_type(self, key: str) -> Any:
        """Returns the type of `key` without `| None`; None for an unknown key."""
        return _plain(self.types.get(key))

    def may_be_text(self, key: str) -> bool:
        """Whether a value of `key` is a text, or is compared with texts."""
        section = self._fields.get(key.rpartition(".")[0])
        return self.plain_type(key) is str or (section is not None and section.metadata.get("compares", False))

    def is_place(self, key: str) -> bool:
        """Whether a value of `key` is a path on this machine that no dataset names."""
        field = self._fields.get(key)
        return field is not None and bool(field.metadata.get("is_place", False))

    def required(self) -> list[str]:
        """Returns the keys that have no default."""
        return [key for key, field in self._fields.items() if not _has_default(field)]

    def fits(self, key: str, value: Any) -> bool:
        """Whether a value that Hydra parsed has the type of `key`."""
        # OmegaConf decides, so that Hydra takes every value that passes here.
        try:
            OmegaConf.update(self._scratch, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, AssertionError, ValueError):
            return False
        return True

    def read(self, key: str, text: str) -> Any:
        """Converts the text of a value to the type of `key`. The text is literal: no list, no interpolation.

        Raises:
            ValueError: `text` is not of this type.
        """
        if text == "null" and NoneType in get_args(self.types[key]):
            return None
        return _READERS[self.plain_type(key)](text)

    def node(self) -> DictConfig:
        """Returns the defaults as an OmegaConf node; stand-ins fill the required settings."""
        node = structured(self.kind)
        self.fill_missing(node)
        return node

    def fill_missing(self, node: DictConfig) -> list[str]:
        """Puts stand-ins where `node` lacks a required setting, so that its other values can be checked.

        Returns:
            the keys that were missing.
        """
        missing = [key for key in self.required() if OmegaConf.select(node, key, throw_on_missing=False) is None]
        for key in missing:
            OmegaConf.update(node, key, self.plain_type(key)())
        return missing

    def unknown(self, key: str, near: Sequence[str] = ()) -> str:
        """Words the problem of an unknown key; `near` takes the place of the names that resemble it."""
        if answer := self._former(key):
            return answer
        section, _, _ = key.rpartition(".")
        while section and not self.is_section(section):
            section, _, _ = section.rpartition(".")
        names = [name for name in self.types if not (name == section or section.startswith(f"{name}."))]
        same_end = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
        near = near or closest(key, names, 0.85) or same_end or closest(key, names)
        top = " at the top" if any(map(self.is_section, self.types)) else ""
        valid = f"valid in {section}" if section else f"valid{top}"
        return f"{key} is not a key{did_you_mean(near)}; {valid}: {', '.join(self.children(section))}"

    def mistyped(self, key: str, value: Any) -> str:
        """Words the problem of a value that does not have the type of `key`."""
        if get_origin(self.plain_type(key)) is dict:
            return f"{key} is {as_yaml(value)}; it must be a mapping: add entries to it, as in +{key}.name=value"
        return f"{key} is {as_yaml(value)}; it must be {_described(self.types[key])}"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Words the problem of each required setting in `keys`, which the user did not give."""
        return [f"{key} is not given; it is {self._fields[key].metadata['help']}" for key in keys]

    def one_only(self, argument: str, key: str) -> str:
        """Words the problem of an argument without a key after the one that gives the value of `key`."""
        what = self._fields[key].metadata["help"]
        return f"{argument}: {key} takes one value, {what}; other settings are written key=value"

    def help(self) -> str:
        """Returns the settings for `--help`, one a line."""
        lines = {key: _help_of(field) for key, field in self._fields.items() if "help" in field.metadata}
        width = max(map(len, lines))
        return "\n".join(f"  {key:<{width}}  {line}" for key, line in lines.items())

    @cached_property
    def _scratch(self) -> DictConfig:
        return structured(self.kind)


def repeated(keys: Iterable[str]) -> list[str]:
    """Words the problem of each key that occurs in `keys` more than once."""
    return [f"{key} is given twice; give it one value" for key, count in Counter(keys).items() if count > 1]


def unknown_flag(flag: str) -> str:
    """Words the problem of an unknown flag."""
    return f"{flag}: no such flag; settings are written key=value, without dashes (see --help)"


def not_a_setting(argument: str, example: str = "") -> str:
    """Words the problem of an argument without `=`; `example` is a key."""
    return f"{argument}: a setting is written key=value{f', such as {example}=...' if example else ''}"


def without_key(arguments: Sequence[str], key: str) -> int | None:
    """Returns the place of the argument that gives the value of `key` without the key, as in `verify outputs/mine`.

    It is the first that is neither a flag nor has a key; None if there is none, or another argument gives the value.
    """
    bare = [place for place, argument in enumerate(arguments) if _is_bare(argument)]
    return None if not bare or any(text.startswith(f"{key}=") for text in arguments) else bare[0]


def _is_bare(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    is_path = "/" in key and not key.lstrip("+~").startswith("hydra/")  # groups of Hydra have a slash, too
    return not argument.startswith("-") and (not equals or is_path)


def _walk(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, "Field[Any]"]]:
    types = get_type_hints(kind)
    for field in fields(kind):
        key, annotation = prefix + field.name, types[field.name]
        yield key, annotation, field
        if is_dataclass(annotation):
            assert isinstance(annotation, type)
            yield from _walk(annotation, f"{key}.")


def _has_default(field: "Field[Any]") -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _help_of(field: "Field[Any]") -> str:
    meaning = field.metadata["help"]
    if field.default is MISSING or (field.default is None and "null:" in meaning):
        return str(meaning)
    return f"{meaning} (default: {_written(field.default)})"


def _plain(annotation: Any) -> Any:
    """The type without `| None`."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if get_origin(annotation) is UnionType else annotation


def _described(annotation: Any) -> str:
    if get_origin(annotation) is UnionType:
        return f"{_described(_plain(annotation))}, or null"
    if get_origin(annotation) is list:
        of_integers = get_args(annotation) == (int,)
        return "a list of integers such as [0,1,2]" if of_integers else "a list of names such as [one,two]"
    return _DESCRIPTIONS.get(annotation, "any value")


def _written(value: Any) -> str:
    """The value as a command line gives it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _path(text: str) -> Path:
    if not text:
        raise ValueError("an empty path")
    return Path(expand_home(text))


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_DESCRIPTIONS = {Path: "a path", str: "text", int: "an integer", float: "a number", bool: "true or false"}
_READERS: dict[Any, Callable[[str], Any]] = {Path: _path, str: str, int: int, float: float, bool: _bool}
