"""Puts overrides of rotary parameters where the config has them, and refuses parameters without effect.

transformers keeps all rotary parameters in `rope_parameters`, the base included; some models have one set for each kind
of layer. Older configs spell them `rope_scaling` and `rope_theta`, so a plain merge would leave the model unchanged
without an error.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from qk_sniffer.backbone.unloaded import unloaded
from qk_sniffer.logs import logger
from qk_sniffer.text import not_one_of

log = logger(__name__)

_KEY = "model.config_overrides"
_PATH = f"{_KEY}.rope_parameters"

IN_ROPE_PARAMETERS = ("rope_theta", "partial_rotary_factor")
"""Keys of `rope_parameters` that older configs have next to `rope_scaling`."""

_BY_ROPE_TYPE = frozenset(RopeParameters.__annotations__) - {"rope_type", "rope_theta", "mrope_section"}
"""Rotary parameters that only some rope types read."""


def by_kind_of_layer(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sets of parameters by kind of layer, None for a kind without RoPE.

    The result is empty if all layers share one set.
    """
    if not any(isinstance(value, dict) for value in rope.values()):
        return {}
    return {key: value for key, value in rope.items() if isinstance(value, dict | None)}


def in_rope_parameters(
    given: Mapping[str, Any], rope: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the overrides `given` with every rotary parameter in `rope_parameters`, and the problems with them.

    `rope` holds the config's `rope_parameters`, `values` the whole config.
    """
    others = {key: value for key, value in given.items() if key not in ("rope_parameters", "rope_scaling")}
    others = {key: value for key, value in others.items() if key not in IN_ROPE_PARAMETERS or key in values}
    single = {key: given[key] for key in IN_ROPE_PARAMETERS if key in given}
    new, old = given.get("rope_parameters", {}), given.get("rope_scaling", {})
    kinds = by_kind_of_layer(rope)
    if old is None and not kinds:
        old = {"rope_type": "default"}
    if problems := [
        f"{_KEY}.{key} is {value!r}; it must be a dict, such as {{rope_type: yarn, factor: 4.0}}"
        for key, value in (("rope_parameters", new), ("rope_scaling", old))
        if not isinstance(value, dict)
    ]:
        return others, problems
    if kinds:
        misplaced = [*single, *(f"rope_scaling.{key}" for key in old if key not in kinds)]
        misplaced += [f"rope_parameters.{key}" for key in new if key not in kinds]
        if misplaced:
            places = " or ".join(f"{_PATH}.{kind}" for kind in kinds)
            keys = f"{_KEY}.{', '.join(misplaced)}"
            return others, [f"{keys}: this model has rotary parameters for each kind of layer; give them in {places}"]
    parameters, problems = _merged((old, single, new), kinds)
    if not parameters:
        return others, problems
    if kinds:
        for kind, present in kinds.items():
            if isinstance(parameters.get(kind), dict):
                problems += _problems(parameters[kind], present or {}, f"{_PATH}.{kind}")
    else:
        problems += [
            f"{_PATH}.{key} is a dict, but this model has one set of rotary parameters for all layers: "
            f"give {_PATH}.rope_type and the others themselves"
            for key, value in parameters.items()
            if isinstance(value, dict)
        ]
        problems += _problems(parameters, rope, _PATH)
    return others | {"rope_parameters": parameters}, problems


def without_effect(config: PretrainedConfig, given: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    """Yields a problem for each rotary parameter of the overrides that the model of `config` does not read.

    `config` includes the overrides; `given` and `before` are the `rope_parameters` of the overrides and of the config
    without them.

    The decoder is built without weights, and its rotary parameters record which of them its code reads. Neither a table
    nor a comparison gives the same answer. transformers has no table: its validators accept `partial_rotary_factor` for
    every rope type, although most models ignore it with type default, and YaRN's `truncate` in a set for one kind of
    layer, where it has no effect; some models read further keys in their attention. Frequencies with and without a
    parameter are also equal if its value is the default, or if it changes only long texts.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    sets = {kind: one for kind, one in by_kind_of_layer(rope).items() if one is not None}
    changed = {kind: _changed(given.get(kind) or {}, before.get(kind) or {}) for kind in sets} if sets else {}
    changed = changed or {"": _changed(given, before)}
    if not any(changed.values()):
        return
    recorded = {kind: _RecordedDict(rope[kind] if kind else rope) for kind in changed}
    probe = copy.deepcopy(config)
    probe.rope_parameters = rope | recorded if sets else recorded[""]
    if unloaded(probe) is None:
        return
    for kind, keys in changed.items():
        parameters = recorded[kind]
        if "rope_theta" not in parameters.keys_read:  # the frequencies are computed elsewhere, or later
            continue
        read_in_forward = {"original_max_position_embeddings"} if "llama_4_scaling_beta" in parameters else set()
        path = f"{_PATH}.{kind}" if kind else _PATH
        for key in keys:
            if key not in parameters.keys_read | read_in_forward:
                yield (
                    f"{path}.{key} has no effect on rope_type {parameters.get('rope_type')} of {config.model_type}: "
                    f"leave it out, or give the {path}.rope_type that it belongs to"
                )


class _RecordedDict(dict[str, Any]):
    """A dict that records the keys that are read from it. A deep copy of it is the same object."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def __deepcopy__(self, memo: Any) -> "_RecordedDict":
        return self


def _changed(given: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    return [key for key, value in given.items() if key in _BY_ROPE_TYPE and value != before.get(key)]


def _merged(parts: tuple[Mapping[str, Any], ...], kinds: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Merges rotary parameters of several spellings; a parameter with two values is a problem."""
    values: dict[tuple[str, str], Any] = {}
    problems = []
    for part in parts:
        for kind, key, value in _entries(part, kinds):
            if values.setdefault((kind, key), value) != value:
                path = f"{_PATH}.{kind}.{key}" if kind else f"{_PATH}.{key}"
                first = values[kind, key]
                problems.append(f"{path}: given in two spellings, as {first!r} and {value!r}; give one of them")
    sets: dict[str, dict[str, Any]] = {}
    for (kind, key), value in values.items():
        sets.setdefault(kind, {})[key] = value
    outside = sets.pop("", {})
    return sets | outside, problems


def _entries(part: Mapping[str, Any], kinds: Collection[str]) -> Iterator[tuple[str, str, Any]]:
    """Yields (kind of layer, key, value) with the current spelling of the key; the kind is empty outside of a set."""
    for key, value in part.items():
        if key in kinds and isinstance(value, dict):
            yield from ((key, inner, one) for _, inner, one in _entries(value, ()))
        else:
            yield "", "rope_type" if key == "type" else key, value


def _problems(given: Mapping[str, Any], present: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yields the problems of one set of parameters; `present` is the config's set. Warns of unknown keys."""
    rope_type = given.get("rope_type", present.get("rope_type", "default"))
    types = sorted({"default", *ROPE_INIT_FUNCTIONS, present.get("rope_type", "default")})
    if rope_type not in types:
        yield not_one_of(f"{path}.rope_type", rope_type, types)
    elif rope_type == "default" and "factor" in given:
        yield f"{path}.factor has no effect on rope_type default; give {path}.rope_type too"
    for key in given:
        if key not in present and key not in RopeParameters.__annotations__:
            log.warning("%s.%s: transformers has no such rotary parameter, and may ignore it", path, key)
