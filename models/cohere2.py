"""Command R7B and its kin: full-attention layers have no positions (NoPE), sliding ones are rotated."""

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Only a layer with a window is rotated; the rotary embedding is handed to all of them."""

    def rotated(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, embeddings: tuple[torch.Tensor, ...] | None
    ) -> families.RotaryCall | None:
        if getattr(module, "sliding_window", None) is None:
            return query, key
        return super().rotated(module, query, key, embeddings)
