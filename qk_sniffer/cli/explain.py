"""Rewords the errors of Hydra and OmegaConf, in one line each, and replaces values that refer to nothing."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from qk_sniffer.cli.schema import Schema


def explain(error: BaseException, schema: Schema) -> str:
    """Returns the message of an error of Hydra or OmegaConf in one line, with the valid names for an unknown key."""
    text = str(error)
    if to_add := re.match(r"Could not override '(.+)'\.\s+To append to your config use (.+)", text):
        is_entry = schema.is_free(to_add[1]) or get_origin(schema.plain_type(to_add[1])) is dict
        what = (
            "the mapping has no such entry yet" if is_entry else f"{to_add[1]} does not exist, so it cannot be changed"
        )
        return f"{what}; to add it, write {shlex.quote(to_add[2])}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}\n{error.__cause__}"
    where = re.match(r"In '([^']+)':(?: \w+ raised while composing config:)?", text)
    file = f"{where[1]}.yaml: " if where else ""
    unknown = re.search(r"Key '[^']+' not in '\w+'\s+full_key: (\S+)", text)
    if unknown and not unknown[1].startswith("hydra."):
        return file + schema.unknown(unknown[1])
    key = re.search(r"full_key: (\S+)", text)
    noise = ("reference_type=", "object_type=", "full_key:", "See https:", "Config search path:", "provider=")
    lines = [line.strip() for line in text[where.end() if where else 0 :].splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(noise))
    return f"{file}{f'{key[1]}: ' if key else ''}{message or type(error).__name__}"


def replace_unresolved(node: DictConfig, schema: Schema, section: str = "") -> list[str]:
    """Puts the default where a value refers to nothing, or to a variable of the environment that it may not have.

    Returns a problem for each of these values.
    """
    problems: list[str] = []
    for name in map(str, node):
        key = f"{section}.{name}" if section else name
        if OmegaConf.is_missing(node, name):
            continue
        if not OmegaConf.is_interpolation(node, name) and isinstance(node[name], DictConfig):
            problems += replace_unresolved(node[name], schema, key)
            continue
        try:
            with nullcontext() if schema.is_place(key) else without_environment():
                value = node[name]
                if OmegaConf.is_config(value):  # of which any part may refer to something
                    OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            problems.append(_unresolved(key, node, name, error, schema))
            node[name] = OmegaConf.select(schema.node(), key)
    return problems


class _EnvironmentError(Exception):
    """A value would have that of a variable of the environment."""


@contextmanager
def without_environment() -> Iterator[None]:
    """Makes `${oc.env:NAME}` an error within the block. A variable may be a password, and settings are published."""

    def refuse(*_: Any) -> None:
        raise _EnvironmentError

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _reads_environment(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, _EnvironmentError):
        error = error.__cause__ or error.__context__
    return error is not None


def _unresolved(key: str, node: DictConfig, name: str, error: OmegaConfBaseException, schema: Schema) -> str:
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    if _reads_environment(error):
        return (
            f"{key} is {raw[name]}, which would store a variable of the environment in the dataset and its name. Give "
            f'the value itself; in a shell: {key}="...$NAME..."'
        )
    reference = re.fullmatch(r"\$\{([\w.]+)\}", str(raw[name]))
    if reference and OmegaConf.select(node._get_root(), reference[1], default=0) is None:
        return f"{key} comes from {reference[1]}, which is null here; give {reference[1]}=..."
    return f"{key} is {raw[name]}: {explain(error, schema)}"
