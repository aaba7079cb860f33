"""Hunyuan's dense decoders norm queries and keys after their rotary embedding."""

from typing import Any

import torch

from qk_sniffer import families


class Family(families.Family):
    """Before RoPE, and before the norm that follows it."""

    changed_after_rotary = True

    def after_rotary(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> families.QueryKey:
        return module.query_layernorm(query), module.key_layernorm(key)
