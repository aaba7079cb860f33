"""Computes the queries and keys of a family in float64, from hooked projections and plain algebra.

It is independent of the tap. It records the linear projections of the unmodified model, and applies norm, rotary
embedding and scale itself, from the parameters of the config. The rotary embedding is written as a rotation of complex
numbers, which no model uses.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from support.zoo import Case

Vectors = dict[tuple[int, str], torch.Tensor]
"""Vectors by (layer, kind)."""


def vectors(case: Case, decoder: nn.Module, ids: torch.Tensor, *, rotated: bool) -> Vectors:
    """Returns queries and keys, float64 (batch, heads, n, head_dim), before RoPE or as attention receives them.

    In a layer without RoPE both are as attention receives them.
    """
    modules = _attention(case, decoder)
    made = {}
    for (layer, kind), heads in projections(case, decoder, ids).items():
        if case.normed in ("w", "1+w", "flat w"):
            norm = getattr(modules[layer], f"{kind}_norm")
            weight = norm.weight.detach().double() + (1.0 if case.normed == "1+w" else 0.0)
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            heads = normed(heads, eps, over=(-2, -1) if case.normed == "flat w" else (-1,))
            heads = heads * weight.view(-1, case.head_dim)
        heads = heads.transpose(1, 2)
        has_rope = layer not in case.unrotated
        if rotated and has_rope:
            heads = turned(case, decoder.config, heads, sliding=case.sliding_windows[layer] is not None)
            if case.normed == "after RoPE":
                heads = normed(heads, decoder.config.rms_norm_eps, over=(-1,))
        if kind == "q" and (rotated or not has_rope):
            heads = heads * query_scale(decoder.config, heads.shape[2], has_rope)[:, None]
        made[layer, kind] = heads
    return made


def projections(case: Case, decoder: nn.Module, ids: torch.Tensor) -> Vectors:
    """Returns the outputs of the linear projections in a plain forward pass, float64 (batch, n, heads, head_dim)."""
    outputs: dict[str, torch.Tensor] = {}
    made: Vectors = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            outputs[name] = output.detach().double()

        return hook

    hooks = []
    for layer, attention in _attention(case, decoder).items():
        hooks += [
            module.register_forward_hook(keep(f"{layer} {name}"))
            for name, module in attention.named_children()
            if isinstance(module, nn.Linear)
        ]
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer in case.layers:
        own = {name.split()[1]: output for name, output in outputs.items() if name.split()[0] == str(layer)}
        made[layer, "q"], made[layer, "k"] = _cut(case, decoder, own)
    return made


def _cut(case: Case, decoder: nn.Module, outputs: dict[str, torch.Tensor]) -> Sequence[torch.Tensor]:
    """Cuts query and key (batch, n, heads, head_dim) from the outputs of a layer's projections (batch, n, width)."""
    config: Any = decoder.config
    if "kv_b_proj" in outputs:  # keys expanded from a latent, and a part that all heads share
        query = outputs["q_proj" if config.q_lora_rank is None else "q_b_proj"]
        latent, expanded = outputs["kv_a_proj_with_mqa"], outputs["kv_b_proj"]
        batch, n, _ = latent.shape
        own = expanded.reshape(batch, n, config.num_attention_heads, -1)[..., : config.qk_nope_head_dim]
        shared = latent[:, :, None, config.kv_lora_rank :].expand(batch, n, config.num_attention_heads, -1)
        return query.unflatten(-1, (-1, case.head_dim)), torch.cat([own, shared], dim=-1)
    if "query_key_value" in outputs:  # query, key and value of each head, next to each other
        return outputs["query_key_value"].unflatten(-1, (-1, 3, case.head_dim)).unbind(-2)[:2]
    if "qkv_proj" in outputs:
        heads = outputs["qkv_proj"].unflatten(-1, (-1, case.head_dim))
        return heads[:, :, : config.num_attention_heads], heads[:, :, config.num_attention_heads :].chunk(2, dim=2)[0]
    return [outputs[name].unflatten(-1, (-1, case.head_dim)) for name in ("q_proj", "k_proj")]


def _attention(case: Case, decoder: Any) -> dict[int, nn.Module]:
    layers = [getattr(layer, "self_attn", None) or getattr(layer, "attention", None) for layer in decoder.layers]
    return {layer: layers[layer] for layer in case.layers}


def normed(heads: torch.Tensor, eps: float, over: tuple[int, ...]) -> torch.Tensor:
    """Divides `heads` by the root mean square of their components in the dimensions `over`."""
    return heads / (heads.square().mean(over, keepdim=True) + eps).sqrt()


def query_scale(config: Any, length: int, has_rope: bool) -> torch.Tensor:
    """Returns the factor of the query at each position, float64 (length,).

    In Llama 4 and Ministral 3, logits grow with log(position), in steps. Llama 4 does so in layers without RoPE, and
    counts positions from 1.
    """
    position = torch.arange(length, dtype=torch.float64)
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    if beta is not None:
        step = (position / config.rope_parameters["original_max_position_embeddings"]).floor()
    elif getattr(config, "attn_temperature_tuning", False) and not has_rope:
        beta, step = config.attn_scale, ((position + 1) / config.floor_scale).floor()
    else:
        return torch.ones_like(position)
    return 1 + beta * (1 + step).log()


def turned(case: Case, config: PretrainedConfig, heads: torch.Tensor, *, sliding: bool) -> torch.Tensor:
    """Applies RoPE to the components of `heads` (batch, heads, n, head_dim) that it rotates: the first or the last."""
    frequency, scale = frequencies(case, config, sliding=sliding)
    dim = 2 * len(frequency)
    if case.rotates_last:
        rest, part = heads[..., :-dim], heads[..., -dim:]
        return torch.cat([rest, scale * rotate(part, frequency, case.pairs)], dim=-1)
    part, rest = heads[..., :dim], heads[..., dim:]
    return torch.cat([scale * rotate(part, frequency, case.pairs), rest], dim=-1)


def rotate(heads: torch.Tensor, frequency: torch.Tensor, pairs: str) -> torch.Tensor:
    """Rotates the two components of each pair, as one complex number, by the angle position * frequency."""
    real, imaginary = heads.chunk(2, dim=-1) if pairs == "halves" else (heads[..., ::2], heads[..., 1::2])
    angle = torch.arange(heads.shape[-2], dtype=torch.float64)[:, None] * frequency
    rotated = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    both = (rotated.real, rotated.imag)
    return torch.stack(both, dim=-1).flatten(-2) if pairs == "neighbours" else torch.cat(both, dim=-1)


def frequencies(case: Case, config: PretrainedConfig, *, sliding: bool) -> tuple[torch.Tensor, float]:
    """Returns the radians a position of each pair, float64 (rotary_dim / 2,), and the scale of RoPE."""
    dim = case.rotary_dim or case.head_dim
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        parameters = parameters["sliding_attention" if sliding else "full_attention"]
        if sliding and case.local_theta is not None:
            assert parameters["rope_theta"] == case.local_theta
    theta = parameters["rope_theta"]
    base = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if parameters["rope_type"] == "default":
        return base, 1.0
    turns = parameters["original_max_position_embeddings"] * base / (2 * math.pi)
    factor = parameters["factor"]
    if parameters["rope_type"] == "llama3":
        # Llama 3.1 stretches long wavelengths by `factor`, keeps short ones, and blends those between.
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return base * kept + base / factor * (1 - kept), 1.0
    # Peng et al. 2023, "YaRN": pairs below 1 turn over the original context are stretched, those above 32 are kept.
    # Implementations blend between them by the pair's number, with whole numbers as bounds unless `truncate` is false.
    assert parameters["rope_type"] == "yarn"
    first, last = (dim * math.log(turns[0] / number) / (2 * math.log(theta)) for number in (32, 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first = max(first, 0)
    stretched = ((torch.arange(dim // 2) - first) / (last - first)).clamp(0, 1)
    # Section 3.4 scales queries and keys equally. DeepSeek moves a part of that to the softmax scale.
    shares = parameters.get("mscale", 1.0), parameters.get("mscale_all_dim", 0.0)
    scale, left = (0.1 * share * math.log(factor) + 1 for share in shares)
    return base * (1 - stretched) + base / factor * stretched, scale / left
