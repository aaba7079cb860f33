"""Serves GPT-Neo, which calls no kernel of the attention interface and does not scale its logits."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are the arguments of the attention's method `_attn`."""

    def attention_layers(self, decoder: Any) -> dict[nn.Module, int]:
        return {block.attn.attention: layer for layer, block in enumerate(decoder.h)}

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        return [families.CallSpy(module, "_attn", lambda query, key, *rest: on_query_key(query, key, scaling=1.0))]

    def sliding_window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        return module.config.window_size if module.attention_type == "local" else None
