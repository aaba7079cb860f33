"""Serves MPT, which adds a bias by distance (ALiBi) and calls no kernel of the attention interface."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are parts of the output of its single projection, clipped if the model clips them."""

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        def show(_: nn.Module, inputs: Any, fused: torch.Tensor) -> None:
            if module.clip_qkv:
                fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
            query, key, _ = fused.unflatten(-1, (3, module.n_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
            on_query_key(query, key, scaling=module.softmax_scale, position_bias="ALiBi")

        return [module.Wqkv.register_forward_hook(show)]
