"""Records the inputs of an unmodified model's attention, without the tap.

Kernels and rotary functions are replaced by ones that copy their arguments first. For a module that calls no kernel of
the attention interface, the first product of two stacks of matrices is recorded: that of queries and keys.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rotated = tuple[torch.Tensor, torch.Tensor]


@dataclass
class KernelCall:
    """One attention call: B batch, H query and K key heads, n tokens, d width."""

    module: nn.Module
    query: torch.Tensor
    """(B, H, n, d)"""
    key: torch.Tensor
    """(B, K, n, d)"""
    mask: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    """(B, H, n, n); None if the kernel does not return them."""
    value: torch.Tensor | None = None
    """(B, K, n, w), or with a head for each query head."""
    output: torch.Tensor | None = None
    """(B, H, n, w): the weighted values."""
    rotated: list[Rotated] = field(default_factory=list)
    """Inputs and outputs of rotary functions since the previous call."""


def recorded(
    decoder: nn.Module, ids: torch.Tensor, run: Callable[[], Any] | None = None
) -> tuple[list[KernelCall], Any]:
    """Returns the attention calls of a plain forward pass, in order, and its last hidden states.

    `run`, if given, runs other passes instead, and its result is returned as it is. With a cache, keys are m instead of
    n, and only kernels of the attention interface are recorded.
    """
    spaces = {name: vars(sys.modules[name]) for name in {type(module).__module__ for module in decoder.modules()}}
    kernel_calls: list[KernelCall] = []
    rotated: list[Rotated] = []
    products = _Products(decoder, ids)
    with ExitStack() as stack:
        for owner in (*spaces.values(), ALL_ATTENTION_FUNCTIONS._global_mapping):
            copying: dict[str, Callable[..., Any]] = {}
            for name, function in owner.items():
                if name in ("eager_attention_forward", "sdpa"):
                    copying[name] = _copying_kernel(function, kernel_calls, rotated)
                elif name.startswith("apply_rot") and callable(function):
                    copying[name] = _copying_rotary(function, rotated, products.rotated)
            stack.enter_context(patch.dict(owner, copying))
        stack.enter_context(products)
        hidden = decoder(input_ids=ids, use_cache=False)[0] if run is None else run()
    return _without_repetitions(kernel_calls or products.calls), hidden


def _copying_kernel(kernel: Callable[..., Any], calls: list[KernelCall], rotated: list[Rotated]) -> Callable[..., Any]:
    def copying(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **arguments: Any) -> Any:
        mask = args[1] if len(args) > 1 else arguments.get("attention_mask")
        value = args[0] if args else arguments["value"]
        call = KernelCall(module, query.clone(), key.clone(), mask, value=value.clone(), rotated=list(rotated))
        rotated.clear()
        calls.append(call)
        returned = kernel(module, query, key, *args, **arguments)
        call.output, call.weights = returned[0].clone().transpose(1, 2), returned[1]
        return returned

    return copying


def _copying_rotary(function: Callable[..., Any], *rotated: list[Rotated]) -> Callable[..., Any]:
    def copying(*args: Any, **arguments: Any) -> Any:
        before = [value.clone() for value in (*args, *arguments.values()) if isinstance(value, torch.Tensor)]
        returned = function(*args, **arguments)
        after = returned if isinstance(returned, tuple) else (returned,)
        pairs = [(old, new.clone()) for old, new in zip(before, after, strict=False)]
        for record in rotated:
            record += pairs
        return returned

    return copying


class _Products(TorchFunctionMode):
    """Records the first two products in each pass of an attention module, and the softmax between them."""

    def __init__(self, decoder: nn.Module, ids: torch.Tensor) -> None:
        super().__init__()
        self.calls: list[KernelCall] = []
        self.rotated: list[Rotated] = []
        self.running: list[tuple[nn.Module, list[KernelCall]]] = []
        self.modules = [module for module in decoder.modules() if "Attention" in type(module).__name__]
        self.ids = ids

    def __enter__(self) -> "_Products":
        self.hooks = [module.register_forward_pre_hook(self._begin) for module in self.modules]
        self.hooks += [module.register_forward_hook(self._end) for module in self.modules]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        self.running.append((module, []))

    def _end(self, *_: Any) -> None:
        self.calls += self.running.pop()[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not self.running:
            return returned
        module, calls = self.running[-1]
        if name == "softmax" and calls:
            calls[0].weights = returned
        factors: list[torch.Tensor] = []
        if name in ("matmul", "bmm") and args[1].dim() > 2:
            factors = [args[0], args[1].transpose(-1, -2)]
        elif name == "baddbmm":
            first, second = (kwargs["batch1"], kwargs["batch2"]) if "batch1" in kwargs else args[1:3]
            factors = [first, second.transpose(-1, -2)]
        elif name == "scaled_dot_product_attention":
            factors = [args[0], args[1]]
        batch, n = self.ids.shape
        if calls and name in ("matmul", "bmm") and args[0].shape[-2:] == (n, n) and calls[0].output is None:
            calls[0].value, calls[0].output = (
                states.clone().reshape(batch, -1, n, states.shape[-1]) for states in (args[1], returned)
            )
        if not calls and [factor.shape[-2] for factor in factors] == [n, n]:
            shape = (batch, -1, n, factors[0].shape[-1])
            query, key = (factor.clone().reshape(shape) for factor in factors)
            call = KernelCall(module, query, key, rotated=list(self.rotated))
            if name == "scaled_dot_product_attention":
                call.value, call.output = args[2].clone(), returned.clone()
            calls.append(call)
            self.rotated.clear()
        return returned


def _without_repetitions(calls: list[KernelCall]) -> list[KernelCall]:
    """Returns `calls` without those that attend to other values with the query and key of the previous call."""
    return [
        call
        for before, call in zip([None, *calls], calls, strict=False)
        if before is None
        or before.module is not call.module
        or not (torch.equal(before.query, call.query) and torch.equal(before.key, call.key))
    ]
