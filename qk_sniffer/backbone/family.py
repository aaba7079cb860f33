"""Describes a model family: where its attention layers, queries and keys are.

The generic `Family` serves every model whose decoder calls transformers' attention interface. A family that differs
overrides one or two methods in a class named `Family`, in a file of its own, `models/<model_type>.py`. The config's
`model_type` selects that file; `model.family=package.module:Class` names any other class.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qk_sniffer.backbone.provable_types import PROVABLE_TYPES, PROVABLE_VALUE_TYPES
from qk_sniffer.errors import CaptureError, ConfigError

RotaryCall = tuple[torch.Tensor, torch.Tensor]
"""An input of a rotary function and the output for it."""

QueryKey = tuple[torch.Tensor, torch.Tensor]
"""The queries (B, H, n, d) and the keys (B, K, n, d) of one layer."""

NO_SELF_ATTENTION = ("Cross", "Delta", "Lightning")
"""Parts of the names of attention classes that attend to another sequence, or are linear and have no softmax."""


_PLAIN_ATTENTION = (None, "full_attention", "sliding_attention", "attention", "hybrid", "hybrid_sliding")
"""Entries of `layer_types` for softmax attention to all earlier keys, or to those of a window."""


class Family:
    """The generic family. Its methods receive loaded modules."""

    auto_class = "AutoModel"
    """The class of transformers that loads the decoder without its language-model head."""

    key_mapping: Mapping[str, str] = MappingProxyType(
        {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
    )
    """Pattern -> replacement: maps the names of the decoder's weights in a multimodal checkpoint to the decoder's own.
    A family that overrides it loads the decoder alone; otherwise the class of the whole model names the weights, if
    transformers has one. The two patterns are of older and of newer files."""

    unused = ("pooler.",)
    """Prefixes of decoder weights that no query or key depends on. A checkpoint may lack these weights,
    or have others of these names."""

    rotary_function = "apply_rot"
    """The common start of the names of the rotary functions in the Python module of the attention class."""

    changed_after_rotary = False
    """Whether query and key are scaled, normalized or repeated after the rotary embedding.

    If so, the inputs of the rotary function, query first, are the vectors before RoPE.
    """

    def decoder(self, model: Any) -> nn.Module:
        """Returns the text decoder inside the loaded `model`, without any head or vision tower."""
        decoder: nn.Module = model.get_decoder()
        return decoder

    @functools.cached_property
    def _parts(self) -> "WeakKeyDictionary[nn.Module, _Parts]":
        """The rotated parts of heads that were found by their numbers, by module: a GPU waits for the comparison."""
        return WeakKeyDictionary()

    @functools.cached_property
    def _with_indexer(self) -> "WeakKeyDictionary[nn.Module, bool]":
        """Whether an indexer is among the parts of a module, which every call would list again."""
        return WeakKeyDictionary()

    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        """Returns the self-attention modules of `decoder`, each with its layer index. No other module is captured."""
        candidates = {
            name: module
            for name, module in decoder.named_modules()
            if isinstance(getattr(module, "layer_idx", None), int)
            and "Attention" in type(module).__name__
            and not any(mark in type(module).__name__ for mark in NO_SELF_ATTENTION)
            and "encoder_attn" not in name
            and not getattr(module, "is_cross_attention", False)
            and getattr(module, "layer_type", None) != "linear_attention"
        }
        # A block of attention and norms may look like the attention module inside it: the inner one counts.
        return {
            module: module.layer_idx
            for name, module in candidates.items()
            if not any(other.startswith(f"{name}.") for other in candidates)
        }

    def layer(self, module: nn.Module, index: int, arguments: Mapping[str, Any]) -> int:
        """Returns the layer of this call of `module`; the default is its `index` from `attention_layers`.

        A family overrides this if one module serves several layers. `arguments` are the keyword arguments of the
        module's forward.
        """
        return index

    def sliding_window(self, module: nn.Module, arguments: dict[str, Any]) -> int | None:
        """Returns how many positions a query of this call sees, its own included; None on full attention.

        The default is the kernel's argument. Without one, it is the config's window, if the config lists the layer as
        a sliding one.
        """
        window: int | None = arguments.get("sliding_window")
        if window is None and layer_type(module) == "sliding_attention":
            config: Any = module.config
            return getattr(config, "sliding_window", None)
        return window

    def attention_chunk(self, module: nn.Module) -> int | None:
        """Returns the chunk size of chunked attention, in positions; None without chunks.

        A query sees only keys of its own chunk.
        """
        if layer_type(module) == "chunked_attention":
            config: Any = module.config
            return int(config.attention_chunk_size)
        return None

    def sparse_attention(self, module: nn.Module) -> bool:
        """Whether a query sees only some of the keys before it, selected by their content.

        The default is True if an indexer selects the keys: one inside `module`, or one that `module` shares with
        another layer.
        """
        if getattr(module, "skip_topk", False):
            return True
        if module not in self._with_indexer:
            self._with_indexer[module] = any("Indexer" in type(part).__name__ for part in module.modules())
        return self._with_indexer[module]

    def hides_keys(self, module: nn.Module) -> bool:
        """Whether a query does not see all earlier keys for another reason than a window.

        The default is True for chunks, for keys selected by their content, and for an entry of the config's
        `layer_types` that does not name full or sliding attention.
        """
        chunked = self.attention_chunk(module) is not None
        return chunked or self.sparse_attention(module) or layer_type(module) not in _PLAIN_ATTENTION

    def length_boundary(self, config: Any) -> int | None:
        """Returns the most tokens of a text whose vectors do not change with padding; None if none do.

        Longer texts run alone. `config` is the decoder's.
        """
        return None

    def position_bias(self, module: nn.Module, arguments: Mapping[str, Any]) -> bool:
        """Whether a bias by position or by key is added to the logits. `arguments` are those of the kernel, by name."""
        return arguments.get("position_bias") is not None

    def register_tap(self, module: nn.Module, on_query_key: Callable[..., None]) -> Sequence[Any]:
        """Makes `module` call `on_query_key(query, key)` in each forward pass.

        Only modules that do not call a kernel of the attention interface need this. Query and key have the shapes of
        `AttentionCall`. With a key-value cache, the call comes after the cache's update, with all keys that the module
        attends to or with the new ones alone. `value`, `scaling` and other arguments of a kernel may follow by name;
        values are captured only where `value` does.

        Returns handles whose `remove()` restores the module; the tap removes the last one first.
        """
        return ()

    def register_output_tap(self, module: nn.Module, on_output: Callable[[torch.Tensor], None]) -> Sequence[Any]:
        """Makes `module` call `on_output(output)` in each forward pass, after `on_query_key` of `register_tap`.

        Only modules that do not call a kernel of the attention interface need this; without it, their outputs are not
        captured. `output` (B, H, n, w) are the values weighted by attention, before the output projection.

        Returns handles as `register_tap` does.
        """
        return ()

    def value_dim(self, module: nn.Module, key_dim: int, width: int) -> int:
        """Returns the model's own width of a value, which the kernel receives with `width` numbers.

        The default leaves out the zeros of a module that fills its values up to the width `key_dim` of a key: the rest
        after its `v_head_dim`.
        """
        own = getattr(module, "v_head_dim", None)
        return own if width == key_dim and isinstance(own, int) and own < width else width

    def before_rotary(
        self, module: nn.Module, rotary_calls: Sequence[RotaryCall], query: torch.Tensor, key: torch.Tensor
    ) -> QueryKey:
        """Returns the vectors before the rotary embedding for `query` and `key`, the vectors that attention receives.

        These are the inputs of the layer's rotary calls, bit for bit, if the outputs of those calls are `query` and
        `key`, or the first or the last part of each of their heads. A layer without a rotary call (NoPE) does not
        rotate: its vectors are returned unchanged.

        Raises:
            CaptureError: another operation between the rotary function and attention leaves them undefined.
        """
        if not rotary_calls:
            return query, key
        if self.changed_after_rotary:
            (first, _), (second, _) = rotary_calls
            return first, second
        parts = self._parts.setdefault(module, {})
        before_query = _unrotated(query, rotary_calls, parts, "query")
        before_key = _unrotated(key, rotary_calls, parts, "key")
        if before_query is None or before_key is None:
            raise CaptureError(
                f"{type(module).__name__} attends with a {'query' if before_query is None else 'key'} that no rotary "
                "function returned in its layer, so vectors before RoPE are not defined for this model: set "
                "capture.capture_pre_rope=false, or define them in a family (model.family=package.module:Class)"
            )
        return before_query, before_key

    def projections(self, module: nn.Module) -> dict[str, nn.Module] | None:
        """Returns the submodules whose outputs determine query and key before RoPE, for the proof by hooks.

        The default returns `q` and `k`: the projections, or the norms after them, found by their names in a model type
        of `PROVABLE_TYPES`. It also returns `v`, for values, if the module has such a part. None means that they are
        not known for this model, so no proof by hooks is possible.
        """
        if getattr(getattr(module, "config", None), "model_type", None) not in PROVABLE_TYPES:
            return None
        found: dict[str, nn.Module] = {}
        names = ("proj",) if self.changed_after_rotary else ("norm", "layernorm", "proj")
        for kind in ("q", "k", "v"):
            parts = [getattr(module, f"{kind}_{name}", None) for name in names]
            part = next((part for part in parts if isinstance(part, nn.Module)), None)
            if part is not None:
                found[kind] = part
            elif kind != "v":
                return None
        return found

    def projected(self, module: nn.Module, outputs: Mapping[str, torch.Tensor], head_dim: int) -> QueryKey:
        """Returns `query` (1, H, n, d) and `key` (1, K, n, d) before RoPE, for the proof by hooks.

        `outputs` holds the outputs of the `projections` by their names, from a pass over n tokens. n is greater than
        the number of heads.
        """
        return heads_first(outputs["q"], head_dim), heads_first(outputs["k"], head_dim)

    def projected_value(
        self, module: nn.Module, outputs: Mapping[str, torch.Tensor], value_dim: int
    ) -> torch.Tensor | None:
        """Returns the values (1, K, n, value_dim) that attention receives, for the proof by hooks.

        `outputs` are those of `projected`. The default knows the model types of `PROVABLE_VALUE_TYPES`. None means that
        the values are not known, so neither they nor the outputs of attention can be proven.
        """
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        if "v" not in outputs or model_type not in PROVABLE_VALUE_TYPES:
            return None
        return heads_first(outputs["v"], value_dim)

    def rotated(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, embeddings: Any, width: int
    ) -> QueryKey | None:
        """Returns `query` and `key` after RoPE, in a layer that calls a rotary function, for the proof by hooks.

        `embeddings` is the output of the model's rotary embedding for this layer, or None. The rotary function turns
        `width` components of each head; the default assumes the first ones. None means that the rotation is not known.
        """
        rotary = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if rotary is None or not isinstance(embeddings, tuple):
            return None
        if list(inspect.signature(rotary).parameters)[:2] != ["q", "k"]:
            return None
        turned_query, turned_key = rotary(query[..., :width], key[..., :width], *embeddings)
        return torch.cat([turned_query, query[..., width:]], dim=-1), torch.cat([turned_key, key[..., width:]], dim=-1)

    def after_rotary(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> QueryKey | None:
        """Returns the vectors that attention receives, from `query` and `key` after RoPE, for the proof by hooks.

        None means that the step between the two is not known.
        """
        return None if self.changed_after_rotary else (query, key)


def layer_type(module: nn.Module) -> str | None:
    """Returns the entry of the config's `layer_types` for the layer that `module` names as its own."""
    layer = getattr(module, "layer_idx", None)
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return types[layer] if isinstance(layer, int) and 0 <= layer < len(types) else None


def heads_first(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Returns `states` as (1, heads, n, head_dim).

    `states` is (1, n, heads * head_dim), (1, n, heads, head_dim) or (1, heads, n, head_dim), with n > heads.
    """
    if states.dim() == 3:
        states = states.unflatten(-1, (-1, head_dim))
    return states.transpose(1, 2) if states.shape[1] > states.shape[2] else states


_Parts = dict[tuple[str, int], tuple[int, slice]]
"""By query or key and the number of rotary calls: the number of the call whose output is a part of each head, and the
part."""


def _unrotated(
    states: torch.Tensor, rotary_calls: Sequence[RotaryCall], parts: _Parts, name: str
) -> torch.Tensor | None:
    """Returns the vectors before RoPE of `states`; None if no rotary call returned them.

    `parts` has the rotated parts that were found in earlier passes of the same module, and gets those found now.
    """
    calls = [(before, after) for before, after in rotary_calls if _is_distinct(before, after)]
    # Some families rotate (B, n, heads, d) and transpose later.
    calls += [(before.transpose(1, 2), after.transpose(1, 2)) for before, after in calls]
    for before, after in calls:
        if _same(after, states):
            return before
    known = parts.get((name, len(calls)))
    for number in range(len(calls)) if known is None else [known[0]]:
        before, after = calls[number]
        if not _may_be_part(after, states):
            continue
        part = _part(after, states) if known is None else known[1]
        if part is not None:
            parts[name, len(calls)] = number, part
            whole = states.clone()
            whole[..., part] = before
            return whole
    return None


def _is_distinct(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Returns False if a rotary function takes its arguments in another order, or writes its result into them."""
    return before.shape == after.shape and before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _may_be_part(after: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether the rotated tensor `after` has the shape of a part of each head of `states`.

    `after` has one head for each head of `states`, or one head that all of them share.
    """
    return (
        after.shape[-1] <= states.shape[-1]
        and after.shape[1] in (1, states.shape[1])
        and after.shape[2] == states.shape[2]
    )


def _part(after: torch.Tensor, states: torch.Tensor) -> slice | None:
    """Returns the slice of each head of `states` that equals `after`, which may be one by its shape; None if none."""
    width, heads = after.shape[-1], states.shape[1]
    for part in (slice(0, width), slice(states.shape[-1] - width, states.shape[-1])):
        if torch.equal(states[..., part], after.expand(-1, heads, -1, -1)):
            return part
    return None


class CallSpy:
    """Makes `owner.<name>` call `show` with its arguments before it runs, until `remove()`.

    Then it calls `show_result` with what it returns, if that is given.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        show: Callable[..., None] | None = None,
        *,
        show_result: Callable[[Any], None] | None = None,
    ) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def showing(*args: Any, **kwargs: Any) -> Any:
            if show is not None:
                show(*args, **kwargs)
            returned = function(*args, **kwargs)
            if show_result is not None:
                show_result(returned)
            return returned

        self.owner, self.name, self.before = owner, name, vars(owner).get(name)
        setattr(owner, name, showing)

    def remove(self) -> None:
        if self.before is None:  # a method of its class
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def find_family(model_type: str) -> Family:
    """Returns the family of `models/<model_type>.py`, or the generic one."""
    name = f"qk_sniffer.models.{model_type.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return Family()
    concrete: Family = importlib.import_module(name).Family()
    return concrete


def imported_family(path: str) -> Family:
    """Imports the family that `path` names as `package.module:Class`.

    Raises:
        ConfigError: the class cannot be imported, or it is not a family.
    """
    module_name, _, class_name = path.partition(":")
    try:
        family = getattr(importlib.import_module(module_name), class_name or "Family")()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            [
                f"model.family={path}: {error}; expected package.module:Class, a subclass of "
                "qk_sniffer.families.Family that is installed, or in the folder where `python -m qk_sniffer` starts"
            ]
        ) from error
    if not isinstance(family, Family):
        raise ConfigError([f"model.family={path}: {class_name} is not a subclass of qk_sniffer.families.Family"])
    return family
