"""BLOOM has an attention of its own, whose logits carry a bias by distance (ALiBi)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are cut from its one projection."""

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        def show(_: nn.Module, inputs: Any, fused: torch.Tensor) -> None:
            query, key, _ = module._reshape(fused)
            on_query_key(query, key, position_bias="ALiBi")

        return [module.query_key_value.register_forward_hook(show)]
