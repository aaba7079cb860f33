"""Doge adds a learned bias by key to its logits, and of the keys before a query keeps those with the largest."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Biased and sparse at every layer, within its config's window, of which its kernel is not told."""

    def sliding_window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        window: int | None = module.config.sliding_window
        return window

    def sparse_attention(self, module: nn.Module) -> bool:
        return True

    def position_bias(self, module: nn.Module, arguments: Mapping[str, Any]) -> bool:
        return True
