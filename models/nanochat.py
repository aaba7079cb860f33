"""Serves nanochat, which normalizes queries and keys after the rotary embedding."""

from typing import Any

import torch

from qk_sniffer import families


class Family(families.Family):
    """Vectors before RoPE are also before the norm that follows it."""

    changed_after_rotary = True

    def after_rotary(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> families.QueryKey:
        return module.q_norm(query), module.k_norm(key)
