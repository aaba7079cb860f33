"""Serves Phi-3, whose single projection returns all queries, then all keys, then all values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are parts of the output of that projection."""

    def projections(self, module: Any) -> dict[str, nn.Module]:
        return {"qkv": module.qkv_proj}

    def projected(self, module: Any, outputs: Mapping[str, torch.Tensor], head_dim: int) -> families.QueryKey:
        heads, key_heads = module.config.num_attention_heads, module.num_key_value_heads
        query, key, _ = families.heads_first(outputs["qkv"], head_dim).split([heads, key_heads, key_heads], dim=1)
        return query, key

    def projected_value(self, module: Any, outputs: Mapping[str, torch.Tensor], value_dim: int) -> torch.Tensor:
        return families.heads_first(outputs["qkv"], value_dim)[:, -module.num_key_value_heads :]
