"""Serves GPT-NeoX, whose single projection returns query, key and value of each head next to each other."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are parts of the output of that projection."""

    def projections(self, module: Any) -> dict[str, nn.Module]:
        return {"qkv": module.query_key_value}

    def projected(self, module: Any, outputs: Mapping[str, torch.Tensor], head_dim: int) -> families.QueryKey:
        query, key, _ = families.heads_first(outputs["qkv"], 3 * head_dim).chunk(3, dim=-1)
        return query, key

    def projected_value(self, module: Any, outputs: Mapping[str, torch.Tensor], value_dim: int) -> torch.Tensor:
        return families.heads_first(outputs["qkv"], 3 * value_dim)[..., 2 * value_dim :]
