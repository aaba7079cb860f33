"""Refuses DeepSeek V4, which attends to compressed keys next to those of its tokens."""

from torch import nn

from qk_sniffer import families
from qk_sniffer.errors import CaptureError


class Family(families.Family):
    """Beyond a window, queries attend to keys that represent many tokens each and have no position."""

    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        raise CaptureError(
            "deepseek_v4 cannot be captured: beyond its window it attends to compressed keys, each of which represents "
            "many tokens, so its tokens do not have one key vector each"
        )
