"""Computes logits and softmax(q K) V in float64 at chosen query positions of one text, without an attention kernel.

Shapes: H query heads, K key heads, P positions, n tokens, d head_dim, w width of a value.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from qk_sniffer.backbone.masks import Visible, is_visible

PIECE_BYTES = 32 << 20
"""The keys that are widened at a time, and the logits of a piece, take about this much memory each."""

_NOTHING = -1e30
"""The maximum of no logits. Finite, because inf - inf is not a number."""


@dataclass(frozen=True, eq=False)
class Attended:
    """The vectors of one text that attention receives, and the rule by which they attend."""

    query: torch.Tensor
    """(H, n, d)"""
    key: torch.Tensor
    """(K, n, d)"""
    value: torch.Tensor | None
    """(K, n, w); None if only logits are computed."""
    visible: Visible
    scale: float
    """The factor of the logits."""
    softcap: float | None = None
    """c: the logits x become c * tanh(x / c); None without a cap."""
    sinks: torch.Tensor | None = None
    """(H,): learned logits that join the softmax of every query; None without sinks."""
    selection: torch.Tensor | None = None
    """(1, n, n) or (H, n, n): the mask with the keys that sparse attention selects; None if a query sees all keys of
    `visible`."""


def exact_attention(of: Attended, at: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns softmax(q K) V at positions `at`, (P, H, w), in float64, or in float32 on a device without it.

    With a `dtype`, logits and weights are rounded to it, as simple kernels do. The keys are read piece by piece, and so
    the memory does not grow with the text.
    """
    assert of.value is not None
    num_k, _, d = of.key.shape
    step = max(1, PIECE_BYTES // (num_k * (d + of.value.shape[-1]) * 8))
    most = max(1, PIECE_BYTES // (of.query.shape[0] * min(step, of.key.shape[1]) * 8))
    parts = [_attend(of, at[start : start + most], step, dtype) for start in range(0, len(at), most)]
    return torch.cat(parts)


def exact_logits(of: Attended, head: int, at: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns the logits of query head `head` at positions `at`, (P, max(at) + 1); -inf where a query sees no key.

    The dtypes are those of `exact_attention`.
    """
    device, wide = of.query.device, _wide(of)
    where = torch.tensor(at, device=device)
    query, keys = of.query[head, where].to(wide), of.key[head // (len(of.query) // len(of.key))]
    found = torch.full((len(at), max(at) + 1), -torch.inf, dtype=wide, device=device)
    for start, stop in _pieces(max(1, PIECE_BYTES // (keys.shape[1] * 8)), of.visible, at):
        logits = _logits(of, query, keys[start:stop].to(wide), _rounding(dtype, wide))
        visible = _visible(of, at, start, stop)
        found[:, start:stop] = logits.masked_fill(~visible[head if len(visible) > 1 else 0], -torch.inf)
    return found


def _wide(of: Attended) -> torch.dtype:
    return torch.float64 if of.query.device.type in ("cpu", "cuda") else torch.float32


def _rounding(dtype: torch.dtype | None, wide: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: states if dtype is None else states.to(dtype).to(wide)


def _logits(
    of: Attended, query: torch.Tensor, key: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Returns the logits (..., queries, keys), of hidden keys too."""
    logits = rounding(rounding(query @ key.transpose(-2, -1)) * of.scale)
    if of.softcap is not None:
        logits = rounding(of.softcap * rounding(torch.tanh(rounding(logits / of.softcap))))
    return logits


def _visible(of: Attended, at: Sequence[int], start: int, stop: int) -> torch.Tensor:
    """Returns (1 or H, P, stop - start): whether the queries see the keys from `start` on."""
    device = of.query.device
    where, first = torch.tensor(at, device=device), torch.tensor([*map(of.visible.first, at)], device=device)
    keys = torch.arange(start, stop, device=device)
    visible = ((keys >= first[:, None]) & (keys <= where[:, None]))[None]
    return visible if of.selection is None else visible & is_visible(of.selection[:, where, start:stop])


def _attend(of: Attended, at: Sequence[int], step: int, dtype: torch.dtype | None) -> torch.Tensor:
    assert of.value is not None
    device, wide = of.query.device, _wide(of)
    num_k, _, d = of.key.shape
    where = torch.tensor(at, device=device)
    # (K, H / K * P, d): the query heads that share a key head, one after the other.
    query = of.query[:, where].to(wide).reshape(num_k, -1, d)
    group = query.shape[1] // len(at)
    rounding = _rounding(dtype, wide)
    if of.sinks is None:
        top = torch.full((num_k, query.shape[1]), _NOTHING, dtype=wide, device=device)
    else:
        top = of.sinks.to(device, wide).reshape(num_k, group, 1).expand(-1, -1, len(at)).reshape(num_k, -1)
    total = torch.zeros_like(top) if of.sinks is None else torch.ones_like(top)
    weighted = torch.zeros(*top.shape, of.value.shape[-1], dtype=wide, device=device)
    for start, stop in _pieces(step, of.visible, at):
        visible = _visible(of, at, start, stop)
        key, value = (states[:, start:stop].to(wide) for states in (of.key, of.value))
        logits = _logits(of, query, key, rounding)
        logits = logits.masked_fill(
            ~visible.expand(num_k * group, *visible.shape[-2:]).reshape(logits.shape), -torch.inf
        )
        above = torch.maximum(top, logits.amax(dim=-1))
        weights = rounding((logits - above[..., None]).exp())
        shrunk = (top - above).exp()
        total = total * shrunk + weights.sum(dim=-1)
        weighted = weighted * shrunk[..., None] + weights @ value
        top = above
    attended = rounding(weighted / total[..., None])
    return attended.reshape(num_k * group, len(at), -1).transpose(0, 1)


def _pieces(step: int, visible: Visible, at: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the ranges of at most `step` keys that some position in `at` sees, as (start, stop)."""
    ranges = [(visible.first(position), position + 1) for position in at]
    for start in range(0, max(at) + 1, step):
        stop = min(start + step, max(at) + 1)
        if any(first < stop and start < end for first, end in ranges):
            yield start, stop
