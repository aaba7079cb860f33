"""Serves Falcon-H1, which multiplies its keys by a number of the config before the rotary embedding."""

from collections.abc import Mapping
from typing import Any

import torch

from qk_sniffer import families


class Family(families.Family):
    """Vectors before RoPE are behind the multiplication."""

    def projected(self, module: Any, outputs: Mapping[str, torch.Tensor], head_dim: int) -> families.QueryKey:
        query, key = super().projected(module, outputs, head_dim)
        return query, key * module.key_multiplier
