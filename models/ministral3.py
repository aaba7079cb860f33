"""Serves Ministral 3, which scales queries by their position after the rotary embedding."""

from typing import Any

import torch

from qk_sniffer import families


class Family(families.Family):
    """Vectors before RoPE are also before the scale."""

    changed_after_rotary = True

    def after_rotary(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> families.QueryKey:
        parameters = module.config.rope_parameters
        position = torch.arange(query.shape[2], device=query.device)
        contexts = position // parameters["original_max_position_embeddings"]
        scale = 1 + parameters["llama_4_scaling_beta"] * torch.log1p(contexts)
        return query * scale[:, None].to(query.dtype), key
