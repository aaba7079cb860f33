"""Serves Inkling 2, which has a bias by distance instead of a rotary embedding, and mixes keys by a convolution."""

from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are the outputs of its last norms, which clip their length.

    In layers with full attention, queries are scaled by the logarithm of their position beyond a floor.
    """

    def projections(self, module: nn.Module) -> dict[str, nn.Module] | None:
        return {kind: module.get_submodule(f"{kind}_l2_clip") for kind in "qk"}

    def after_rotary(self, module: Any, query: torch.Tensor, key: torch.Tensor) -> families.QueryKey:
        if module.is_sliding:
            return query, key
        position = torch.arange(1, query.shape[2] + 1, device=query.device)
        beyond = (position / module.config.log_scaling_n_floor).clamp(min=1.0)
        scale = 1 + module.config.log_scaling_alpha * beyond.log()
        return (query.float() * scale[:, None]).to(query.dtype), key
