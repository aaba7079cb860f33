"""Zamba runs the same attention at several of its layers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """The layer is what the forward of the shared attention is told."""

    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        return {module: -1 for module in decoder.modules() if type(module).__name__ == "ZambaAttention"}

    def layer(self, module: nn.Module, index: int, arguments: Mapping[str, Any]) -> int:
        layer: int = arguments["layer_idx"]
        return layer
