"""Rewords the errors of Hydra and OmegaConf, in one line each, and replaces values that refer to nothing."""

import re

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qk_sniffer.cli.schema import Schema


def explain(error: BaseException, schema: Schema) -> str:
    """Returns the message of an error of Hydra or OmegaConf in one line, with the valid names for an unknown key."""
    text = str(error)
    if to_add := re.match(r"Could not override '(.+)'\.\s+To append to your config use (.+)", text):
        return f"{to_add[1]} does not exist, so it cannot be changed; to add it, write {to_add[2]}"
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
    """Puts the default where a value refers to nothing; returns a problem for each of these values."""
    problems: list[str] = []
    for name in map(str, node):
        key = f"{section}.{name}" if section else name
        if OmegaConf.is_interpolation(node, name):
            try:
                node[name]
            except OmegaConfBaseException as error:
                problems.append(_unresolved(key, node, name, error, schema))
                node[name] = OmegaConf.select(schema.node(), key)
        elif not OmegaConf.is_missing(node, name) and isinstance(node[name], DictConfig):
            problems += replace_unresolved(node[name], schema, key)
    return problems


def _unresolved(key: str, node: DictConfig, name: str, error: OmegaConfBaseException, schema: Schema) -> str:
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    reference = re.fullmatch(r"\$\{([\w.]+)\}", str(raw[name]))
    if reference and OmegaConf.select(node._get_root(), reference[1], default=0) is None:
        return f"{key} comes from {reference[1]}, which is null here; give {reference[1]}=..."
    return f"{key} is {raw[name]}: {explain(error, schema)}"
