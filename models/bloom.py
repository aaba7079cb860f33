"""Serves BLOOM, which adds a bias by distance (ALiBi) and calls no kernel of the attention interface."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query, key and value are parts of the output of its single projection.

    They are shown once there are weights: only then does a cache have the keys that the queries attend to.
    """

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        given: dict[str, torch.Tensor] = {}

        def note(_: nn.Module, inputs: Any, named: dict[str, torch.Tensor]) -> None:
            given["alibi"] = named["alibi"]

        def note_projected(_: nn.Module, inputs: Any, fused: torch.Tensor) -> None:
            given["fused"] = fused

        def show(*_: Any) -> None:
            query, key, value = module._reshape(given.pop("fused"))
            bias = given.pop("alibi").unflatten(0, query.shape[:2])  # (B, H, 1, m)
            on_query_key(query, key, value=value, position_bias=bias)

        return [
            module.register_forward_pre_hook(note, with_kwargs=True),
            module.query_key_value.register_forward_hook(note_projected),
            module.attention_dropout.register_forward_pre_hook(show),
        ]

    def register_output_tap(self, module: Any, on_output: Callable[[torch.Tensor], None]) -> Sequence[Any]:
        def show(_: nn.Module, inputs: Any) -> None:
            on_output(inputs[0].unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2))

        return [module.dense.register_forward_pre_hook(show)]
