"""Finds a kernel of torch for CUDA that attends within a window, and checks it before a model's bands run on it.

Such a kernel needs no mask, no blocks and no repeated keys. Which one a version of torch has, and for which forms of
queries and keys it is right, is found out at the start: it attends within a window over some hundred random tokens, and
its output is compared with softmax(q K) V in float64. Calls of other forms, or with other arguments, are left to the
blocks of `banded_attention.py`.

Shapes: B batch, n tokens, H query heads, K key heads, d head_dim.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qk_sniffer.backbone.attention_check import TOLERANCES, beyond_rounding
from qk_sniffer.backbone.exact_attention import Attended, exact_attention
from qk_sniffer.backbone.masks import Visible
from qk_sniffer.logs import logger
from qk_sniffer.text import one_line

log = logger(__name__)

CHECKED_TOKENS, CHECKED_WINDOW = 300, 100
"""The tokens of each text of the check, and the largest window there."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]
"""Takes query (B, H, n, d), key, value (B, K, n, d), the window and the factor of the logits; returns (B, n, H, d)."""


@dataclass(frozen=True)
class Form:
    """What the vectors of a layer have in common in all forward passes."""

    device: torch.device
    dtype: torch.dtype
    num_q_heads: int
    num_k_heads: int
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> "Form":
        return cls(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], value.shape[3])

    @property
    def may_be_served(self) -> bool:
        """Whether a kernel may be right for it: they compute in half precision on CUDA alone."""
        return self.device.type == "cuda" and self.dtype.itemsize == 2


@dataclass(frozen=True)
class WindowKernel:
    """A kernel that is right for some forms."""

    name: str
    attend: Attend
    forms: frozenset[Form]

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, arguments: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """Returns the output (B, n, H, d); None for a call that this kernel does not serve.

        `arguments` are the other ones of transformers' `sdpa`.
        """
        changed = any(arguments.get(name) for name in ("dropout", "softcap"))
        added = any(arguments.get(name) is not None for name in ("position_bias", "cache"))
        if changed or added or Form.of(query, key, value) not in self.forms:
            return None
        scale = arguments.get("scaling")
        return self.attend(query, key, value, window, query.shape[3] ** -0.5 if scale is None else float(scale))


def window_kernel(windows: Mapping[Form, int]) -> WindowKernel | None:
    """Returns the first kernel that is right for all forms, each with a window of its layers; None if none is."""
    if not windows or not all(form.may_be_served for form in windows):
        return None
    for name, find in FINDERS.items():
        attend = find()
        problem = f"torch {torch.__version__} has none" if attend is None else _problem(attend, windows)
        if attend is not None and problem is None:
            log.info("sliding windows are computed by %s", name)
            return WindowKernel(name, attend, frozenset(windows))
        log.info("sliding windows are not computed by %s: %s", name, problem)
    log.warning(
        "sliding windows are computed in blocks with masks, which takes longer: no kernel with a window is right"
    )
    return None


def varlen_attention() -> Attend | None:
    """Returns torch's attention over texts that lie one after the other; None in a version without windows for it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float) -> torch.Tensor:
        batch, _, n, _ = query.shape
        ends = torch.arange(0, batch * n + 1, n, dtype=torch.int32, device=query.device)
        query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        attended: Any = varlen_attn(
            query, key, value, ends, ends, n, n, scale=scale, window_size=(window - 1, 0), enable_gqa=True
        )
        unpacked: torch.Tensor = attended.unflatten(0, (batch, n))
        return unpacked

    return attend


def flash_attention() -> Attend | None:
    """Returns the operation of torch behind its flash attention; None in a version without windows for it."""
    operation = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operation is None or "window_size_left" not in {each.name for each in operation.default._schema.arguments}:
        return None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float) -> torch.Tensor:
        n = query.shape[2]
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        # Without lengths and dropout; the window is causal by itself.
        given = query, key, value, None, None, n, n, 0.0, False, False
        attended: torch.Tensor = operation(*given, scale=scale, window_size_left=window - 1, window_size_right=0)[0]
        return attended

    return attend


FINDERS: Mapping[str, Callable[[], Attend | None]] = {
    "torch.nn.attention.varlen": varlen_attention,
    "torch's flash attention": flash_attention,
}
"""By name; the public interface comes first."""


def _problem(attend: Attend, windows: Mapping[Form, int]) -> str | None:
    """Returns what is wrong with a kernel; None if it is right for all forms."""
    return next((found for form, window in windows.items() for found in _problems(attend, form, window)), None)


def _problems(attend: Attend, form: Form, window: int) -> Iterator[str]:
    draw = torch.Generator().manual_seed(0)
    window, scale = min(window, CHECKED_WINDOW), form.head_dim**-0.5
    heads = (form.num_q_heads, form.head_dim), (form.num_k_heads, form.head_dim), (form.num_k_heads, form.value_dim)
    query, key, value = (
        torch.randn(2, count, CHECKED_TOKENS, width, generator=draw).to(form.device, form.dtype)
        for count, width in heads
    )
    try:
        found = attend(query, key, value, window, scale)
    except (RuntimeError, TypeError, ValueError) as error:
        yield one_line(f"{type(error).__name__}: {error}", 300)
        return
    expected = 2, CHECKED_TOKENS, form.num_q_heads, form.value_dim
    if found.shape != expected:
        yield f"it returns {tuple(found.shape)} instead of {expected}"
        return
    visible, at = Visible(window, None, is_sparse=False), range(CHECKED_TOKENS)
    for text in range(2):
        of = Attended(query[text], key[text], value[text], visible, scale)
        exact, rounded = exact_attention(of, at), exact_attention(of, at, form.dtype)
        largest = float(beyond_rounding(found[text].to(exact.dtype), exact, rounded).max())
        if not largest <= TOLERANCES[str(form.dtype).removeprefix("torch.")]:  # NaN too
            yield f"in a window of {window} tokens it differs by {largest:.1g} (relative) from softmax(q K) V"
