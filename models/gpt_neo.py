"""Serves GPT-Neo, which calls no kernel of the attention interface and does not scale its logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query, key and value are the arguments of the attention's method `_attn`, which returns the output first."""

    def attention_layers(self, decoder: Any) -> dict[nn.Module, int]:
        return {block.attn.attention: layer for layer, block in enumerate(decoder.h)}

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        def show(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
            on_query_key(query, key, value=value, scaling=1.0)

        return [families.CallSpy(module, "_attn", show)]

    def register_output_tap(self, module: Any, on_output: Callable[[torch.Tensor], None]) -> Sequence[Any]:
        return [families.CallSpy(module, "_attn", show_result=lambda returned: on_output(returned[0]))]

    def sliding_window(self, module: Any, arguments: dict[str, Any]) -> int | None:
        return module.config.window_size if module.attention_type == "local" else None
