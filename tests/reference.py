"""What a family's queries and keys should be, worked out in float64 from hooked projections and plain algebra.

Independent of the tap: it watches the linear projections of the unmodified model and applies norm and rotary
embedding by hand, in another form than the models do (a rotation of complex numbers).
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from zoo import Case


def projections(decoder: nn.Module, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Outputs of q_proj and k_proj by (layer, kind), float64 (batch, n, heads * head_dim), of a plain forward."""
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def keep(layer: int, kind: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            seen[layer, kind] = output.detach().double()

        return hook

    hooks = []
    for module in decoder.modules():
        if hasattr(module, "q_proj"):
            hooks.append(module.q_proj.register_forward_hook(keep(module.layer_idx, "q")))
            hooks.append(module.k_proj.register_forward_hook(keep(module.layer_idx, "k")))
    with torch.no_grad():
        decoder(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def vectors(case: Case, decoder: nn.Module, ids: torch.Tensor, *, rotated: bool) -> dict[tuple[int, str], torch.Tensor]:
    """Queries and keys by (layer, kind), float64 (batch, heads, n, head_dim), before or after RoPE."""
    modules = {m.layer_idx: m for m in decoder.modules() if hasattr(m, "q_proj")}
    made = {}
    for (layer, kind), flat in projections(decoder, ids).items():
        heads = flat.unflatten(-1, (-1, case.head_dim)).transpose(1, 2)
        if case.normed:
            norm = getattr(modules[layer], f"{kind}_norm")
            weight = norm.weight.detach().double() + (1.0 if case.normed == "1+w" else 0.0)
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            heads = heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        if rotated:
            heads = rotate(heads, frequencies(case, decoder.config, sliding=case.sliding_windows[layer] is not None))
        made[layer, kind] = heads
    return made


def rotate(heads: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """RoPE: component i and i + d/2 of position p, as one complex number, turned by the angle p * frequency[i]."""
    real, imaginary = heads.chunk(2, dim=-1)
    angle = torch.arange(heads.shape[-2], dtype=torch.float64)[:, None] * frequency
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def frequencies(case: Case, config: PretrainedConfig, *, sliding: bool) -> torch.Tensor:
    """Radians a position of each pair of components, float64 (head_dim / 2,), from the config's parameters."""
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        parameters = parameters["sliding_attention" if sliding else "full_attention"]
        if sliding and case.local_theta is not None:
            assert parameters["rope_theta"] == case.local_theta
    base = parameters["rope_theta"] ** (-torch.arange(0, case.head_dim, 2, dtype=torch.float64) / case.head_dim)
    if parameters["rope_type"] == "default":
        return base
    assert parameters["rope_type"] == "llama3"
    # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    turns = parameters["original_max_position_embeddings"] * base / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * kept + base / parameters["factor"] * (1 - kept)
