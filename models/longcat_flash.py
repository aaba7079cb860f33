"""LongCat Flash: latent attention twice a layer, in modules that are not named attention."""

from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Its attention modules, which number themselves: layer 2i and 2i + 1 of block i."""

    def attention_layers(self, decoder: Any) -> dict[nn.Module, int]:
        return {module: module.layer_idx for module in decoder.modules() if type(module).__name__ == "LongcatFlashMLA"}
