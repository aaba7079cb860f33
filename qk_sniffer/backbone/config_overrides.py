"""The model's own config with the user's overrides in it: each takes effect, or is refused with the way out.

Rotary parameters are where a plain merge goes wrong in silence: transformers keeps all of them, the base included, in
`rope_parameters`, in some models one set for each kind of layer, while people write `rope_scaling` and `rope_theta`.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig
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


_BY_ROPE_TYPE = frozenset(RopeParameters.__annotations__) - {"rope_type", "rope_theta", "mrope_section"}
"""Rotary parameters that some types read and others do not."""


def with_overrides(
    config: PretrainedConfig, overrides: Mapping[str, Any], saved: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """`config` with `overrides` merged into it, dict by dict; lists are replaced whole.

    A key may be an alias that the config's class knows (`num_hidden_layers` of GPT-2 is its `n_layer`). Rotary
    parameters may be spelled as in older configs: `rope_scaling` with its `type`, null for no scaling, and `rope_theta`
    beside it. A list with a value for each layer follows the overrides where it follows from the rest of the config
    (`layer_types` from `num_hidden_layers`). `saved` is what the checkpoint's config.json holds: a value that the class
    dropped at loading, as a window that was not in use, counts again where an override asks for it.

    Raises:
        ConfigError: a top-level key that the config does not have, a dict for a single value or the other way round, or
            a value that the config would not hold afterwards, or that the model would not heed; all of them at once.
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
    merged = _merge(values | _dropped(config, values, saved), given)
    merged, problems = _lists_that_follow(config, values, merged, given)
    if problems:
        raise ConfigError(problems)
    try:
        made = _built(config, merged)
    except Exception as error:  # each class checks its fields in its own way
        raise ConfigError([f"{_KEY}: {type(config).__name__} does not accept them: {_in_a_line(error)}"]) from error
    problems = list(_lost(made.to_dict(), given, _KEY))
    if problems := problems or [*_without_window(made, given), *_unread(made, given, values)]:
        raise ConfigError(problems)
    return made


def unloaded(config: PretrainedConfig) -> nn.Module | None:
    """The decoder of `config` without weights, on the meta device; None where transformers cannot build it alone."""
    try:
        with torch.device("meta"):
            decoder: nn.Module = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception:  # whatever its code stumbles over; loading it says why
        return None
    return decoder


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
    return (_makes(config, {name: value for name, value in values.items() if name != key}) or {}).get(key)


def _dropped(config: PretrainedConfig, values: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The single values of `saved` that the config's class put `values` in place of, and would again."""
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
    """What the config makes of `values`; null where it does not accept them."""
    try:
        return _built(config, values).to_dict()
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


def _without_window(made: PretrainedConfig, given: Mapping[str, Any]) -> Iterator[str]:
    if not given.get("use_sliding_window"):
        return
    what = f"{_KEY}.use_sliding_window has no effect"
    kinds = getattr(made, "layer_types", None)
    if not getattr(made, "sliding_window", None):
        yield f"{what} without a window, and this checkpoint has none: give {_KEY}.sliding_window too"
    elif kinds and "sliding_attention" not in kinds:
        others = [key for key in ("max_window_layers", "layer_types") if hasattr(made, key)]
        places = " or ".join(f"{_KEY}.{key}" for key in others)
        yield f"{what}, as all layers of this model are full ones: give {places} too"


class _Watched(dict[str, Any]):
    """Rotary parameters that know which of them were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __deepcopy__(self, memo: Any) -> "_Watched":
        return self


def _unread(made: PretrainedConfig, given: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Rotary parameters that the model does not look at when it is built."""
    rope = getattr(made, "rope_parameters", None)
    if not isinstance(rope, dict) or not isinstance(given.get("rope_parameters"), dict):
        return
    kinds = _by_kind_of_layer(rope)
    each = {f".{kind}": (given["rope_parameters"].get(kind), values["rope_parameters"][kind]) for kind in kinds}
    each = each or {"": (given["rope_parameters"], values["rope_parameters"])}
    asked = {
        where: [key for key, value in (new or {}).items() if key in _BY_ROPE_TYPE and value != (old or {}).get(key)]
        for where, (new, old) in each.items()
    }
    if not any(asked.values()):
        return
    watched = {where: _Watched((rope[where[1:]] if where else rope) or {}) for where in each}
    config = copy.deepcopy(made)
    config.rope_parameters = watched[""] if not kinds else rope | {kind: watched[f".{kind}"] for kind in kinds}
    if unloaded(config) is None:
        return
    for where, keys in asked.items():
        parameters = watched[where]
        if "rope_theta" not in parameters.read:  # its frequencies come later, or from elsewhere
            continue
        if "llama_4_scaling_beta" in parameters:  # read in the forward
            parameters.read.add("original_max_position_embeddings")
        path = f"{_KEY}.rope_parameters{where}"
        for key in keys:
            if key not in parameters.read:
                yield (
                    f"{path}.{key} has no effect on rope_type {parameters.get('rope_type')} of {made.model_type}: "
                    f"leave it out, or give the {path}.rope_type that it belongs to"
                )


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
