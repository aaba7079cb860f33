"""Describes a decoder without its weights: its attention layers, and the memory of its weights and its activations.

The decoder is built on the meta device, where tensors have a shape and no numbers. A forward pass there shows the
layers to the tap, as any other, and every tensor that it makes is counted until it is freed.
"""

import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from qk_sniffer.backbone.backbone import PROBE_TOKENS, Backbone, layer_facts
from qk_sniffer.backbone.devices import PLANS
from qk_sniffer.backbone.family import Family, find_family, imported_family
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.loading import check_model
from qk_sniffer.backbone.quantization import COMPUTED_IN, quantization_config
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.backbone.trailing_layers import cut_after
from qk_sniffer.backbone.unloaded import unloaded
from qk_sniffer.config import AUTO, ModelConfig

_ANSWERS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.item)

_MOST_MODULES = 20_000
"""The most modules of a decoder that is built a second time, for its activations alone: more take seconds."""


@dataclass(frozen=True, eq=False)
class Outline:
    """A decoder without weights."""

    backbone: Backbone
    """On the meta device."""
    layers: Sequence[LayerFacts]
    """Ascending. Of the facts, the heads, the widths and the chunk are those of the model."""
    dtype: torch.dtype
    """That of the model; the decoder here may have another one."""
    weight_bytes: int | None
    """None for a quantized model, whose weights have fewer than their shapes tell."""

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(weight.numel() for weight in self.backbone.decoder.parameters())

    def activation_bytes(self, shapes: Collection[tuple[int, int]]) -> int | None:
        """Returns the most bytes that a forward pass holds next to the weights.

        `shapes` are the texts, and the tokens of each text, of the passes. None if a pass cannot run without numbers.
        """
        found = _most_bytes(self.backbone, shapes)
        return None if found is None else found * self.dtype.itemsize // self.backbone.dtype.itemsize


def outline(
    config: ModelConfig,
    *,
    commit: str | None = None,
    adapter_commit: str | None = None,
    banded_attention: bool = True,
    layers: Collection[int] | None = None,
) -> Outline | None:
    """Describes the decoder of `config.name` from the model's config alone; None if that takes its weights.

    The arguments and errors are those of `load_backbone`. Vectors before RoPE have the shape of those after it, and the
    tap tells them by their numbers: they are not asked for. The weights of an adapter are not counted.
    """
    text = check_model(config, commit=commit, adapter_commit=adapter_commit)
    family = find_family(text.model_type) if config.family is None else imported_family(config.family)
    named = text.dtype if config.dtype == AUTO else getattr(torch, config.dtype)
    dtype = named if isinstance(named, torch.dtype) and named in COMPUTED_IN else torch.float32
    if config.attn_implementation == "eager":
        text._attn_implementation = "eager"
    kept = layers if config.adapter is None else None
    for computed in dict.fromkeys((dtype, torch.bfloat16)):  # some kernels of experts know one dtype alone
        with nullcontext() if kept is None else cut_after(kept, family):
            backbone = _built(text, family, computed, banded_attention=banded_attention)
        if backbone is not None and (found := _forward(backbone, 1, PROBE_TOKENS)) is not None and found[0]:
            size = sum(weight.numel() for weight in backbone.decoder.parameters()) * dtype.itemsize
            facts = [found[0][layer] for layer in sorted(found[0])]
            return Outline(backbone, facts, dtype, None if quantization_config(text) else size)
    return None


def activation_bytes(backbone: Backbone, shapes: Collection[tuple[int, int]]) -> int | None:
    """Returns `Outline.activation_bytes` of a loaded decoder; None also for one that takes seconds to build again."""
    if sum(1 for _ in backbone.decoder.modules()) > _MOST_MODULES or quantization_config(backbone.config):
        return None
    built = _built(
        backbone.config,
        backbone.family,
        backbone.dtype,
        banded_attention=backbone.banded_attention,
    )
    return None if built is None else _most_bytes(built, shapes)


def device_of(device_map: Any) -> str:
    """Returns the type of the device that a model would be loaded to."""
    name = device_map.split(":")[0] if isinstance(device_map, str) else device_map
    if name is None or (isinstance(name, str) and name not in PLANS):
        return name or "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _built(config: PretrainedConfig, family: Family, dtype: torch.dtype, *, banded_attention: bool) -> Backbone | None:
    decoder = unloaded(config)
    if decoder is None:
        return None
    try:
        backbone = Backbone(family.decoder(decoder.to(dtype).eval()), family, banded_attention=banded_attention)
    except Exception:  # of code that needs numbers
        return None
    backbone.device = torch.device("meta")
    return backbone


def _forward(backbone: Backbone, texts: int, length: int) -> tuple[dict[int, LayerFacts], int] | None:
    """Runs a forward pass. Returns the facts of the layers, and the most bytes of its tensors; None if it fails."""
    facts: dict[int, LayerFacts] = {}

    def on_call(call: AttentionCall) -> None:
        facts.setdefault(call.layer, layer_facts(replace(call, sinks=None)))

    def on_output(call: AttentionCall, output: torch.Tensor | None) -> None:
        if output is not None and isinstance(facts[call.layer].value_dim, int):
            facts[call.layer] = replace(facts[call.layer], output_dim=output.shape[-1])

    weights = (*backbone.decoder.parameters(), *backbone.decoder.buffers())
    count = _Count([weight.untyped_storage()._cdata for weight in weights])
    try:
        with count:
            backbone.forward(torch.ones(texts, length, dtype=torch.int64), on_call, None, on_output)
    except Exception:  # of code that needs numbers: loading the model reports any other error
        return None
    return {layer: one for layer, one in facts.items() if layer >= 0}, count.most


def _most_bytes(backbone: Backbone, shapes: Collection[tuple[int, int]]) -> int | None:
    most = 0
    for texts, length in shapes:
        if (found := _forward(backbone, texts, length)) is None:
            return None
        most = max(most, found[1])
    return most


class _Count(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in the block and are still in use."""

    def __init__(self, known: Collection[int]) -> None:
        """`known` are the storages that do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._now = 0
        self._known = {*known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _ANSWERS and args[0].is_meta:
            # There is no number. Models ask whether all tokens are of one text, and what follows if so is the rule.
            return True if args[0].dtype is torch.bool else 1
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self._add(each.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
