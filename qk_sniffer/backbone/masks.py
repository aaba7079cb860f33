"""Compares the mask of an attention call with the keys that the call's layer is declared to show its queries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qk_sniffer.backbone.banded_attention import Band
from qk_sniffer.backbone.slots import Slots
from qk_sniffer.errors import CaptureError

_WAY_OUT = "a family can declare it (Family.sliding_window, attention_chunk, sparse_attention; see models/ADDING.md)"


@dataclass(frozen=True)
class Visible:
    """The declared rule by which a layer's queries see earlier keys."""

    window: int | None
    """w: a query at position p sees keys from position p - w + 1 on; None without a window."""
    chunk: int | None
    """c: a query at position p sees keys from position p - p % c on; None without chunks."""
    is_sparse: bool
    """Whether a selection by content hides more keys."""

    def first(self, position: int) -> int:
        """Returns the first position that a query at `position` sees, before any selection by content."""
        return int(self.firsts(np.array(position, np.int64)))

    def firsts(self, position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the first positions that queries at these positions see, in the same shape."""
        none = np.zeros_like(position)
        first = none if self.window is None else np.maximum(0, position - self.window + 1)
        return first if self.chunk is None else np.maximum(first, position - position % self.chunk)


def check_mask(module: nn.Module, n: int, rules: Visible, arguments: dict[str, Any]) -> Callable[[], None] | None:
    """Checks that attention over n tokens is causal, and that the last query sees the keys that `rules` declare.

    `arguments` are those of the kernel, by name. Without a mask, the kernel's arguments alone decide. Returns the rest
    of the check of a mask on a CUDA device, for the end of the forward pass: the device then has its result long since.

    Raises:
        CaptureError: a token sees later ones, or sees other keys than declared.
    """
    mask = arguments.get("attention_mask")
    if isinstance(mask, Band):
        _refuse_other_window(module, rules, mask.window)
    if n == 1:
        return None
    causal = arguments.get("is_causal", getattr(module, "is_causal", True))
    if not isinstance(mask, torch.Tensor):
        if not causal and mask is None:
            raise _acausal(module, causal)
        return None
    if mask.is_meta:  # without numbers
        return None
    sees_last = is_visible(mask[..., 0, -1]).any()
    is_whole = mask.shape[-2:] == (n, n) and not rules.is_sparse
    expected = torch.arange(n, device=mask.device) >= rules.first(n - 1)
    differs = (is_visible(mask[..., -1, :]) != expected).any() if is_whole else sees_last
    is_wrong = sees_last | differs

    def finish() -> None:
        if not bool(is_wrong):
            return
        if sees_last:
            raise _acausal(module, causal)
        last, before = (_reach(mask[..., position, : position + 1]) for position in (n - 1, n - 2))
        if last is not None and last in (before, n):
            _refuse_other_window(module, rules, None if last == n else last)
        raise CaptureError(
            f"{type(module).__name__} in layer {getattr(module, 'layer_idx', '?')}: its mask hides keys that its facts "
            f"do not exclude, or shows keys that they do: {_WAY_OUT}"
        )

    if mask.device.type != "cuda":
        finish()
        return None
    found = torch.empty(is_wrong.shape, dtype=torch.bool, pin_memory=True)
    found.copy_(is_wrong, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record(torch.cuda.current_stream(mask.device))

    def finish_later() -> None:
        copied.synchronize()
        if bool(found):
            finish()

    return finish_later


def check_slots(
    module: nn.Module,
    n: int,
    m: int,
    rules: Visible,
    arguments: dict[str, Any],
    slots: Slots,
    *,
    has_bias: bool = False,
) -> None:
    """Checks that each of n queries of a row sees the keys that `rules` declare, and no padding.

    The keys are those of the last m of the slots, the queries those of the last n. Reads a value of a mask on a GPU
    once. A kernel whose mask is not by query and key hides padding itself. `has_bias` says that the layer is declared
    to add terms to the logits.

    Raises:
        CaptureError: a query sees later tokens or padding, or other keys than declared; or the mask adds terms to the
            logits that are not declared.
    """
    mask = arguments.get("attention_mask")
    causal = arguments.get("is_causal", getattr(module, "is_causal", True))
    if isinstance(mask, Band):
        _refuse_other_window(module, rules, mask.window)
    # Without a mask, all layers of a step of decoding are alike, and this takes longer than their gather.
    unmasked = (rules, n, m, bool(causal), "attention_mask" in arguments)
    if mask is None and unmasked in slots.passed:
        return
    queries, keys = slots.last(n), slots.last(m)
    is_token = queries >= 0
    rows = np.flatnonzero(is_token.any(axis=1))
    first = rules.firsts(queries)
    earliest = np.where(is_token, first, np.iinfo(np.int64).max).min(axis=1)
    _refuse_dropped(module, slots.position[rows, : slots.total - m], earliest[rows])
    if mask is None:
        if n > 1 and not causal:
            raise _acausal(module, causal)
        last = m - 1 - is_token[rows, ::-1].argmax(axis=1)
        is_padding = (keys[rows] < 0) & (np.arange(m) < last[:, None])
        if "attention_mask" in arguments and is_padding.any():
            raise CaptureError(
                f"{type(module).__name__} attends to padding: its kernel receives no mask that hides it. Call the "
                "model with an attention_mask, or with one text at a time"
            )
        slots.passed.add(unmasked)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        _check_all(module, mask, queries, keys, first, rules, causal, has_bias=has_bias)


_QUERIES = 512
"""The queries of a mask that are checked at a time, so that this takes less memory than the mask."""


def _check_all(
    module: nn.Module,
    mask: torch.Tensor,
    queries: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    rules: Visible,
    causal: Any,
    *,
    has_bias: bool,
) -> None:
    """Compares a mask (1 or B, 1 or H, 1 or n, m) with the positions of queries and of what they see first (B, n), and
    of keys (B, m).

    Raises:
        CaptureError: a reason of `check_slots`.
    """
    at, since, of_key = (torch.from_numpy(values).to(mask.device) for values in (queries, first, keys))
    found = torch.zeros(3, dtype=torch.bool, device=mask.device)  # other keys, later keys, terms
    for start in range(0, queries.shape[1], _QUERIES):
        some = slice(start, start + _QUERIES)
        part = mask if mask.shape[2] == 1 else mask[:, :, some]
        seen, query, key = is_visible(part), at[:, None, some, None], of_key[:, None, None]
        is_token, is_later = query >= 0, key > query
        expected = (key >= 0) & ~is_later & (key >= since[:, None, some, None])
        differs = seen & ~expected | ~seen.any(-1, keepdim=True) if rules.is_sparse else seen != expected
        terms = seen & (part != 0) if part.dtype.is_floating_point else torch.zeros_like(seen)
        found |= torch.stack([(each & is_token).any() for each in (differs, seen & is_later, terms)])
    has_others, has_later, has_terms = found.tolist()
    if has_later:
        raise _acausal(module, causal)
    if has_others:
        raise CaptureError(
            f"{type(module).__name__} in layer {getattr(module, 'layer_idx', '?')}: its mask hides keys that its facts "
            "and the padding do not exclude, or shows keys that they do. Call the model with an attention_mask that "
            f"says which tokens are padding, on the left of each text; otherwise, {_WAY_OUT}"
        )
    if has_terms and not has_bias:
        raise CaptureError(
            f"{type(module).__name__} in layer {getattr(module, 'layer_idx', '?')}: its mask adds terms to the logits "
            "of keys that it shows, which no fact of the layer names. Call the model with an attention_mask that only "
            "says which tokens are padding; otherwise, a family can declare it (Family.position_bias; see "
            "models/ADDING.md)"
        )


def _refuse_dropped(module: nn.Module, dropped: npt.NDArray[np.int64], first: npt.NDArray[np.int64]) -> None:
    """Refuses positions (rows, slots) of dropped keys that are among those that queries see, `first` (rows,) on."""
    if dropped.size and (dropped.max(axis=1) >= first).any():
        raise CaptureError(
            f"{type(module).__name__} in layer {getattr(module, 'layer_idx', '?')}: its cache has dropped keys that "
            "its facts say its queries see. A window over padding between tokens cannot be captured: pad on the left. "
            "Otherwise, the cache has a window that the model has not without a cache: use DynamicCache()"
        )


def is_visible(values: torch.Tensor) -> torch.Tensor:
    """Returns where a mask shows keys. `values` are booleans, or terms of the logits whose least value hides a key."""
    return values if values.dtype == torch.bool else values > torch.finfo(values.dtype).min / 2


def _reach(row: torch.Tensor) -> int | None:
    """Returns the number of keys that a query sees, its own included, if they are the last ones; otherwise None."""
    visible = is_visible(row).reshape(-1, row.shape[-1])
    count = int(visible[0].sum())
    return count if bool((visible == visible[0]).all()) and bool(visible[0, row.shape[-1] - count :].all()) else None


def _acausal(module: nn.Module, causal: Any) -> CaptureError:
    config = getattr(module, "config", None)
    hint = ""
    if getattr(config, "is_decoder", None) is False:
        hint = "; for this model as a decoder, set model.config_overrides.is_decoder=true"
    elif causal and getattr(config, "_attn_implementation", "eager") != "eager":
        hint = "; if this is one, its mask for this kernel is not causal: set model.attn_implementation=eager"
    return CaptureError(
        f"{type(module).__name__} is not causal: its tokens attend to later ones and to padding. Only decoders "
        f"can be captured{hint}"
    )


def _refuse_other_window(module: nn.Module, rules: Visible, window: int | None) -> None:
    if rules.window == window:
        return
    attends, declared = ("no window" if size is None else f"a window of {size}" for size in (window, rules.window))
    where = f"within {attends} tokens" if window is not None else "without a window"
    raise CaptureError(f"{type(module).__name__} attends {where}, but {declared} is declared: {_WAY_OUT}")
