"""GPT has an attention of its own, whose modules do not know their layer."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are what its method `_attn` receives, the key turned for their product."""

    def attention_layers(self, decoder: Any) -> dict[nn.Module, int]:
        return {block.attn: layer for layer, block in enumerate(decoder.h)}

    def watch(self, module: Any, see: Callable[..., None]) -> Sequence[Any]:
        return [families.Shown(module, "_attn", lambda query, key, *rest: see(query, key.transpose(2, 3)))]
