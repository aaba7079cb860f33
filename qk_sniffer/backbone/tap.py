"""The tap: sees the query and key of every self-attention call while it is open.

transformers' decoders look their attention kernel up by `AttentionInterface.get_interface` in every call. While
a tap is open that lookup returns the user's own kernel behind a wrapper that shows query and key to a callback
first. Nothing of the model is replaced or renamed: the masks, the kernel and its arguments stay those of the
user's `attn_implementation`, so that the forward is bit for bit the same, and everything is put back on exit.
A family whose attention asks for no kernel shows the tap its query and key itself (`Family.register_tap`).

What was compiled (`torch.compile`) runs uncompiled while a tap is open: compiled code asks for its kernel when it is
made, not in every call, and would show nothing. Kernels may still be compiled, as flex attention is.

Shapes: B batch, n tokens, H query heads, K key heads, d head_dim.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from qk_sniffer.backbone.banded_attention import Band
from qk_sniffer.backbone.family import Family, RotaryCall
from qk_sniffer.errors import CaptureError


@dataclass(frozen=True)
class AttentionCall:
    """One call of a self-attention kernel."""

    layer: int
    query: torch.Tensor
    """(B, H, n, d), what the kernel receives, or what the rotary embedding received (`pre_rope`)."""
    key: torch.Tensor
    """(B, K, n, d), before it is repeated for the query heads that share it."""
    sliding_window: int | None
    attention_chunk: int | None
    """c where a query at position p sees keys from position p - p % c on; None: no chunks."""
    softmax_scale: float | None
    """What the kernel multiplies the logits with; None: the kernel's default, d ** -0.5."""
    softcap: float | None
    """c where the logits x become c * tanh(x / c); None: no cap."""
    sinks: torch.Tensor | None
    """(H,) learned logits that join the softmax of every query, where a model has them."""
    position_bias: bool
    """Is a bias by position (ALiBi and its kin), or by key, added to the logits?"""
    sparse_attention: bool
    """Does a query see only some of the keys before it, chosen by what they hold?"""


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
        CaptureError: one of `layers` ran and showed nothing, attention is not causal, keys are not one a token, or
            `pre_rope` is not defined for this model (see `Family.before_rotary`).
    """
    original_lookup = AttentionInterface.get_interface
    rotary_calls: list[RotaryCall] = []
    arguments_now: dict[str, Any] = {}  # of the attention module whose forward is running
    seen_last: list[weakref.ref[torch.Tensor]] = []
    causal_masks: list[weakref.ref[torch.Tensor]] = []  # found so: layers share them, and asking a GPU waits for it

    def forget() -> None:
        for state in (rotary_calls, arguments_now, seen_last):
            state.clear()

    def begin(module: nn.Module, _: Any, arguments: dict[str, Any]) -> None:
        forget()
        arguments_now.update(arguments)

    def end(module: nn.Module, *_: Any) -> None:
        if not seen_last:
            raise shows_nothing([module], family)
        forget()

    def on_query_key(module: nn.Module, query: torch.Tensor, key: torch.Tensor, **arguments: Any) -> None:
        if module not in layers:
            return
        if seen_last and seen_last[0]() is query and seen_last[1]() is key:
            return  # the same vectors once more, to attend to other values
        seen_last[:] = weakref.ref(query), weakref.ref(key)
        mask = arguments.get("attention_mask")
        if mask is None or not any(known() is mask for known in causal_masks):
            _refuse_acausal(module, query, arguments)
            if isinstance(mask, torch.Tensor):
                causal_masks[:] = [known for known in causal_masks if known() is not None] + [weakref.ref(mask)]
        _refuse_other_keys(module, query, key)
        sliding_window = family.sliding_window(module, arguments)
        _refuse_other_window(module, sliding_window, arguments.get("attention_mask"))
        vectors = family.before_rotary(module, rotary_calls, query, key) if pre_rope else (query, key)
        rotary_calls.clear()
        on_call(
            AttentionCall(
                family.layer(module, layers[module], arguments_now),
                *vectors,
                sliding_window=sliding_window,
                attention_chunk=family.attention_chunk(module),
                softmax_scale=arguments.get("scaling"),
                softcap=arguments.get("softcap"),
                sinks=arguments.get("s_aux"),
                position_bias=family.position_bias(module, arguments),
                sparse_attention=family.sparse_attention(module),
            )
        )

    def lookup(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        kernel = original_lookup(self, name, default)

        @functools.wraps(kernel)
        def watched(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **arguments: Any) -> Any:
            on_query_key(module, query, key, **dict(zip(("value", "attention_mask"), args, strict=False)) | arguments)
            with torch.compiler.set_stance("default"):
                return kernel(module, query, key, *args, **arguments)

        return watched

    if pre_rope and not rotary_functions(layers, family):
        raise CaptureError(
            f"no rotary function beside {', '.join(sorted({type(module).__name__ for module in layers}))}: vectors "
            "before RoPE cannot be told from those after it; set capture.capture_pre_rope=false, or say what they are "
            "in a family (model.family=package.module:Class)"
        )
    rotary = watched_rotary(layers, family, rotary_calls) if pre_rope else nullcontext()
    with rotary, torch.compiler.set_stance("force_eager"):
        handles: list[Any] = []
        try:
            for module in layers:
                handles += family.register_tap(module, functools.partial(on_query_key, module))
                handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                handles.append(module.register_forward_hook(end))
            AttentionInterface.get_interface = lookup  # type: ignore[method-assign, assignment]
            yield
        finally:
            AttentionInterface.get_interface = original_lookup  # type: ignore[method-assign]
            for handle in reversed(handles):
                handle.remove()
            forget()


def shows_nothing(modules: Iterable[nn.Module], family: Family) -> CaptureError:
    """The error for attention that is not run by a kernel of transformers' attention interface."""
    names = ", ".join(sorted({type(module).__name__ for module in modules}))
    if type(family).register_tap is not Family.register_tap:
        return CaptureError(
            f"{names} was not seen by its family, {type(family).__module__}: it is served with other kernels, so leave "
            "model.attn_implementation out"
        )
    return CaptureError(
        f"this model's attention ({names}) asks transformers' attention interface for no kernel: it is its own. A "
        "family can serve it: model.family=package.module:Class (see models/ADDING.md)"
    )


def _sees_last(mask: Any) -> bool:
    """Does the first token see the last one? No mask, where the kernel is not told to be causal: yes."""
    if not isinstance(mask, torch.Tensor):
        return mask is None
    corner = mask[..., 0, -1]
    return bool((corner if mask.dtype == torch.bool else corner > torch.finfo(mask.dtype).min / 2).any())


def _refuse_acausal(module: nn.Module, query: torch.Tensor, arguments: dict[str, Any]) -> None:
    n = query.shape[2]
    causal = arguments.get("is_causal", getattr(module, "is_causal", True))
    mask = arguments.get("attention_mask")
    if n > 1 and (not causal or isinstance(mask, torch.Tensor)) and _sees_last(mask):
        hint = "; a model that can be both says so in its config: model.config_overrides.is_decoder=true"
        can_be_both = getattr(getattr(module, "config", None), "is_decoder", None) is False
        raise CaptureError(
            f"{type(module).__name__} is not causal: its tokens attend to later ones, and to padding. Only decoders "
            "can be captured" + (hint if can_be_both else "")
        )


def _refuse_other_keys(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
    if key.shape[2] != query.shape[2]:
        raise CaptureError(
            f"{type(module).__name__} attends with {query.shape[2]} queries to {key.shape[2]} keys, which are not "
            "those of its tokens: there is no key vector a position"
        )


def _refuse_other_window(module: nn.Module, sliding_window: int | None, mask: Any) -> None:
    if isinstance(mask, Band) and mask.window != sliding_window:
        said = "no window" if sliding_window is None else f"a window of {sliding_window}"
        raise CaptureError(
            f"{type(module).__name__} attends within a window of {mask.window} tokens, but {said} is declared: a "
            "family can say which it is (Family.sliding_window, see models/ADDING.md)"
        )


@contextmanager
def watched_rotary(layers: Iterable[nn.Module], family: Family, calls: list[RotaryCall]) -> Iterator[None]:
    """Appends (before, after) of each tensor that a rotary function beside `layers` turns."""
    originals = rotary_functions(layers, family)

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def rotary(*args: Any, **kwargs: Any) -> Any:
            turned = function(*args, **kwargs)
            outputs = turned if isinstance(turned, tuple) else (turned,)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            calls.extend(zip(tensors, outputs, strict=False))  # cos and sin follow the tensors that are turned
            return turned

        return rotary

    for space, name, function in originals:
        space[name] = watch(function)
    try:
        yield
    finally:
        for space, name, function in originals:
            space[name] = function


def rotary_functions(
    layers: Iterable[nn.Module], family: Family
) -> list[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """The rotary functions in the Python modules of `layers`: (namespace, name, function)."""
    namespaces = {id(space): space for module in layers for space in [vars(sys.modules[type(module).__module__])]}
    return [
        (space, name, function)
        for space in namespaces.values()
        for name, function in space.items()
        if name.startswith(family.rotary_function) and callable(function)
    ]
