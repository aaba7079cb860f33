"""Serves Inkling 2, which has a bias by distance instead of a rotary embedding, and mixes keys by a convolution."""

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are the outputs of its last norms, which clip their length."""

    def projections(self, module: nn.Module) -> dict[str, nn.Module] | None:
        return {kind: module.get_submodule(f"{kind}_l2_clip") for kind in "qk"}
