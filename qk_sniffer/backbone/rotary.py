"""Reads the parameters of a decoder's rotary embedding and resets its frequencies between forward passes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types whose frequencies depend on the longest text of a forward pass that exceeds a boundary."""

_GROWN = "max_seq_len_cached"
"""The end of the names of attributes that hold the longest text so far."""

_TABLES = ("embed_positions", "pos_encoding")
"""Buffers with a row for each position."""


def parameters(decoder: nn.Module, config: PretrainedConfig) -> dict[str, Any]:
    """Returns the config's rotary parameters, and the inverse frequencies and attention scaling of each embedding."""
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


def kinds(module: nn.Module) -> list[str]:
    """Returns the kinds of layers that a rotary embedding has frequencies for; an empty name for all kinds."""
    ends = ("inv_freq", "_inv_freq")
    names = [
        name for name, buffer in module.named_buffers(recurse=False) if name.endswith(ends[0]) and buffer.dim() == 1
    ]
    return [name.removesuffix(ends[1]).removesuffix(ends[0]) for name in names if "original" not in name]


def tables(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns the tables with a row for each position that a module holds, by name."""
    return [
        (name, table) for name, table in module.named_buffers(recurse=False) if name in _TABLES and table.dim() == 2
    ]


def parameters_of(config: PretrainedConfig, kind: str) -> dict[str, Any]:
    """Returns the config's rotary parameters for a kind of layer; empty if it has none."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return rope.get(kind) or {} if kind and kind in rope else rope


def boundary_of(config: PretrainedConfig, kind: str) -> int | None:
    """Returns the most tokens for which a kind of layer has the same frequencies; None if they never change."""
    return _boundary(config, parameters_of(config, kind))


def length_boundary(config: PretrainedConfig) -> int | None:
    """Returns the most tokens for which the frequencies do not depend on the text's length; None if they never do."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind_of_layer = [value for value in rope.values() if isinstance(value, dict)]
    boundaries = [_boundary(config, one) for one in by_kind_of_layer or [rope]]
    return min((boundary for boundary in boundaries if boundary is not None), default=None)


def _boundary(config: PretrainedConfig, rope: Mapping[str, Any]) -> int | None:
    kind = rope.get("rope_type")
    if kind not in LENGTH_DEPENDENT:
        return None
    # The type dynamic grows from the config's number on, whatever original number its parameters name.
    original = None if kind == "dynamic" else rope.get("original_max_position_embeddings")
    return int(original or config.max_position_embeddings)


def num_positions(decoder: nn.Module) -> int | None:
    """Returns the number of positions in the decoder's learned or precomputed table; None without a table."""
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
    """Keeps the frequencies of the loaded decoder, which forward passes over longer texts change, until `restore`."""

    def __init__(self, decoder: nn.Module) -> None:
        self._modules = [
            (
                module,
                {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)},
                {name: value for name, value in vars(module).items() if name.endswith(_GROWN)},
            )
            for module in decoder.modules()
            if "Rotary" in type(module).__name__
        ]

    def restore(self) -> None:
        for module, buffers, lengths in self._modules:
            for name, (buffer, values) in buffers.items():
                current: torch.Tensor = getattr(module, name)
                if current.device == buffer.device:
                    with torch.inference_mode(buffer.is_inference()):  # outside, such a tensor cannot be written
                        buffer.copy_(values)  # the same tensor, for whoever refers to it
                    setattr(module, name, buffer)
                else:
                    setattr(module, name, values.to(current.device, copy=True))
            for name in [name for name in vars(module) if name.endswith(_GROWN) and name not in lengths]:
                delattr(module, name)  # set by the first longer text
            vars(module).update(lengths)
