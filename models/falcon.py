"""Serves Falcon, which calls torch's attention kernel itself.

Newer models repeat each key and value for its query heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qk_sniffer import families


class Family(families.Family):
    """Query, key and value are the kernel's arguments while the module runs, without the repetitions."""

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        repeated = module.num_heads // module.num_kv_heads if module.new_decoder_architecture else 1
        running: list[Any] = []

        def show(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **arguments: Any) -> None:
            if running:
                bias = arguments["attn_mask"] if module.config.alibi else None
                on_query_key(query, key[:, ::repeated], value=value[:, ::repeated], position_bias=bias)

        return [
            module.register_forward_pre_hook(lambda *_: running.append(module)),
            module.register_forward_hook(lambda *_: running.clear()),
            families.CallSpy(functional, "scaled_dot_product_attention", show),
        ]

    def register_output_tap(self, module: Any, on_output: Callable[[torch.Tensor], None]) -> Sequence[Any]:
        def show(_: nn.Module, inputs: Any) -> None:
            on_output(inputs[0].unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2))

        return [module.dense.register_forward_pre_hook(show)]
