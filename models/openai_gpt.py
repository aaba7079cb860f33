"""Serves GPT, which calls no kernel of the attention interface. Its attention modules do not name their layer."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are the arguments of the attention's method `_attn`, which takes the key transposed."""

    def attention_layers(self, decoder: Any) -> dict[nn.Module, int]:
        return {block.attn: layer for layer, block in enumerate(decoder.h)}

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        return [families.CallSpy(module, "_attn", lambda query, key, *rest: on_query_key(query, key.transpose(2, 3)))]
