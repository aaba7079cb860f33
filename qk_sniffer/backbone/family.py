"""What a model family must say about itself.

`Family` is the generic answer and serves every model whose decoder calls transformers' attention interface.
A family that differs overrides one or two methods in a file of its own, `models/<model_type>.py`, with a class
named `Family`; it is found by the config's `model_type`, or named by `model.family=package.module:Class`.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from qk_sniffer.errors import CaptureError, ConfigError

_PROVABLE_TYPES = """
    afmoe apertus arcee aria_text bamba bitnet cohere cohere2 cohere2_moe cohere_compass_text cwm diffllama doge dots1
    emu3_text_model ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text
    gemma4_unified_text glm glm4 glm4_moe gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2
    jamba kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text mellum mimo_v2_flash minimax minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mixtral mllama_text_model modernbert-decoder moshi nanochat nemotron
    nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma
"""
PROVABLE_TYPES = frozenset(_PROVABLE_TYPES.split())
"""Model types whose query and key are known to follow from the submodules that `Family.projections` finds by their
names: those that `models/SUPPORTED.md` says are proven. Of others nobody has looked: something may come between, and a
right dataset would fail its proof."""

RotaryCall = tuple[torch.Tensor, torch.Tensor]
"""A tensor that went into a rotary function, and the tensor that came out of it."""

QueryKey = tuple[torch.Tensor, torch.Tensor]
"""The queries and the keys of one layer."""

NO_SELF_ATTENTION = ("Cross", "Delta", "Lightning")
"""In the name of an attention class: it attends to another sequence, or is linear and has no softmax."""


class Family:
    """The generic family. Methods take modules as they are after loading."""

    auto_class = "AutoModel"
    """The class of transformers that loads the decoder without its language-model head."""

    key_mapping: Mapping[str, str] = MappingProxyType(
        {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
    )
    """How a multimodal checkpoint names its decoder's weights, in older and in newer files: pattern -> replacement."""

    unused = ("pooler.",)
    """Prefixes of the decoder's weights that no query or key depends on: a checkpoint may lack them."""

    rotary_function = "apply_rot"
    """How the names of its rotary functions begin, in the Python module of its attention."""

    changed_after_rotary = False
    """True where query and key are scaled, normed or repeated after the rotary embedding: what they are before RoPE is
    then what went into it, query first."""

    def decoder(self, model: Any) -> nn.Module:
        """The text decoder inside the loaded `model`: what is run, without any head or vision tower."""
        decoder: nn.Module = model.get_decoder()
        return decoder

    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        """The self-attention modules of `decoder`, each with its layer index. No other module is captured."""
        found = {
            name: module
            for name, module in decoder.named_modules()
            if isinstance(getattr(module, "layer_idx", None), int)
            and "Attention" in type(module).__name__
            and not any(mark in type(module).__name__ for mark in NO_SELF_ATTENTION)
            and "encoder_attn" not in name
            and not getattr(module, "is_cross_attention", False)
        }
        # A block of attention and norms may carry the same marks as the attention inside it.
        return {
            module: module.layer_idx
            for name, module in found.items()
            if not any(other.startswith(f"{name}.") for other in found)
        }

    def layer(self, module: nn.Module, index: int, arguments: Mapping[str, Any]) -> int:
        """The layer that this call of `module` is, where it differs from its `index` among the attention layers.

        `arguments` are the keyword arguments of the module's forward.
        """
        return index

    def sliding_window(self, module: nn.Module, arguments: dict[str, Any]) -> int | None:
        """The window of this attention call: how many positions a query sees, itself included; None: all.

        Here what the kernel is told, or else the config's where that says that this layer has one.
        """
        told: int | None = arguments.get("sliding_window")
        if told is None and _layer_type(module) == "sliding_attention":
            config: Any = module.config
            return getattr(config, "sliding_window", None)
        return told

    def attention_chunk(self, module: nn.Module) -> int | None:
        """The chunk of this attention: a query sees the keys of its own chunk of so many positions; None: no chunks."""
        if _layer_type(module) == "chunked_attention":
            config: Any = module.config
            return int(config.attention_chunk_size)
        return None

    def sparse_attention(self, module: nn.Module) -> bool:
        """Does a query see only some of the keys before it, chosen by what they hold?

        Here where an indexer picks them: one inside `module`, or one of another layer that `module` shares.
        """
        shared = bool(getattr(module, "skip_topk", False))
        return shared or any("Indexer" in type(part).__name__ for part in module.modules())

    def position_bias(self, module: nn.Module, arguments: Mapping[str, Any]) -> bool:
        """Is a bias by position, or by key, added to the logits? `arguments` are those of the kernel."""
        return arguments.get("position_bias") is not None

    def register_tap(self, module: nn.Module, on_query_key: Callable[..., None]) -> Sequence[Any]:
        """Makes `module` call `on_query_key(query, key)` in each forward.

        For a module that asks the attention interface for no kernel.

        Query and key are those of `AttentionCall`; `scaling` and the other arguments of a kernel may follow by name.
        Returns what undoes it, the last one first: handles of hooks, or others with a `remove()`.
        """
        return ()

    def before_rotary(
        self, module: nn.Module, rotary_calls: Sequence[RotaryCall], query: torch.Tensor, key: torch.Tensor
    ) -> QueryKey:
        """What `query` and `key`, as attention receives them, were before the rotary embedding.

        The inputs of rotary calls are the answer, bit for bit, where the tensors are their very outputs, or carry them
        as the first or the last part of each head beside a part that is not rotated. A layer without any rotary call
        (NoPE) rotates nothing. Anything else between the two is not defined here.
        """
        if not rotary_calls:
            return query, key
        if self.changed_after_rotary:
            (first, _), (second, _) = rotary_calls
            return first, second
        before_query, before_key = _unrotated(query, rotary_calls), _unrotated(key, rotary_calls)
        if before_query is None or before_key is None:
            raise CaptureError(
                f"{type(module).__name__} attends with a {'query' if before_query is None else 'key'} that no rotary "
                "function returned in its layer, so that vectors before RoPE are not defined for this model: set "
                "capture.capture_pre_rope=false, or say what they are in a family (model.family=package.module:Class)"
            )
        return before_query, before_key

    def projections(self, module: nn.Module) -> dict[str, nn.Module] | None:
        """The submodules whose outputs query and key before RoPE are made of, for the proof by hooks.

        Here `q` and `k`, the projections or the norms behind them. None: not known for this model, so there is no proof
        by hooks.
        """
        if getattr(getattr(module, "config", None), "model_type", None) not in PROVABLE_TYPES:
            return None
        found: dict[str, nn.Module] = {}
        names = ("proj",) if self.changed_after_rotary else ("norm", "layernorm", "proj")
        for kind in ("q", "k"):
            parts = [getattr(module, f"{kind}_{name}", None) for name in names]
            part = next((part for part in parts if isinstance(part, nn.Module)), None)
            if part is None:
                return None
            found[kind] = part
        return found

    def projected(self, module: nn.Module, outputs: Mapping[str, torch.Tensor], head_dim: int) -> QueryKey:
        """`query` (1, H, n, d) and `key` (1, K, n, d) before RoPE, for the proof by hooks.

        `outputs` are those of the `projections`, by their names, of a forward over n tokens, more than there are heads.
        """
        return heads_first(outputs["q"], head_dim), heads_first(outputs["k"], head_dim)

    def rotated(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, embeddings: Any, width: int
    ) -> QueryKey | None:
        """`query` and `key` after RoPE, in a layer that calls a rotary function, for the proof by hooks.

        `embeddings` is what the model's rotary embedding gave this layer, if anything; `width`, how many components of
        each head the rotary function was given: here the first ones. None: not known how.
        """
        rotary = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if rotary is None or not isinstance(embeddings, tuple):
            return None
        if list(inspect.signature(rotary).parameters)[:2] != ["q", "k"]:
            return None
        turned_query, turned_key = rotary(query[..., :width], key[..., :width], *embeddings)
        return torch.cat([turned_query, query[..., width:]], dim=-1), torch.cat([turned_key, key[..., width:]], dim=-1)

    def after_rotary(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> QueryKey | None:
        """`query` and `key` as attention receives them, from what they are after RoPE, for the proof by hooks.

        None: not known how.
        """
        return None if self.changed_after_rotary else (query, key)


def _layer_type(module: nn.Module) -> str | None:
    """What the config says of the layer that `module` numbers itself."""
    layer = getattr(module, "layer_idx", None)
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return kinds[layer] if isinstance(layer, int) and 0 <= layer < len(kinds) else None


def heads_first(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(1, n, heads * head_dim), (1, n, heads, head_dim) or (1, heads, n, head_dim) -> the last, if n > heads."""
    if states.dim() == 3:
        states = states.unflatten(-1, (-1, head_dim))
    return states.transpose(1, 2) if states.shape[1] > states.shape[2] else states


def _unrotated(states: torch.Tensor, rotary_calls: Sequence[RotaryCall]) -> torch.Tensor | None:
    calls = [(before, after) for before, after in rotary_calls if _is_told_apart(before, after)]
    # Some families rotate (B, n, heads, d), and transpose later.
    calls += [(before.transpose(1, 2), after.transpose(1, 2)) for before, after in calls]
    for before, after in calls:
        if _same(after, states):
            return before
    for before, after in calls:
        if (part := _part(after, states)) is not None:
            whole = states.clone()
            whole[..., part] = before
            return whole
    return None


def _is_told_apart(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Not where a rotary function takes its arguments in another order, or writes over them."""
    return before.shape == after.shape and before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _part(after: torch.Tensor, states: torch.Tensor) -> slice | None:
    """Where in each head of `states` the rotated tensor `after` lies, one head of it serving all or each its own."""
    width, heads = after.shape[-1], states.shape[1]
    if width > states.shape[-1] or after.shape[1] not in (1, heads) or after.shape[2] != states.shape[2]:
        return None
    for part in (slice(0, width), slice(states.shape[-1] - width, states.shape[-1])):
        if torch.equal(states[..., part], after.expand(-1, heads, -1, -1)):
            return part
    return None


class CallSpy:
    """A function of `owner` by that name that calls `show` with its arguments first, until `remove()`."""

    def __init__(self, owner: Any, name: str, show: Callable[..., None]) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def showing(*args: Any, **kwargs: Any) -> Any:
            show(*args, **kwargs)
            return function(*args, **kwargs)

        self.owner, self.name, self.before = owner, name, vars(owner).get(name)
        setattr(owner, name, showing)

    def remove(self) -> None:
        if self.before is None:  # a method of its class
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


def find_family(model_type: str) -> Family:
    """The family of `models/<model_type>.py`, or the generic one."""
    name = f"qk_sniffer.models.{model_type.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return Family()
    concrete: Family = importlib.import_module(name).Family()
    return concrete


def imported_family(path: str) -> Family:
    """The family that `path` (`package.module:Class`) names.

    Raises:
        ConfigError: it names nothing that can be imported, or no family.
    """
    module_name, _, class_name = path.partition(":")
    try:
        family = getattr(importlib.import_module(module_name), class_name or "Family")()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            [
                f"model.family={path}: {error}; expected package.module:Class, a subclass of {__name__}.Family that "
                "is installed, or in the folder where `python -m qk_sniffer` starts"
            ]
        ) from error
    if not isinstance(family, Family):
        raise ConfigError([f"model.family={path}: {class_name} is not a subclass of {__name__}.Family"])
    return family
