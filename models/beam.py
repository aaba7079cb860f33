"""Beam scales the queries of layers without a rotary embedding by their position."""

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """No proof by hooks: that scale follows the last submodule that could be hooked."""

    def projections(self, module: nn.Module) -> dict[str, nn.Module] | None:
        return None
