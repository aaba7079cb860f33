"""What is wrong with the `key=value` arguments themselves: keys, group choices and types, all of it at once.

Hydra stops at the first unknown group, then at the first unknown key, and does not say what is valid. Here every
argument is held against the schema and the groups by itself, before anything is composed.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qk_sniffer.cli import renamed_keys
from qk_sniffer.config import Config, schema
from qk_sniffer.text import closest, did_you_mean

Groups = Callable[[str], list[str]]
"""The choices of a group by its name; empty for what is no group."""

GROUPS_BY_DEFAULT = ("model", "dataset", "sampler", "output")
_DESCRIPTIONS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Checked:
    """The arguments sorted out. `good` are those without a problem, in their order.

    `whole` is false when a group's choice had to be left out, for what is composed without it may look wrong only
    for its lack.
    """

    problems: list[str]
    good: list[str]
    whole: bool


def check(arguments: Sequence[str], parser: OverridesParser, groups: Groups) -> Checked:
    """Holds every argument against the schema and the groups; sweeps are looked at value by value."""
    problems: list[str] = []
    good: list[str] = []
    whole = True
    experiment = any(argument.lstrip("+").startswith("experiment=") for argument in arguments)
    for argument in arguments:
        found = list(_problems(argument, parser, groups, experiment=experiment))
        if found:
            problems += found
            whole = whole and not _chooses_group(argument, groups)
        else:
            good.append(argument)
    return Checked(problems, good, whole)


def unknown_key(key: str, groups: Groups = lambda group: []) -> str:
    """What to say to somebody who gives a key that there is not."""
    if answer := renamed_keys.answer(key):
        return answer
    section, _, _ = key.rpartition(".")
    while section and not is_dataclass(_types().get(section)):
        section, _, _ = section.rpartition(".")
    names = [name for name in _types() if not (name == section or section.startswith(f"{name}."))]
    same_end = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = closest(key, names, 0.85) or same_end or closest(key, names)
    if not section and groups("experiment") and closest(key, ["experiment"]):
        near = ["+experiment=..."]
    where = f"in {section}" if section else "at the top"
    return f"{key} is no key{did_you_mean(near)}; valid {where}: {', '.join(_children(section))}"


def unknown_choice(group: str, choice: str, valid: Sequence[str]) -> str:
    """What to say to somebody who chooses in `group` what there is not."""
    source = {"model": "model=hf model.name", "dataset": "dataset=hf dataset.path"}.get(group)
    name = re.sub(r"[-.]", "_", choice.lower())
    near = closest(name, valid) or [option for option in valid if name in option][:3]
    if source and ("/" in choice or (not near and "." in choice)):
        return f"{group}={choice}: {choice} is no name in the group {group}; for the Hub or a path: {source}={choice}"
    return f"{group}={choice}: no such {group}{did_you_mean(near)}; valid: {', '.join(sorted(valid))}"


def values_of(override: Override, parser: OverridesParser) -> list[Any]:
    """The values of an argument: one, or all that a sweep goes through; none where that cannot be told."""
    if not override.is_sweep_override():
        return [override.value()]
    try:
        texts = list(override.sweep_string_iterator())
    except (HydraException, ValueError):  # glob() on what is no group; a range with a step of 0
        return []
    return [parser.parse_overrides([f"{override.key_or_group}={text}"])[0].value() for text in texts]


def _problems(argument: str, parser: OverridesParser, groups: Groups, *, experiment: bool) -> Iterator[str]:
    try:
        override = parser.parse_overrides([argument])[0]
    except HydraException:
        yield _unreadable(argument, parser)
        return
    key = override.key_or_group
    if not key:
        yield f"{argument}: a setting is written key=value"
        return
    if override.is_hydra_override() and override.is_sweep_override():
        yield f"{argument}: Hydra's own settings cannot be swept"
        return
    if override.package is not None or (override.is_hydra_override() and "/" not in key):
        return  # Hydra's own settings: Hydra checks them when it composes
    if override.value_type == ValueType.INTERVAL_SWEEP:
        yield f"{argument}: an interval cannot be swept, for it has no end of values; use range(...) or a list"
        return
    values = values_of(override, parser)
    if not values and not override.is_delete():
        yield f"{argument}: nothing matches; valid: {', '.join(groups(key)) or 'values'}"
    if "/" in key or groups(key):
        yield from _group_problems(override, values, groups)
    elif override.is_delete():
        if not _is_free(key):
            yield f"{argument}: {key} cannot be deleted; give it the value that it should have"
    elif len(values) > 1 and get_origin(_plain(_types().get(key))) is list and not _fits(key, values[0]):
        yield f"{argument}: a list is written in brackets: {key}=[{argument.partition('=')[2]}]"
    else:
        for value in values:
            yield from _value_problems(key, value, override, groups, experiment=experiment)


def _group_problems(override: Override, values: list[Any], groups: Groups) -> Iterator[str]:
    group, plain = override.key_or_group, (override.input_line or "").lstrip("+")
    if not groups(group):
        yield f"{plain}: there is no group {group}"
        return
    if group == "estimator":
        yield f"{plain}: the group {group} is that of python -m qk_sniffer.plasticity"
        return
    if override.is_delete():
        return
    if group in GROUPS_BY_DEFAULT and (override.is_add() or override.is_force_add()):
        yield f"{override.input_line}: {group} has a choice already, which is changed by {plain}"
    if group == "experiment" and not (override.is_add() or override.is_force_add()):
        yield f"{override.input_line}: an experiment is added to a run: +{plain}"
    for value in values:
        if isinstance(value, dict):
            yield f"{plain}: {group} is chosen by name; its settings are given one by one, as {group}.<key>=..."
            continue
        for choice in value if isinstance(value, list) else [value]:
            if choice is None:
                continue
            subgroup, _, name = str(choice).rpartition("/")
            if name not in groups(f"{group}/{subgroup}" if subgroup else group):
                yield unknown_choice(group, str(choice), groups(group))


def _value_problems(key: str, value: Any, override: Override, groups: Groups, *, experiment: bool) -> Iterator[str]:
    if _is_free(key):
        return
    annotation = _types().get(key)
    if is_dataclass(annotation):
        if not isinstance(value, dict):
            yield f"{key} is a section; its keys are {', '.join(_children(key))}"
            return
        for name, inner in value.items():
            yield from _value_problems(f"{key}.{name}", inner, override, groups, experiment=experiment)
        return
    if annotation is None:
        yield unknown_key(key, groups)
        return
    if value == "???" or not _fits(key, value):
        yield f"{key} is {value!r}; it must be {_described(annotation)}"
    elif _plain(annotation) is str and isinstance(value, int | float):
        # `revision=1234e5` is read as a number and would come back as another text.
        given = (override.input_line or "").partition("=")[2]
        if not override.is_sweep_override() and str(value).lower() != given.lower():
            yield f"{key}={given} reads as the number {value}; quote it as text: '{key}=\"{given}\"'"
    elif experiment and key == "model.config_overrides" and isinstance(value, dict):
        yield (
            f"{key} as a whole would replace what the experiment sets; give its parts one by one: "
            f"{' '.join(f'+{key}.{name}=...' for name in value)}"
        )


def _unreadable(argument: str, parser: OverridesParser) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return f"{argument}: a setting is written key=value"
    if re.fullmatch(r"[+~]{0,2}[\w./@-]+", key):
        quote = "'" if '"' in value else '"'
        quoted = f"{key}={quote}{value}{quote}"
        try:
            parser.parse_overrides([quoted])
        except HydraException:
            pass
        else:
            shell = '"' if quote == "'" else "'"
            return f"{argument}: the value must be quoted, for the shell too: {shell}{quoted}{shell}"
    return f"{argument}: cannot be read as key=value"


def _chooses_group(argument: str, groups: Groups) -> bool:
    key = argument.lstrip("+~").partition("=")[0].partition("@")[0]
    return "/" in key or bool(groups(key)) or key == "experiment"


def _fits(key: str, value: Any) -> bool:
    # Asked of OmegaConf itself, so that what passes here is what Hydra takes.
    try:
        OmegaConf.update(_scratch(), key, value, merge=True, force_add=True)
    except (OmegaConfBaseException, AssertionError, ValueError):
        return False
    return True


@cache
def _scratch() -> DictConfig:
    return schema()


@cache
def _types() -> dict[str, Any]:
    """Every key with its type, which is a dataclass where the key is a section."""

    def walk(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in get_type_hints(section).items():
            yield prefix + name, kind
            if is_dataclass(kind):
                assert isinstance(kind, type)
                yield from walk(kind, f"{prefix}{name}.")

    return dict(walk(Config, ""))


def _children(section: str) -> list[str]:
    return [name.rpartition(".")[2] for name in _types() if name.rpartition(".")[0] == section]


def _is_free(key: str) -> bool:
    """Whether `key` lies inside a mapping whose keys are the user's."""
    parents = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
    return any(_types().get(parent) is Any or get_origin(_types().get(parent)) is dict for parent in parents)


def _plain(annotation: Any) -> Any:
    """The type, `| None` left out."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if get_origin(annotation) is UnionType else annotation


def _described(annotation: Any) -> str:
    if get_origin(annotation) is UnionType:
        return f"{_described(_plain(annotation))}, or null"
    if get_origin(annotation) is list:
        return "a list of integers such as [0,1,2]"
    if get_origin(annotation) is dict:
        return "a mapping such as {key: value}"
    return _DESCRIPTIONS.get(annotation, "any value")
