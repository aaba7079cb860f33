"""HRM runs two stacks of layers in turn, several times in a forward."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """One layer for each run of each attention module: the places that its key-value cache has for them."""

    def layer(self, module: nn.Module, index: int, arguments: Mapping[str, Any]) -> int:
        offset: int = arguments["cycle_offset"]
        return index + offset
