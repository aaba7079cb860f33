"""Serves Hunyuan's dense decoders, which normalize queries and keys after the rotary embedding.

Hunyuan's mixtures of experts share this family.
"""

from typing import Any

import torch

from qk_sniffer import families


class Family(families.Family):
    """Vectors before RoPE are also before the norm that follows it."""

    changed_after_rotary = True

    def after_rotary(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> families.QueryKey:
        return module.query_layernorm(query), module.key_layernorm(key)
