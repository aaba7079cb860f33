"""GPT-Neo has an attention of its own, which does not scale its logits and is local at some layers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query and key are what its method `_attn` receives."""

    def attention_layers(self, decoder: Any) -> dict[nn.Module, int]:
        return {block.attn.attention: layer for layer, block in enumerate(decoder.h)}

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        return [families.CallSpy(module, "_attn", lambda query, key, *rest: on_query_key(query, key, scaling=1.0))]

    def sliding_window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        return module.config.window_size if module.attention_type == "local" else None
