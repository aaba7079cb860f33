"""Serves Llama 4, which may normalize after RoPE and, in layers without RoPE, scales queries by their position."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

from qk_sniffer import families


class Family(families.Family):
    """Its rotary function takes (B, n, heads, d). Layers without RoPE have the same vectors before and after it."""

    changed_after_rotary = True

    def before_rotary(
        self, module: Any, rotary_calls: Sequence[families.RotaryCall], query: torch.Tensor, key: torch.Tensor
    ) -> families.QueryKey:
        before_query, before_key = super().before_rotary(module, rotary_calls, query, key)
        return (before_query.transpose(1, 2), before_key.transpose(1, 2)) if rotary_calls else (query, key)

    def rotated(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, embeddings: Any, width: int
    ) -> families.QueryKey:
        query, key = apply_rotary_emb(query.transpose(1, 2), key.transpose(1, 2), embeddings)
        return query.transpose(1, 2), key.transpose(1, 2)

    def after_rotary(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> families.QueryKey:
        if module.use_rope:
            return (module.qk_norm(query), module.qk_norm(key)) if hasattr(module, "qk_norm") else (query, key)
        if not module.attn_temperature_tuning:
            return query, key
        position = torch.arange(query.shape[2], device=query.device)
        scale = 1 + module.attn_scale * torch.log1p((position + 1) // module.floor_scale)
        return (query * scale[:, None]).to(query.dtype), key
