"""Serves MPT, which adds a bias by distance (ALiBi) and calls no kernel of the attention interface."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qk_sniffer import families


class Family(families.Family):
    """Query, key and value are parts of the output of its single projection, clipped if the model clips them.

    They are shown before the output projection: only then does a cache have the keys that the queries attend to.
    """

    def register_tap(self, module: Any, on_query_key: Callable[..., None]) -> Sequence[Any]:
        given: dict[str, Any] = {}

        def note(_: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            given.update(bias=named["position_bias"], cache=named.get("past_key_values"))

        def note_projected(_: nn.Module, inputs: Any, fused: torch.Tensor) -> None:
            given["fused"] = fused

        def show(*_: Any) -> None:
            fused, cache = given.pop("fused"), given.pop("cache")
            if module.clip_qkv:
                fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
            query, key, value = fused.unflatten(-1, (3, module.n_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
            num_keys = key.shape[2] if cache is None else cache.layers[module.layer_idx].keys.shape[2]
            bias = given.pop("bias")[None, ..., -num_keys:]  # (1, H, 1, m): the last ones are those of the keys
            bias = bias - bias[..., :1]  # zero at the first key: else logits depend on the length of the pass
            on_query_key(query, key, value=value, scaling=module.softmax_scale, position_bias=bias)

        return [
            module.register_forward_pre_hook(note, with_kwargs=True),
            module.Wqkv.register_forward_hook(note_projected),
            module.out_proj.register_forward_pre_hook(show),
        ]

    def register_output_tap(self, module: Any, on_output: Callable[[torch.Tensor], None]) -> Sequence[Any]:
        def show(_: nn.Module, inputs: Any) -> None:
            on_output(inputs[0].unflatten(-1, (module.n_heads, module.head_dim)).transpose(1, 2))

        return [module.out_proj.register_forward_pre_hook(show)]
