"""Serves JetMoe, which repeats its rotated keys for the experts that compute a token's queries."""

from collections.abc import Sequence

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Keys before RoPE are repeated as attention receives them: query head h attends with key head h."""

    changed_after_rotary = True

    def before_rotary(
        self, module: nn.Module, rotary_calls: Sequence[families.RotaryCall], query: torch.Tensor, key: torch.Tensor
    ) -> families.QueryKey:
        before_query, before_key = super().before_rotary(module, rotary_calls, query, key)
        return before_query, before_key.repeat(1, key.shape[1] // before_key.shape[1], 1, 1)
