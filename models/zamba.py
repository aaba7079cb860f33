"""Serves Zamba, which runs one attention module at several of its layers. Zamba2 shares this family."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """The shared attention module has no layer of its own: each call receives its layer as an argument."""

    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        names = ("ZambaAttention", "Zamba2Attention")
        return {module: -1 for module in decoder.modules() if type(module).__name__ in names}

    def layer(self, module: nn.Module, index: int, arguments: Mapping[str, Any]) -> int:
        layer: int = arguments["layer_idx"]
        return layer
