"""Serves Doge, which adds a learned bias by key to its logits and keeps the keys with the largest biases."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Every layer is biased, sparse and windowed. The window is the config's; the kernel does not receive it.

    Equal tokens have equal biases in the first layer. Which of them a query keeps depends on the length of the pass.
    """

    def sliding_window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        window: int | None = module.config.sliding_window
        return window

    def length_boundary(self, config: Any) -> int | None:
        kept: int = config.keep_window_size
        return kept

    def sparse_attention(self, module: nn.Module) -> bool:
        return True

    def position_bias(self, module: nn.Module, arguments: Mapping[str, Any]) -> bool:
        return True
