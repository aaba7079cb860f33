"""Records what the attention of an unmodified model of the zoo receives and returns, without the tap."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.backbones import Vectors
from support.zoo import Case, decoder_of


def whole(case: Case, folder: Path, *, kernel: str | None = None, dtype: str = "float32") -> PreTrainedModel:
    """Returns the whole model from the same files, as transformers loads it."""
    made: PreTrainedModel = case.auto_class.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=kernel
    )
    return made.eval()


def received(
    model: PreTrainedModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, *, pre_rope: bool = False
) -> Vectors:
    """Returns the inputs and the output of the unmodified model's attention kernel, without the tap.

    The kernel and the rotary functions are replaced by ones that copy their arguments first. With `pre_rope`, queries
    and keys are the inputs of the rotary functions. A layer without a rotary call is not rotated.
    """
    decoder: Any = decoder_of(model)
    space = vars(sys.modules[type(decoder).__module__])
    given: list[torch.Tensor] = []
    seen: Vectors = {}

    def copying_rotary(rotary: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given[:] = q.clone(), k.clone()
        return rotary(q, k, *args, **kwargs)

    def copying_kernel(layer: nn.Module, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for kind, states, before in zip("qk", (q, k), given or (q, k), strict=True):
            seen[layer.layer_idx, kind] = _as_before(states, before) if pre_rope else states.clone()
        given.clear()
        seen[layer.layer_idx, "v"] = args[0].clone()
        returned = original(layer, q, k, *args, **kwargs)
        seen[layer.layer_idx, "o"] = returned[0].transpose(1, 2).clone()
        return returned

    kernel = decoder.config._attn_implementation
    original = space["eager_attention_forward"] if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]
    with monkeypatch.context() as patch, torch.no_grad():
        for name in [name for name in space if name.startswith("apply_rotary")]:
            patch.setitem(space, name, functools.partial(copying_rotary, space[name]))
        if kernel == "eager":
            patch.setitem(space, "eager_attention_forward", copying_kernel)
        else:
            patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kernel, copying_kernel)
        model(input_ids=tokens, use_cache=False)
    return seen


def _as_before(states: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Returns `states` (B, heads, n, d) with the rotated part replaced by `before`, the input of its rotary function.

    `before` is (B, n, heads, d) in Llama 4; in DeepSeek, it is the last components of each head, which keys share.
    """
    if before.shape[2] != states.shape[2]:
        before = before.transpose(1, 2)
    made = states.clone()
    made[..., -before.shape[-1] :] = before
    return made
