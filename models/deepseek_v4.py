"""DeepSeek V4 attends to compressed keys beside those of its tokens."""

from torch import nn

from qk_sniffer import families
from qk_sniffer.errors import CaptureError


class Family(families.Family):
    """Refused: beyond a window, queries meet keys that stand for many tokens each, and have no position."""

    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        raise CaptureError(
            "deepseek_v4 cannot be captured: beyond its window it attends to compressed keys, each of which stands for "
            "many tokens, so that there is no key vector a position"
        )
