"""Serves HRM, which runs two stacks of layers alternately, several times in a forward pass."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Each run of each attention module is one layer, numbered as in the model's key-value cache."""

    def layer(self, module: nn.Module, index: int, arguments: Mapping[str, Any]) -> int:
        offset: int = arguments["cycle_offset"]
        return index + offset
