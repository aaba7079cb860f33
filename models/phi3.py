"""Phi-3 projects queries, keys and values at once, one after the other."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are cut from that projection."""

    def projections(self, module: Any) -> dict[str, nn.Module]:
        return {"qkv": module.qkv_proj}

    def projected(self, module: Any, outputs: Mapping[str, torch.Tensor], head_dim: int) -> families.QueryKey:
        heads, key_heads = module.config.num_attention_heads, module.num_key_value_heads
        query, key, _ = families.heads_first(outputs["qkv"], head_dim).split([heads, key_heads, key_heads], dim=1)
        return query, key
