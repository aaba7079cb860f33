"""Inkling 2 has no rotary embedding: a bias by distance stands for it, and a convolution mixes each key with others."""

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are what its last norms return, which clip their length."""

    def projections(self, module: nn.Module) -> dict[str, nn.Module] | None:
        return {kind: module.get_submodule(f"{kind}_l2_clip") for kind in "qk"}
