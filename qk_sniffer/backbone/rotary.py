"""The rotary embedding of a decoder: what it is made of, and how far its frequencies are the same for every text."""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types whose frequencies follow from the longest text in a forward, once it is longer than a boundary."""

_GROWN = "max_seq_len_cached"
"""How the attributes end that hold the longest text so far."""

_TABLES = ("embed_positions", "pos_encoding")
"""Buffers with a row for each position."""


def parameters(decoder: nn.Module, config: PretrainedConfig) -> dict[str, Any]:
    """The config's rotary parameters, and of each embedding its inverse frequencies and attention scaling."""
    embeddings = {}
    for name, module in decoder.named_modules():
        if "Rotary" not in type(module).__name__:
            continue
        values: dict[str, Any] = {
            key: buffer.double().tolist()
            for key, buffer in module.named_buffers(recurse=False)
            if key.endswith("inv_freq") and "original" not in key
        }
        values |= {key: value for key, value in vars(module).items() if key.endswith("attention_scaling")}
        embeddings[name] = values
    return {"rope_parameters": getattr(config, "rope_parameters", None), "embeddings": embeddings}


def length_boundary(config: PretrainedConfig) -> int | None:
    """The most tokens for which the frequencies do not depend on the length of the text; None: they never do."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind_of_layer = [value for value in rope.values() if isinstance(value, dict)]
    boundaries = [
        one.get("original_max_position_embeddings") or config.max_position_embeddings
        for one in by_kind_of_layer or [rope]
        if one.get("rope_type") in LENGTH_DEPENDENT
    ]
    return min(boundaries, default=None)


def num_positions(decoder: nn.Module) -> int | None:
    """How many positions the decoder has a learned or tabled embedding for; None: it has no such table."""
    sizes = []
    for name, module in decoder.named_modules():
        last = name.rpartition(".")[2]
        if any(mark in name for mark in ("vision", "image", "img", "audio")):
            continue
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            offset = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            sizes.append(module.num_embeddings - offset)
        sizes += [table.shape[0] for key, table in module.named_buffers(recurse=False) if key in _TABLES]
    return min(sizes, default=None)


class RotaryState:
    """Frequencies as they are after loading: `restore` undoes what longer texts made of them in earlier forwards."""

    def __init__(self, decoder: nn.Module) -> None:
        self._modules = [
            (
                module,
                {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)},
                {name: value for name, value in vars(module).items() if name.endswith(_GROWN)},
            )
            for module in decoder.modules()
            if "Rotary" in type(module).__name__
        ]

    def restore(self) -> None:
        for module, buffers, lengths in self._modules:
            for name, buffer in buffers.items():
                there: torch.Tensor = getattr(module, name)
                setattr(module, name, buffer.to(there.device, copy=True))
            for name in [name for name in vars(module) if name.endswith(_GROWN) and name not in lengths]:
                delattr(module, name)  # made by the first longer text
            vars(module).update(lengths)
