"""Serves LongCat Flash: two latent attentions in each block, in modules without "Attention" in their names."""

from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Its attention modules name their layers: 2i and 2i + 1 in block i."""

    def attention_layers(self, decoder: Any) -> dict[nn.Module, int]:
        return {module: module.layer_idx for module in decoder.modules() if type(module).__name__ == "LongcatFlashMLA"}
