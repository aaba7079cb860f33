"""Llama 4 rotates (batch, tokens, heads, width) and may norm after it; full layers have no rotary embedding."""

from collections.abc import Sequence

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Before RoPE, turned to the layout that attention receives; local layers attend within chunks, not windows."""

    changed_after_rotary = True

    def before_rotary(
        self, module: nn.Module, rotary_calls: Sequence[families.RotaryCall], query: torch.Tensor, key: torch.Tensor
    ) -> families.RotaryCall:
        before_query, before_key = super().before_rotary(module, rotary_calls, query, key)
        return (before_query.transpose(1, 2), before_key.transpose(1, 2)) if rotary_calls else (query, key)
