"""Merges the user's overrides into a model's config; refuses an override that would have no effect."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from transformers import PretrainedConfig

from qk_sniffer.backbone.rotary_overrides import (
    IN_ROPE_PARAMETERS,
    by_kind_of_layer,
    in_rope_parameters,
    without_effect,
)
from qk_sniffer.errors import ConfigError

_KEY = "model.config_overrides"

_ELSEWHERE = {
    "dtype": "set model.dtype",
    "torch_dtype": "set model.dtype",
    "attn_implementation": "set model.attn_implementation",
    "_attn_implementation": "set model.attn_implementation",
    "model_type": "it names the type of the checkpoint, and cannot be changed",
    "text_config": "overrides apply to the text config itself: give its keys without text_config",
}
"""Keys of configs that cannot be overridden, with the way out."""


def with_overrides(
    config: PretrainedConfig, overrides: Mapping[str, Any], saved: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """Returns `config` with `overrides` merged into it, dict by dict; a list is replaced as a whole.

    A key may be an alias of the config's class (`num_hidden_layers` of GPT-2 is its `n_layer`). Rotary parameters may
    have the spelling of older configs: `rope_scaling` with its `type`, null for no scaling, and `rope_theta` next to
    it. A list with a value for each layer, such as `layer_types`, is derived again from the overridden values if the
    checkpoint's list is derived from its config. `saved` holds the checkpoint's config.json: a value that the class
    dropped when it loaded the config, such as an unused window, counts again if an override asks for it.

    Raises:
        ConfigError: the config does not have a key, a dict replaces a single value or the reverse, the config would not
            keep a value, or the model would ignore it. The error lists all problems.
    """
    if not overrides:
        return config
    values = config.to_dict()
    given, problems = _by_own_names(config, overrides)
    problems += _unknown(config, values, given)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and not problems:
        given, problems = in_rope_parameters(given, rope, values)
    problems += _wrong_kinds(values, given, _KEY)
    if problems:
        raise ConfigError(problems)
    merged = _merge(values | _dropped(config, values, saved), given)
    merged, problems = _without_derived_lists(config, values, merged, given)
    if problems:
        raise ConfigError(problems)
    try:
        new = _built(config, merged)
    except Exception as error:  # each class checks its fields in its own way
        raise ConfigError([f"{_KEY}: {type(config).__name__} does not accept them: {_in_a_line(error)}"]) from error
    if problems := list(_lost(new.to_dict(), given, _KEY)):
        raise ConfigError(problems)
    problems = list(_without_window(new, given))
    if isinstance(rope, dict):
        problems += without_effect(new, given.get("rope_parameters", {}), rope)
    if problems:
        raise ConfigError(problems)
    return new


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
        sets = [rope, *by_kind_of_layer(rope).values()]
        known |= {"rope_scaling", *(key for key in IN_ROPE_PARAMETERS if any(key in (one or ()) for one in sets))}
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


def _wrong_kinds(values: Mapping[str, Any], given: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in given.items():
        present = values.get(key)
        if isinstance(present, dict) and not isinstance(value, dict):
            example = next((f", such as {path}.{key}.{name}=..." for name in present), "")
            yield f"{path}.{key} is {value!r}, but it is a dict: give its keys{example}"
        elif isinstance(present, dict):
            yield from _wrong_kinds(present, value, f"{path}.{key}")
        elif present is not None and isinstance(value, dict):
            yield f"{path}.{key} is a dict, but it is one value ({present!r}): give {path}.{key}=..."


def _without_derived_lists(
    config: PretrainedConfig, values: Mapping[str, Any], merged: dict[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns `merged` without the lists that the config's class derives from its other values.

    A list of the checkpoint that differs from the derived one is a problem if the overrides change the derived one.
    """
    problems = []
    for key, value in values.items():
        if key in given or not isinstance(value, list):
            continue
        before, after = (_without(config, source, key) for source in (values, merged))
        if before == value:
            del merged[key]
        elif before is not None and after is not None and before != after:
            problems.append(
                f"{_KEY}: {key} would follow from {', '.join(given)}, but this checkpoint has its own {key}: "
                f"override {_KEY}.{key} too"
            )
    return merged, problems


def _without(config: PretrainedConfig, values: Mapping[str, Any], key: str) -> Any:
    """Returns the config's own value for `key`; None if it requires one."""
    return (_makes(config, {name: value for name, value in values.items() if name != key}) or {}).get(key)


def _dropped(config: PretrainedConfig, values: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the single values of `saved` that the config's class replaced by those of `values`, and would again."""
    candidates = {
        key: value
        for key, value in (saved or {}).items()
        if key in values and key not in _ELSEWHERE and isinstance(value, bool | int | float | str)
    }
    return {
        key: value
        for key, value in candidates.items()
        if value != values[key] and _makes(config, dict(values) | {key: value}) == values
    }


def _makes(config: PretrainedConfig, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the values of the config that is built from `values`; None if its class refuses them."""
    try:
        return _built(config, values).to_dict()
    except Exception:  # each class checks its fields in its own way
        return None


def _built(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    new: PretrainedConfig = type(config).from_dict(copy.deepcopy(dict(values)))  # it writes into nested dicts
    return new


def _lost(new: Mapping[str, Any], given: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in given.items():
        kept = new.get(key)
        if isinstance(value, dict) and isinstance(kept, dict):
            yield from _lost(kept, value, f"{path}.{key}")
        elif kept != value:
            yield f"{path}.{key} is {value!r}, but the model's config changes it to {kept!r}, by its other values"


def _without_window(new: PretrainedConfig, given: Mapping[str, Any]) -> Iterator[str]:
    if not given.get("use_sliding_window"):
        return
    problem = f"{_KEY}.use_sliding_window has no effect"
    kinds = getattr(new, "layer_types", None)
    if not getattr(new, "sliding_window", None):
        yield f"{problem} without a window, and this checkpoint has none: give {_KEY}.sliding_window too"
    elif kinds and "sliding_attention" not in kinds:
        others = [key for key in ("max_window_layers", "layer_types") if hasattr(new, key)]
        places = " or ".join(f"{_KEY}.{key}" for key in others)
        yield f"{problem}, because all layers of this model have full attention: give {places} too"


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
