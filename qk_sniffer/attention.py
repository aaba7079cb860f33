"""The tap: sees the query and key of every self-attention call while it is open.

transformers' decoders look their attention kernel up by `AttentionInterface.get_interface` in every call. While
a tap is open that lookup returns the user's own kernel behind a wrapper that shows query and key to a callback
first. Nothing of the model is replaced or renamed: the masks, the kernel and its arguments stay those of the
user's `attn_implementation`, so that the forward is bit for bit the same, and everything is put back on exit.

Shapes: B batch, n tokens, H query heads, K key heads, d head_dim.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from qk_sniffer.errors import CaptureError
from qk_sniffer.families import Family, RotaryCall


@dataclass(frozen=True)
class AttentionCall:
    """One call of a self-attention kernel."""

    layer: int
    query: torch.Tensor
    """(B, H, n, d), what the kernel receives, or what the rotary embedding received (`pre_rope`)."""
    key: torch.Tensor
    """(B, K, n, d), before it is repeated for the query heads that share it."""
    sliding_window: int | None
    softmax_scale: float | None
    """What the kernel multiplies the logits with; None: the kernel's default, d ** -0.5."""
    softcap: float | None
    """c where the logits x become c * tanh(x / c); None: no cap."""
    sinks: torch.Tensor | None
    """(H,) learned logits that join the softmax of every query, where a model has them."""


class ForwardDone(BaseException):
    """Raised out of a forward by a callback that has seen all it needs; not an error."""


@contextmanager
def tap(
    layers: Mapping[nn.Module, int],
    on_call: Callable[[AttentionCall], None],
    *,
    family: Family,
    pre_rope: bool = False,
) -> Iterator[None]:
    """Calls `on_call` before each attention kernel that one of `layers` (module -> layer index) runs.

    Raises, out of the forward:
        CaptureError: `pre_rope` on a model for which it is not defined (see `Family.before_rotary`).
    """
    original_lookup = AttentionInterface.get_interface
    rotary_calls: list[RotaryCall] = []

    def lookup(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        kernel = original_lookup(self, name, default)

        @functools.wraps(kernel)
        def watched(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **arguments: Any) -> Any:
            layer = layers.get(module)
            if layer is not None:
                seen = family.before_rotary(module, rotary_calls, query, key) if pre_rope else (query, key)
                rotary_calls.clear()
                on_call(
                    AttentionCall(
                        layer,
                        *seen,
                        sliding_window=family.sliding_window(module, arguments),
                        softmax_scale=arguments.get("scaling"),
                        softcap=arguments.get("softcap"),
                        sinks=arguments.get("s_aux"),
                    )
                )
            return kernel(module, query, key, *args, **arguments)

        return watched

    with _watched_rotary(layers, rotary_calls) if pre_rope else _nothing():
        AttentionInterface.get_interface = lookup  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            AttentionInterface.get_interface = original_lookup  # type: ignore[method-assign]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _watched_rotary(layers: Mapping[nn.Module, int], calls: list[RotaryCall]) -> Iterator[None]:
    """Appends (before, after) of each tensor that a rotary function turns, since the attention module began."""
    namespaces = {id(space): space for module in layers for space in [vars(sys.modules[type(module).__module__])]}
    originals = [
        (space, name, function)
        for space in namespaces.values()
        for name, function in space.items()
        if name.startswith("apply_rot") and callable(function)
    ]
    if not originals:
        names = sorted({type(module).__name__ for module in layers})
        raise CaptureError(
            f"no rotary function beside {', '.join(names)}: vectors before RoPE cannot be told from those after it; "
            "set capture.capture_pre_rope=false, or say what they are in a family (model.family=package.module:Class)"
        )

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def rotary(*args: Any, **kwargs: Any) -> Any:
            turned = function(*args, **kwargs)
            outputs = turned if isinstance(turned, tuple) else (turned,)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            calls.extend(zip(tensors, outputs, strict=False))  # cos and sin follow the tensors that are turned
            return turned

        return rotary

    def forget(module: nn.Module, inputs: Any) -> None:
        calls.clear()

    hooks = [module.register_forward_pre_hook(forget) for module in layers]
    for space, name, function in originals:
        space[name] = watch(function)
    try:
        yield
    finally:
        for space, name, function in originals:
            space[name] = function
        for hook in hooks:
            hook.remove()
        calls.clear()
