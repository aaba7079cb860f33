"""Shows the query, key and value of every self-attention call, and its output, to callbacks, while the tap is open.

transformers' decoders look up their attention kernel in every call, by `AttentionInterface.get_interface`. While a tap
is open, that lookup returns the user's own kernel in a wrapper that first shows query, key and value to a callback, and
then the output to another. The masks, the kernel and its arguments remain those of the user's `attn_implementation`, so
capturing does not change the forward pass. Everything is restored on exit. A family whose attention calls no kernel of
the interface shows its vectors to the tap itself (`Family.register_tap` and `Family.register_output_tap`).

Compiled code (`torch.compile`) runs uncompiled while a tap is open. It looks up its kernel when it is compiled, not in
every call, and would show nothing. Kernels may remain compiled, as in flex attention.

With `slots`, the tap also shows passes with padding and with a key-value cache, in which a call has n new tokens and
attends to m keys. Without, all tokens are new, and every row has n of them.

Shapes: B batch, n tokens, m keys, H query heads, K key heads, d head_dim, w width of a value.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from qk_sniffer.backbone.caches import CacheWatch
from qk_sniffer.backbone.cuda_attention import refuse_wrong_kernel
from qk_sniffer.backbone.family import Family, QueryKey, RotaryCall
from qk_sniffer.backbone.masks import Visible, check_mask, check_slots
from qk_sniffer.backbone.slots import Slots
from qk_sniffer.errors import CaptureError


@dataclass(frozen=True)
class AttentionCall:
    """One call of a self-attention kernel."""

    layer: int
    query: torch.Tensor
    """(B, H, n, d): the input of the kernel, or of the rotary embedding with `pre_rope`."""
    key: torch.Tensor
    """(B, K, n, d): the keys of the same tokens, before they are repeated for the query heads that share a key head."""
    sliding_window: int | None
    """The number of positions that a query sees, its own included; None on full attention."""
    attention_chunk: int | None
    """c: a query at position p sees keys from position p - p % c on; None without chunks."""
    softmax_scale: float | None
    """The factor of the logits; None for the kernel's default, d ** -0.5."""
    softcap: float | None
    """c: the logits x become c * tanh(x / c); None without a cap."""
    sinks: torch.Tensor | None
    """(H,): learned logits that join the softmax of every query; None without sinks."""
    position_bias: bool
    """Whether a bias by position, such as ALiBi, or by key is added to the logits."""
    sparse_attention: bool
    """Whether a query sees only some of the keys before it, selected by their content."""
    hides_keys: bool
    """Whether a query does not see all earlier keys for another reason than a window."""
    attended: QueryKey
    """The query (B, H, n, d) that the kernel receives, `query` or with `pre_rope` the one after RoPE, and all keys
    (B, K, m, d) that it attends to, after RoPE: of the last m slots, the new ones last. Without a cache, m = n."""
    arguments: Mapping[str, Any]
    """The other arguments of the kernel, by name. A family whose attention calls no kernel of the interface names those
    that it shows. A mask or bias by key has m of them."""
    other_stage: QueryKey | None = None
    """`query` and `key` of the other stage: after the rotary embedding with `pre_rope`, before it otherwise. None
    unless both stages are shown."""
    value: torch.Tensor | None = None
    """(B, K, n, w): before it is repeated, as `key`, and without numbers that only fill it up to the width of a key
    (`Family.value_dim`). No rotary embedding changes it. None if the family does not show it."""
    past: int = 0
    """The slot of the first new token: the number of tokens in the cache before, padding included."""
    slots: Slots | None = None
    """The tokens of all past + n slots; None if each row has n tokens, from position 0 on."""


OnRotary = Callable[[int, nn.Module, list[RotaryCall], torch.Tensor, torch.Tensor], None]
"""Receives the rotary calls of a layer: see `tap`."""


@dataclass(frozen=True)
class KernelRun:
    """A finished run of a kernel of transformers' attention interface: all that it received, and its output."""

    call: AttentionCall
    """Its facts; with `pre_rope`, its vectors are not those that the kernel received."""
    query: torch.Tensor
    """(B, H, n, d)"""
    key: torch.Tensor
    """(B, K, n, d)"""
    value: torch.Tensor | None
    """(B, K, n, width); None if the model passes it in another way."""
    mask: Any
    """A tensor that broadcasts to (B, H, n, n), a `Band`, or another kernel's own form; None without a mask."""
    arguments: Mapping[str, Any]
    """The other arguments, by name."""
    output: Any
    """(B, n, H, width) for the known kernels."""


OnOutput = Callable[[AttentionCall, torch.Tensor | None], None]
"""Receives a call and the output of its kernel, (B, H, n, w), before the output projection; None for an unknown form.

A module that attends to several values with one query and key shows each output with the same call.
"""


class ForwardDone(BaseException):
    """Raised by a callback that needs no more layers, to end the forward pass; not an error."""


@contextmanager
def tap(
    layers: Mapping[nn.Module, int],
    on_call: Callable[[AttentionCall], None],
    *,
    family: Family,
    pre_rope: bool = False,
    both_stages: bool = False,
    on_run: Callable[[KernelRun], None] | None = None,
    on_output: OnOutput | None = None,
    on_rotary: OnRotary | None = None,
    slots: Callable[[int], Slots | None] | None = None,
    in_words: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """Calls `on_call` before each attention kernel that one of `layers` (module -> layer index) runs.

    Calls `on_output` after it, and `on_run` if the kernel belongs to transformers' attention interface.
    With `both_stages`, a call also has the vectors of the stage that `pre_rope` does not name.
    `on_rotary`, if given, is called first, with the layer, its module, its rotary calls, and query and key as attention
    receives them.
    `slots`, if given, receives the layer of each call, and returns the slots of the pass that runs; None for a call
    that is not to be shown. Calls without `slots` have neither padding nor a cache. Passes of other threads are not
    shown.
    `in_words` returns a context that may change the words of the errors in the pass.

    Raises:
        CaptureError: vectors before RoPE are wanted, and the model has no rotary function. In the pass: one of `layers`
            ran and showed nothing, attention is not causal, a token does not have exactly one key, vectors before
            RoPE are not defined for this model (see `Family.before_rotary`), or the keys of its cache are not those of
            the slots (see `CacheWatch`).
    """
    original_lookup = AttentionInterface.get_interface
    rotary_calls: list[RotaryCall] = []
    forward_arguments: dict[str, Any] = {}  # of the attention module that is running
    last_seen: list[weakref.ref[torch.Tensor]] = []
    last_call: list[AttentionCall] = []  # of the module that is running; only for its output
    # Once: a check reads the mask.
    checked_masks: list[tuple[weakref.ref[torch.Tensor], Visible, Slots | None]] = []
    unfinished_checks: list[Callable[[], None]] = []
    caches = None if slots is None else CacheWatch()
    thread = threading.get_ident()

    def reset() -> None:
        for state in (rotary_calls, forward_arguments, last_seen, last_call):
            state.clear()

    def finish_checks() -> None:
        with in_words():
            for finish in unfinished_checks:
                finish()

    def before_forward(module: nn.Module, _: Any, arguments: dict[str, Any]) -> None:
        if threading.get_ident() != thread:
            return
        reset()
        forward_arguments.update(arguments)
        if caches is not None:
            caches.begin()

    def after_forward(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() != thread:
            return
        if not last_seen:
            with in_words():
                raise shows_nothing([module], family)
        reset()
        if caches is not None:
            caches.end()

    def on_query_key(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None = None,
        **arguments: Any,
    ) -> AttentionCall | None:
        if module not in layers or threading.get_ident() != thread:
            return None
        if last_seen and last_seen[0]() is query and last_seen[1]() is key:
            return None  # the same vectors again, to attend to other values
        last_seen[:] = weakref.ref(query), weakref.ref(key)
        layer = family.layer(module, layers[module], forward_arguments)
        mask = arguments.get("attention_mask")
        n, keys, running = query.shape[2], None, None if slots is None else slots(layer)
        if slots is not None and running is None:
            return None
        refuse_wrong_kernel(module, query, key, arguments)
        if caches is not None:
            keys = caches.keys(n, key, value, arguments)
            key, value, arguments = keys.key, keys.value, keys.arguments
        if running is not None and keys is not None:
            running.check(type(module).__name__, query.shape[0], n, keys.past)
        _refuse_other_keys(module, query, key)
        window = family.sliding_window(module, arguments)
        if window is not None and window < 1:
            raise CaptureError(
                f"{type(module).__name__} has a sliding window of {window} tokens, in which no query sees a key: set "
                "model.config_overrides.sliding_window to the window that the model was trained with"
            )
        rules = Visible(window, family.attention_chunk(module), family.sparse_attention(module))
        has_bias = family.position_bias(module, arguments)
        if mask is None or not any(
            known() is mask and rules == of and running is of_slots for known, of, of_slots in checked_masks
        ):
            if running is None or keys is None:
                if (rest := check_mask(module, n, rules, arguments)) is not None:
                    unfinished_checks.append(rest)
            else:
                check_slots(module, n, keys.attended.shape[2], rules, arguments, running, has_bias=has_bias)
            if isinstance(mask, torch.Tensor):
                checked_masks[:] = [one for one in checked_masks if one[0]() is not None]
                checked_masks.append((weakref.ref(mask), rules, running))
        if on_rotary is not None:
            on_rotary(layer, module, [*rotary_calls], query, key)
        after = query, key
        before = family.before_rotary(module, rotary_calls, query, key) if needs_before else after
        rotary_calls.clear()
        vectors, others = (before, after) if pre_rope else (after, before)
        call = AttentionCall(
            layer,
            *vectors,
            sliding_window=rules.window,
            attention_chunk=rules.chunk,
            softmax_scale=arguments.get("scaling"),
            softcap=arguments.get("softcap"),
            sinks=arguments.get("s_aux"),
            position_bias=has_bias,
            sparse_attention=rules.is_sparse,
            hides_keys=family.hides_keys(module),
            attended=after if keys is None else (query, keys.attended),
            arguments=arguments,
            other_stage=others if both_stages else None,
            value=_unpadded(module, key, value, family),
            past=0 if keys is None else keys.past,
            slots=running,
        )
        if on_output is not None:
            last_call[:] = [call]
        on_call(call)
        return call

    def show(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None = None,
        **arguments: Any,
    ) -> None:
        with in_words():
            on_query_key(module, query, key, value, **arguments)

    def show_output(module: nn.Module, output: Any) -> None:
        if on_output is None or not last_call or module not in layers or threading.get_ident() != thread:
            return
        call = last_call[0]
        batch, heads, n, _ = call.query.shape
        width = None if call.value is None else call.value.shape[-1]
        is_known = isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[:3] == (batch, heads, n)
        on_output(call, output[..., :width] if is_known else None)

    def lookup(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        kernel = original_lookup(self, name, default)
        if threading.get_ident() != thread:
            return kernel

        @functools.wraps(kernel)
        def tapped(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **arguments: Any) -> Any:
            named = dict(zip(("value", "attention_mask"), args, strict=False)) | arguments
            with in_words():
                call = on_query_key(module, query, key, **named)
            with torch.compiler.set_stance("default"):
                returned = kernel(module, query, key, *args, **arguments)
            output = returned[0] if isinstance(returned, tuple) else returned
            if on_run is not None and call is not None:
                value, mask = named.pop("value", None), named.pop("attention_mask", None)
                if further := args[2:]:
                    named["positional"] = further
                on_run(KernelRun(call, query, key, value, mask, named, output))
            if on_output is not None:
                show_output(
                    module, output.transpose(1, 2) if isinstance(output, torch.Tensor) and output.dim() > 2 else None
                )
            return returned

        return tapped

    needs_before = pre_rope or both_stages
    if needs_before and not rotary_functions(layers, family):
        raise CaptureError(
            f"no rotary function next to {', '.join(sorted({type(module).__name__ for module in layers}))}: vectors "
            "before RoPE cannot be distinguished from those after it; set capture.capture_pre_rope=false and "
            "capture.statistics.stages=[post], or define "
            "them in a family (model.family=package.module:Class)"
        )
    is_watched = needs_before or on_rotary is not None
    rotary = watched_rotary(layers, family, rotary_calls) if is_watched else nullcontext()
    watched = nullcontext() if caches is None else caches.opened()
    with watched, rotary, torch.compiler.set_stance("force_eager"):
        handles: list[Any] = []
        try:
            for module in layers:
                handles += family.register_tap(module, functools.partial(show, module))
                if on_output is not None:
                    handles += family.register_output_tap(module, functools.partial(show_output, module))
                handles.append(module.register_forward_pre_hook(before_forward, with_kwargs=True))
                handles.append(module.register_forward_hook(after_forward))
            AttentionInterface.get_interface = lookup  # type: ignore[method-assign, assignment]
            try:
                yield
            except ForwardDone:
                finish_checks()
                raise
            finish_checks()
        finally:
            AttentionInterface.get_interface = original_lookup  # type: ignore[method-assign]
            for handle in reversed(handles):
                handle.remove()
            reset()


def shows_nothing(modules: Iterable[nn.Module], family: Family) -> CaptureError:
    """Returns the error for attention that calls no kernel of transformers' attention interface."""
    names = ", ".join(sorted({type(module).__name__ for module in modules}))
    if type(family).register_tap is not Family.register_tap:
        return CaptureError(
            f"{names} did not show its vectors to its family, {type(family).__module__}, which serves other kernels: "
            "remove model.attn_implementation"
        )
    return CaptureError(
        f"this model's attention ({names}) calls no kernel of transformers' attention interface. A family can serve "
        "it: model.family=package.module:Class (see models/ADDING.md)"
    )


def _unpadded(module: nn.Module, key: torch.Tensor, value: Any, family: Family) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor):
        return None
    return value[..., : family.value_dim(module, key.shape[-1], value.shape[-1])]


def _refuse_other_keys(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
    if key.shape[2] != query.shape[2]:
        raise CaptureError(
            f"{type(module).__name__} attends with {query.shape[2]} queries to {key.shape[2]} keys: its tokens do not "
            "have one key vector each, so it cannot be captured"
        )


@contextmanager
def watched_rotary(layers: Iterable[nn.Module], family: Family, calls: list[RotaryCall]) -> Iterator[None]:
    """Appends (input, output) of each tensor that rotary functions next to `layers` rotate to `calls` (own thread)."""
    originals = rotary_functions(layers, family)
    thread = threading.get_ident()

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def rotary(*args: Any, **kwargs: Any) -> Any:
            returned = function(*args, **kwargs)
            if threading.get_ident() != thread:
                return returned
            outputs = returned if isinstance(returned, tuple) else (returned,)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            calls.extend(zip(tensors, outputs, strict=False))  # cos and sin come after the rotated tensors
            return returned

        return rotary

    for space, name, function in originals:
        space[name] = recording(function)
    try:
        yield
    finally:
        for space, name, function in originals:
            space[name] = function


def rotary_functions(
    layers: Iterable[nn.Module], family: Family
) -> list[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """Returns the rotary functions in the Python modules of `layers`, as (namespace, name, function)."""
    namespaces = {id(space): space for module in layers for space in [vars(sys.modules[type(module).__module__])]}
    return [
        (space, name, function)
        for space in namespaces.values()
        for name, function in space.items()
        if name.startswith(family.rotary_function) and callable(function)
    ]
