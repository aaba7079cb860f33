"""The model's own config with the user's overrides in it: each takes effect, or is refused with the way out.

Rotary parameters are where a plain merge goes wrong in silence: transformers keeps all of them, the base included, in
`rope_parameters`, in some models one set for each kind of layer, while people write `rope_scaling` and `rope_theta`.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from qk_sniffer.errors import ConfigError

log = logging.getLogger(__name__)

_KEY = "model.config_overrides"

_ELSEWHERE = {
    "dtype": "set model.dtype",
    "torch_dtype": "set model.dtype",
    "attn_implementation": "set model.attn_implementation",
    "_attn_implementation": "set model.attn_implementation",
    "model_type": "it is what the checkpoint is, and cannot be changed",
    "text_config": "what is overridden is the text config itself: give its keys without text_config",
}
"""What is not overridden here, though configs have it: the way out."""

_IN_ROPE_PARAMETERS = ("rope_theta", "partial_rotary_factor")
"""Keys that older configs have beside `rope_scaling`, and that stand in `rope_parameters` now."""


def with_overrides(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """`config` with `overrides` merged into it, dict by dict; lists are replaced whole.

    A key may be an alias that the config's class knows (`num_hidden_layers` of GPT-2 is its `n_layer`). Rotary
    parameters may be spelled as in older configs: `rope_scaling` with its `type`, null for no scaling, and `rope_theta`
    beside it. A list with a value for each layer follows the overrides where it follows from the rest of the config
    (`layer_types` from `num_hidden_layers`).

    Raises:
        ConfigError: a top-level key that the config does not have, a dict for a single value or the other way round, or
            a value that the config would not hold afterwards; all of them at once.
    """
    if not overrides:
        return config
    values = config.to_dict()
    given, problems = _by_own_names(config, overrides)
    problems += _unknown(config, values, given)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and not problems:
        given, problems = _rotary(given, rope, values)
    problems += _wrong_kinds(values, given, _KEY)
    if problems:
        raise ConfigError(problems)
    merged, problems = _lists_that_follow(config, values, _merge(values, given), given)
    if problems:
        raise ConfigError(problems)
    try:
        made = _built(config, merged)
    except Exception as error:  # each class checks its fields in its own way
        raise ConfigError([f"{_KEY}: {type(config).__name__} does not accept them: {_in_a_line(error)}"]) from error
    if problems := list(_lost(made.to_dict(), given, _KEY)):
        raise ConfigError(problems)
    return made


def _by_own_names(config: PretrainedConfig, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    given: dict[str, Any] = {}
    problems = []
    for key, value in overrides.items():
        name = config.attribute_map.get(key, key)
        if name in given:
            problems.append(f"{_KEY}.{key}: {name} is the same key; give one of them")
        given[name] = value
    return given, problems


def _unknown(config: PretrainedConfig, values: Mapping[str, Any], given: Iterable[str]) -> list[str]:
    known = {key for key in values if not key.startswith("_")} - set(_ELSEWHERE)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        each = [rope, *_by_kind_of_layer(rope).values()]
        known |= {"rope_scaling", *(key for key in _IN_ROPE_PARAMETERS if any(key in (one or ()) for one in each))}
    problems = []
    for key in given:
        if key in _ELSEWHERE:
            problems.append(f"{_KEY}.{key}: {_ELSEWHERE[key]}")
        elif key not in known:
            close = get_close_matches(key, {*known, *config.attribute_map})
            name = type(config).__name__
            way_out = f"did you mean {' or '.join(close)}?" if close else f"its keys are those of transformers' {name}"
            problems.append(f"{_KEY}.{key}: the {config.model_type} config has no such key; {way_out}")
    return problems


def _rotary(
    given: Mapping[str, Any], rope: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """`given` with every rotary parameter where the config has it: in `rope_parameters`, spelled anew."""
    others = {key: value for key, value in given.items() if key not in ("rope_parameters", "rope_scaling")}
    others = {key: value for key, value in others.items() if key not in _IN_ROPE_PARAMETERS or key in values}
    single = {key: given[key] for key in _IN_ROPE_PARAMETERS if key in given}
    new, old = given.get("rope_parameters", {}), given.get("rope_scaling", {})
    kinds = _by_kind_of_layer(rope)
    if old is None and not kinds:
        old = {"rope_type": "default"}
    if problems := [
        f"{_KEY}.{key} is {value!r}; it must be a dict, such as {{rope_type: yarn, factor: 4.0}}"
        for key, value in (("rope_parameters", new), ("rope_scaling", old))
        if not isinstance(value, dict)
    ]:
        return others, problems
    if kinds:
        astray = [*single, *(f"rope_scaling.{key}" for key in old if key not in kinds)]
        astray += [f"rope_parameters.{key}" for key in new if key not in kinds]
        if astray:
            places = " or ".join(f"{_KEY}.rope_parameters.{kind}" for kind in kinds)
            what = f"{_KEY}.{', '.join(astray)}"
            return others, [f"{what}: this model has rotary parameters for each kind of layer; give them in {places}"]
    problems = []
    parameters: dict[str, Any] = {}
    for part in (old, single, new):
        for spelled in _spelled_anew(part, kinds):
            problems += _contradictions(parameters, spelled, f"{_KEY}.rope_parameters")
            parameters = _merge(parameters, spelled)
    if not parameters:
        return others, problems
    if not kinds:
        problems += [
            f"{_KEY}.rope_parameters.{key} is a dict, but this model has one set of rotary parameters for all layers: "
            f"give {_KEY}.rope_parameters.rope_type and the others themselves"
            for key, value in parameters.items()
            if isinstance(value, dict)
        ]
    for kind in kinds or (None,):
        of_kind, there = (parameters, rope) if kind is None else (parameters.get(kind), rope[kind])
        if isinstance(of_kind, dict):
            problems += _rotary_problems(of_kind, there or {}, f"{_KEY}.rope_parameters{f'.{kind}' if kind else ''}")
    return others | {"rope_parameters": parameters}, problems


def _by_kind_of_layer(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The sets of parameters by kind of layer, null for a kind that is not rotated; empty where there is one set."""
    if not any(isinstance(value, dict) for value in rope.values()):
        return {}
    return {key: value for key, value in rope.items() if isinstance(value, dict | None)}


def _spelled_anew(parameters: Mapping[str, Any], kinds: Iterable[str]) -> Iterator[dict[str, Any]]:
    """`parameters` in parts, one a key, so that no two spellings of one key are in the same part."""
    for key, value in parameters.items():
        if key in kinds and isinstance(value, dict):
            yield from ({key: part} for part in _spelled_anew(value, ()))
        else:
            yield {"rope_type" if key == "type" else key: value}


def _contradictions(one: Mapping[str, Any], other: Mapping[str, Any], path: str) -> Iterator[str]:
    for key in other:
        if key not in one:
            continue
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            yield from _contradictions(one[key], other[key], f"{path}.{key}")
        elif one[key] != other[key]:
            yield f"{path}.{key}: given in two spellings, as {one[key]!r} and {other[key]!r}; give one of them"


def _rotary_problems(given: Mapping[str, Any], there: Mapping[str, Any], path: str) -> Iterator[str]:
    rope_type = given.get("rope_type", there.get("rope_type", "default"))
    types = sorted({"default", *ROPE_INIT_FUNCTIONS, there.get("rope_type", "default")})
    if rope_type not in types:
        yield f"{path}.rope_type is {rope_type!r}; valid: {', '.join(types)}"
    elif rope_type == "default" and "factor" in given:
        yield f"{path}.factor has no effect on rope_type default; give {path}.rope_type too"
    for key in given:
        if key not in there and key not in RopeParameters.__annotations__:
            log.warning("%s.%s: transformers has no such rotary parameter, and may not heed it", path, key)


def _wrong_kinds(values: Mapping[str, Any], given: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in given.items():
        there = values.get(key)
        if isinstance(there, dict) and not isinstance(value, dict):
            example = next((f", such as {path}.{key}.{name}=..." for name in there), "")
            yield f"{path}.{key} is {value!r}, but it is a dict: give its keys{example}"
        elif isinstance(there, dict):
            yield from _wrong_kinds(there, value, f"{path}.{key}")
        elif there is not None and isinstance(value, dict):
            yield f"{path}.{key} is a dict, but it is one value ({there!r}): give {path}.{key}=..."


def _lists_that_follow(
    config: PretrainedConfig, values: Mapping[str, Any], merged: dict[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """`merged` without the lists that the config's class makes of its other values, as it did before the overrides."""
    problems = []
    for key, value in values.items():
        if key in given or not isinstance(value, list):
            continue
        before, after = (_without(config, source, key) for source in (values, merged))
        if before == value:
            del merged[key]
        elif before is not None and after is not None and before != after:
            problems.append(
                f"{_KEY}: {key} would follow from {', '.join(given)}, but this checkpoint has {key} of its own: "
                f"override {_KEY}.{key} too"
            )
    return merged, problems


def _without(config: PretrainedConfig, values: Mapping[str, Any], key: str) -> Any:
    """What the config makes of `key` by itself; null where it cannot do without."""
    try:
        return _built(config, {name: value for name, value in values.items() if name != key}).to_dict().get(key)
    except Exception:  # each class checks its fields in its own way
        return None


def _built(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    made: PretrainedConfig = type(config).from_dict(copy.deepcopy(dict(values)))  # which writes into nested dicts
    return made


def _lost(made: Mapping[str, Any], given: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in given.items():
        there = made.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            yield from _lost(there, value, f"{path}.{key}")
        elif there != value:
            yield f"{path}.{key} is {value!r}, but the model's config makes {there!r} of it, by its other values"


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
