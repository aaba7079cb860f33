"""Serves BLOOM, which adds a bias by distance (ALiBi) and calls no kernel of the attention interface."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are parts of the output of its single projection."""

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        def show(_: nn.Module, inputs: Any, fused: torch.Tensor) -> None:
            query, key, _ = module._reshape(fused)
            on_query_key(query, key, position_bias="ALiBi")

        return [module.query_key_value.register_forward_hook(show)]
