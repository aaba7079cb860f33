"""What a family's queries and keys should be, worked out in float64 from hooked projections and plain algebra.

Independent of the tap: it watches the linear projections of the unmodified model and applies norm and rotary
embedding by hand, in another form than the models do (a rotation of complex numbers).
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import GPTNeoXModel, PretrainedConfig
from zoo import Case


def projections(case: Case, decoder: nn.Module, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """What the projections give, by (layer, kind), float64 (batch, n, heads, head_dim), in a plain forward."""
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def keep(layer: int, *kinds: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            flat = output.detach().double()
            if len(kinds) == 3 and isinstance(decoder, GPTNeoXModel):  # each head's query, key and value side by side
                parts = flat.unflatten(-1, (-1, 3, case.head_dim)).unbind(-2)
            else:
                width = decoder.config.num_key_value_heads * case.head_dim
                sizes = [flat.shape[-1] - 2 * width, width, width] if len(kinds) == 3 else [flat.shape[-1]]
                parts = tuple(part.unflatten(-1, (-1, case.head_dim)) for part in flat.split(sizes, dim=-1))
            seen.update({(layer, kind): part for kind, part in zip(kinds, parts, strict=True) if kind != "v"})

        return hook

    names = {"q_proj": "q", "k_proj": "k", "qkv_proj": "qkv", "query_key_value": "qkv"}
    hooks = [
        getattr(module, name).register_forward_hook(keep(module.layer_idx, *kinds))
        for module in decoder.modules()
        for name, kinds in names.items()
        if hasattr(module, name)
    ]
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def vectors(case: Case, decoder: nn.Module, ids: torch.Tensor, *, rotated: bool) -> dict[tuple[int, str], torch.Tensor]:
    """Queries and keys by (layer, kind), float64 (batch, heads, n, head_dim), before or after RoPE."""
    modules = {m.layer_idx: m for m in decoder.modules() if hasattr(m, "q_norm")}
    made = {}
    for (layer, kind), heads in projections(case, decoder, ids).items():
        if case.normed:
            norm = getattr(modules[layer], f"{kind}_norm")
            weight = norm.weight.detach().double() + (1.0 if case.normed == "1+w" else 0.0)
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            over = (-2, -1) if case.normed == "flat w" else (-1,)
            heads = heads / (heads.square().mean(over, keepdim=True) + eps).sqrt() * weight.view(-1, case.head_dim)
        heads = heads.transpose(1, 2)
        if rotated and layer not in case.unrotated:
            turns = frequencies(case, decoder.config, sliding=case.sliding_windows[layer] is not None)
            first, rest = heads.split([2 * len(turns), case.head_dim - 2 * len(turns)], dim=-1)
            heads = torch.cat([rotate(first, turns, case.pairs), rest], dim=-1)
        made[layer, kind] = heads
    return made


def rotate(heads: torch.Tensor, frequency: torch.Tensor, pairs: str) -> torch.Tensor:
    """RoPE: the two components of each pair, as one complex number, turned by the angle p * frequency."""
    real, imaginary = heads.chunk(2, dim=-1) if pairs == "halves" else (heads[..., ::2], heads[..., 1::2])
    angle = torch.arange(heads.shape[-2], dtype=torch.float64)[:, None] * frequency
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    both = (turned.real, turned.imag)
    return torch.cat(both, dim=-1) if pairs == "halves" else torch.stack(both, dim=-1).flatten(-2)


def frequencies(case: Case, config: PretrainedConfig, *, sliding: bool) -> torch.Tensor:
    """Radians a position of each pair of components, float64 (rotary_dim / 2,), from the config's parameters."""
    dim = case.rotary_dim or case.head_dim
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        parameters = parameters["sliding_attention" if sliding else "full_attention"]
        if sliding and case.local_theta is not None:
            assert parameters["rope_theta"] == case.local_theta
    base = parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if parameters["rope_type"] == "default":
        return base
    assert parameters["rope_type"] == "llama3"
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    turns = parameters["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * kept + base / parameters["factor"] * (1 - kept)
