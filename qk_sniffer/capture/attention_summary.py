"""Summarizes the attention of captured queries over all keys that they see, without an n x n matrix.

The weights are those of the model: the softmax of the logits that its kernel computes, with its scale, softcap, window,
chunks, selection of keys, bias and learned sinks (`backbone/attention_terms.py`). Queries and keys are widened to
float32, and the keys are read block by block, so that the memory does not grow with the text. Each block adds to sums
that are relative to the largest logit so far. `store/attention_table.py` has the columns.

With a key-value cache, the new queries of a pass attend to all keys of their rows, or to the last ones that the cache
of a sliding layer keeps. Padding is left out first: keys and terms of a text are those of its tokens.

Shapes: n queries of a row, m keys of its text that attention receives, K key heads, G query heads of each of them, p
queries, a of them that see a key of a block of b keys, d head_dim, W numbers of a record.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.backbone.attention_terms import AttentionTerms, UnknownTermsError
from qk_sniffer.backbone.backbone import on_device
from qk_sniffer.backbone.masks import is_visible
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture.gather import DeviceIndices, Heads
from qk_sniffer.errors import CaptureError
from qk_sniffer.store.attention_table import INTEGERS, NO_KEY, AttentionTable

BLOCK_KEYS = 1024
"""The keys of a block."""

BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}
"""About the most logits that are computed at a time. On a CPU they fit in its caches; on a GPU, more are faster."""

PART_KEYS = 16
"""The keys whose largest logit is found first, when the largest ones of a block are."""

_HIDDEN = -1e30
"""The logit of a key that a query does not see. Finite, because inf - inf is not a number."""

Int64 = npt.NDArray[np.int64]


class Summarizer:
    """Summarizes the queries of the captured heads of each layer."""

    def __init__(self, table: AttentionTable, sink_tokens: int, heads: Mapping[int, Sequence[int]]) -> None:
        """`heads` are the query heads of each layer whose queries are captured, ascending."""
        self.table = table
        self._sink_tokens = sink_tokens
        self._heads = heads
        self._groups: dict[int, list[_Group]] = {}

    def write(self, call: AttentionCall, sent: DeviceIndices, out: torch.Tensor) -> None:
        """Fills `out` (heads, num_tokens, W) float32, on the device of the call, with the records of queries `sent`.

        `sent` has the places of queries among the n of the call; none is padding.

        Raises:
            CaptureError: the weights do not follow from what the kernel receives.
        """
        try:
            terms = AttentionTerms.of(call)
        except UnknownTermsError as error:
            raise CaptureError(refusal({call.layer: str(error)})) from error
        query, key = call.attended
        device = query.device
        if call.layer not in self._groups:
            self._groups[call.layer] = list(_groups(self._heads[call.layer], query.shape[1] // key.shape[1]))
        for row, start, stop in _texts(sent.tokens.row):
            text = _Text.of(call, terms, row)
            for group in self._groups[call.layer]:
                step = max(1, BLOCK_LOGITS.get(device.type, 1 << 20) // (len(group.rows.numbers) * BLOCK_KEYS))
                for first in range(start, stop, step):
                    last = min(stop, first + step)
                    queries = _Queries.of(text, group, sent.part(first, last))
                    records = _records(queries, self.table, self._sink_tokens)
                    out[group.rows.index(device)[:, 0], first:last] = records.flatten(0, 1)


def refusal(reasons: Mapping[int, str]) -> str:
    """Returns the message for layers whose attention cannot be summarized, with the reason of each."""
    layer, reason = next(iter(reasons.items()))
    others = f", as that of {len(reasons) - 1} more," if len(reasons) > 1 else ""
    return (
        f"the attention of layer {layer}{others} cannot be summarized: {reason}. Set capture.attention.enabled=false, "
        "or leave such layers out with capture.layers"
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """Query heads whose key heads have equally many of them. `rows` are their places among the captured heads."""

    query_heads: Heads
    key_heads: Heads
    rows: Heads

    @property
    def shape(self) -> tuple[int, int]:
        """K, G."""
        num_keys = len(self.key_heads.numbers)
        return num_keys, len(self.query_heads.numbers) // num_keys


def _groups(heads: Sequence[int], num_sharing: int) -> Iterator[_Group]:
    """Yields the groups of `heads`. In the layer, `num_sharing` neighbours share a key head."""
    sharing: dict[int, list[tuple[int, int]]] = {}
    for row, head in enumerate(heads):
        sharing.setdefault(head // num_sharing, []).append((row, head))
    for size in sorted({len(pairs) for pairs in sharing.values()}):
        alike = {key: pairs for key, pairs in sharing.items() if len(pairs) == size}
        pairs = [pair for same in alike.values() for pair in same]
        yield _Group(Heads([head for _, head in pairs]), Heads(list(alike)), Heads([row for row, _ in pairs]))


def _texts(row: npt.NDArray[np.int32]) -> Iterator[tuple[int, int, int]]:
    """Yields (row of the batch, first token, end of the tokens) for each text with tokens."""
    starts = np.flatnonzero(np.diff(row, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        yield int(row[start]), start, stop


@dataclass(frozen=True, eq=False)
class _Text:
    """The queries and keys of one row of a batch, without the padding among the keys, and the terms of their logits."""

    query: torch.Tensor
    """(H, n, d)"""
    key: torch.Tensor
    """(all key heads, m, d): of the tokens from position `first_key` on."""
    first_key: int
    position: Int64 | None
    """(n,): the positions of the queries; None if they count from 0 on."""
    terms: AttentionTerms
    selection: torch.Tensor | None
    """(1 or H, n, m): the mask of a layer with sparse attention; None elsewhere."""
    bias: torch.Tensor | None
    """(1 or H, 1 or n, m); None without a bias."""
    sinks: torch.Tensor | None
    """(H, 1 or n): the logits of learned sinks; None without sinks."""

    @classmethod
    def of(cls, call: AttentionCall, terms: AttentionTerms, row: int) -> "_Text":
        query, key = (states[row] for states in call.attended)
        selection, bias, sinks = (
            None if values is None else values[row if len(values) > 1 else 0]
            for values in (terms.selection, terms.bias, terms.sinks)
        )
        if call.slots is None:
            return cls(query, key, 0, None, terms, selection, bias, sinks)
        position = call.slots.last(key.shape[1])[row]
        held = np.flatnonzero(position >= 0)
        if len(held) < len(position):
            is_range = int(held[-1]) - int(held[0]) == len(held) - 1
            kept: Any = slice(int(held[0]), int(held[-1]) + 1)
            if not is_range:
                kept = on_device(torch.from_numpy(held), key.device)
            key = key[:, kept]
            selection, bias = (None if values is None else values[..., kept] for values in (selection, bias))
        of_queries = position[len(position) - query.shape[1] :]
        return cls(query, key, int(position[held[0]]), of_queries, terms, selection, bias, sinks)


@dataclass(frozen=True, eq=False)
class _Queries:
    """Queries of one text and the heads of one group, by ascending position."""

    vectors: torch.Tensor
    """(K, G, p, d) float32"""
    place: torch.Tensor
    """(p,) int64, on the device: their places among the n queries of the text."""
    position: torch.Tensor
    """(p,) int64, on the device"""
    known: Int64
    """(p,): the same positions on the host, so that no step waits for the device."""
    first: Int64
    """(p,): the first position that each query sees, before any selection by content."""
    text: _Text
    group: _Group

    @classmethod
    def of(cls, text: _Text, group: _Group, sent: DeviceIndices) -> "_Queries":
        """Gathers the queries `sent` of the heads of a group."""
        device, at = text.query.device, sent.tokens.position.astype(np.int64)
        place = on_device(torch.from_numpy(at), device) if sent.index is None else sent.index[1].to(device).long()
        known, position = at, place
        if text.position is not None:
            known = text.position[at]
            position = on_device(torch.from_numpy(known), device)
        vectors = text.query[group.query_heads.index(device), place].float().unflatten(0, group.shape)
        first = np.array([*map(text.terms.visible.first, known.tolist())], np.int64).clip(min=text.first_key)
        return cls(vectors, place, position, known, first, text, group)

    def blocks(self) -> Iterator[tuple[int, int, slice]]:
        """Yields each block of keys as (start, stop), with the queries that may see one of its keys."""
        end = int(self.known[-1]) + 1
        for start in range(int(self.first[0]), end, BLOCK_KEYS):
            stop = min(start + BLOCK_KEYS, end)
            seeing = slice(int(np.searchsorted(self.known, start)), int(np.searchsorted(self.first, stop)))
            if seeing.start < seeing.stop:
                yield start, stop, seeing

    def logits(self, key_heads: torch.Tensor, start: int, stop: int, seeing: slice) -> torch.Tensor:
        """Returns the logits (K, G, a, b) of the queries `seeing` for the keys at positions `start` to `stop`."""
        query, first_key = self.vectors[:, :, seeing], self.text.first_key
        keys = self.text.key[key_heads, start - first_key : stop - first_key].float()
        logits = torch.bmm(query.flatten(1, 2), keys.transpose(1, 2)).view(*query.shape[:3], -1)
        logits *= self.text.terms.scale
        if (cap := self.text.terms.softcap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        if self.text.bias is not None:
            logits += self._of_block(self.text.bias, start, stop, seeing)
        return logits

    def hide(self, logits: torch.Tensor, start: int, seeing: slice) -> torch.Tensor | None:
        """Hides the keys of a block that the queries `seeing` do not see, in their `logits` (K, G, a, b).

        In a layer that selects keys by their content, returns which keys they see, broadcastable to the logits.
        """
        stop = start + logits.shape[-1]
        visible = None
        partly = np.flatnonzero((self.known[seeing] < stop - 1) | (self.first[seeing] > start))
        if len(partly):
            some = slice(int(partly[0]), int(partly[-1]) + 1)  # the others see all keys of the block
            visible = self._follows_rule(start, stop, slice(seeing.start + some.start, seeing.start + some.stop))
            logits[:, :, some].masked_fill_(~visible, _HIDDEN)
        if self.text.selection is None:
            return None
        selected = is_visible(self._of_block(self.text.selection, start, stop, seeing))
        logits.masked_fill_(~selected, _HIDDEN)
        if visible is None:
            return selected
        selected = selected.expand(*selected.shape[:2], seeing.stop - seeing.start, -1).clone()
        selected[:, :, some] &= visible
        return selected

    def _follows_rule(self, start: int, stop: int, queries: slice) -> torch.Tensor:
        """Returns (queries, b): whether the layer's rule lets each query see each key of a block."""
        key = torch.arange(start, stop, device=self.position.device)
        position, rule = self.position[queries, None], self.text.terms.visible
        visible = key <= position
        if rule.window is not None:
            visible &= key > position - rule.window
        if rule.chunk is not None:
            visible &= key // rule.chunk == position // rule.chunk
        return visible

    def num_keys(self) -> torch.Tensor:
        """Returns (p,) int64: the keys that each query sees, before any selection by content."""
        rule, first = self.text.terms.visible, torch.full_like(self.position, self.text.first_key)
        if rule.window is not None:
            first = torch.maximum(first, self.position - rule.window + 1)
        if rule.chunk is not None:
            first = torch.maximum(first, self.position - self.position % rule.chunk)
        return self.position - first + 1

    def _of_block(self, values: torch.Tensor, start: int, stop: int, seeing: slice) -> torch.Tensor:
        """Returns the part of `values` (1 or H, 1 or n, m) for a block, broadcastable to (K, G, a, b)."""
        of_block = values[:, :, start - self.text.first_key : stop - self.text.first_key]
        if of_block.shape[1] > 1:
            of_block = of_block[:, self.place[seeing]]
        if len(of_block) == 1:
            return of_block[None]
        of_heads = of_block[self.group.query_heads.index(values.device)[:, 0]]
        return of_heads.view(*self.group.shape, *of_heads.shape[1:])

    def sinks(self) -> torch.Tensor | None:
        """Returns the logits (K, G, 1 or p) of the learned sinks; None without sinks."""
        if self.text.sinks is None:
            return None
        sinks = self.text.sinks[self.group.query_heads.index(self.text.sinks.device)[:, 0]]
        if sinks.shape[1] > 1:
            sinks = sinks[:, self.place]
        return sinks.float().view(*self.group.shape, -1)


def _records(queries: _Queries, table: AttentionTable, sink_tokens: int) -> torch.Tensor:
    """Returns the records (K, G, p, W) float32 of `queries` over the keys of their text."""
    shape, device = queries.vectors.shape[:3], queries.vectors.device
    key_heads = queries.group.key_heads.index(device)[:, 0]
    zeros = torch.zeros(shape, device=device)
    top, total, spread, squares, first = zeros + _HIDDEN, *(zeros.clone() for _ in range(4))
    counted = torch.zeros(shape, dtype=torch.int32, device=device)
    bins = torch.zeros(*shape, table.widths["distance_mass"], device=device)
    largest = torch.full((*shape, table.widths["top_weight"]), _HIDDEN, device=device)
    places = torch.full_like(largest, NO_KEY, dtype=torch.int32)
    for start, stop, seeing in queries.blocks():
        logits = queries.logits(key_heads, start, stop, seeing)
        selected = queries.hide(logits, start, seeing)
        found = _merge(largest[:, :, seeing], places[:, :, seeing], logits, start)
        before = top[:, :, seeing]
        above = torch.maximum(before, found)
        change = before - above
        shrunk = change.exp()
        logits -= above[..., None]  # at most 0
        weights = logits.exp()
        if selected is not None:
            counted[:, :, seeing] += selected.sum(-1, dtype=torch.int32)
            weights.masked_fill_(~selected, 0.0)  # a query that has seen no key yet has none above the hidden ones
        # The mean of the logits below the largest, for the entropy: each earlier one is further below it now.
        spread[:, :, seeing] = shrunk * (spread[:, :, seeing] + change * total[:, :, seeing])
        spread[:, :, seeing] += logits.mul_(weights).sum(-1)
        total[:, :, seeing] = total[:, :, seeing] * shrunk + weights.sum(-1)
        first[:, :, seeing] *= shrunk
        if start < sink_tokens:
            first[:, :, seeing] += weights[..., : sink_tokens - start].sum(-1)
        bins[:, :, seeing] *= shrunk[..., None]
        _add_bins(bins[:, :, seeing], weights, queries, start, stop, seeing)
        squares[:, :, seeing] = squares[:, :, seeing] * shrunk.square() + weights.square_().sum(-1)
        top[:, :, seeing] = above
    sinks = queries.sinks()
    normaliser = top + total.log()
    if sinks is not None:
        normaliser = torch.logaddexp(normaliser, sinks)
    share = (top - normaliser).exp()
    if queries.text.selection is None:
        counted += queries.num_keys()
    columns = {
        "num_keys": counted,
        "logsumexp": normaliser,
        "max_logit": top,
        "entropy": share * ((normaliser - top) * total - spread),
        "effective_keys": 1 / (share.square() * squares),
        "sink_weight": zeros if sinks is None else (sinks - normaliser).exp(),
        "first_mass": share * first,
        "distance_mass": share[..., None] * bins,
        "top_position": places,
        "top_weight": (largest - normaliser[..., None]).exp(),
    }
    records = torch.empty(*shape, table.width, device=device)
    for name, place in table.places.items():
        values = columns[name].view(torch.float32) if name in INTEGERS else columns[name]
        records[..., place] = values if table.is_list(name) else values[..., None]
    return records


def _merge(largest: torch.Tensor, places: torch.Tensor, logits: torch.Tensor, start: int) -> torch.Tensor:
    """Replaces the `largest` logits (K, G, a, k) so far, and the positions of their keys, by those with a block's.

    `logits` (K, G, a, b) are of keys from position `start` on. Of equal logits, those of earlier keys come first.
    Returns the largest logit of the block (K, G, a).
    """
    k = largest.shape[-1]
    found, at = _topk(logits, k)
    at, by_place = at.sort(dim=-1)
    found = found.gather(-1, by_place)
    at = torch.where(found > _HIDDEN / 2, at + start, NO_KEY).to(torch.int32)
    both, of_both = torch.cat([largest, found], dim=-1), torch.cat([places, at], dim=-1)
    kept, order = both.sort(dim=-1, descending=True, stable=True)
    largest.copy_(kept[..., :k])
    places.copy_(of_both.gather(-1, order[..., :k]))
    return found.amax(-1)


def _topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k largest of the `logits` (..., b), or all if they are fewer, and their places among the b.

    The largest ones are among those of the parts with the largest maxima. Finding these takes a third of the time.
    """
    parts = logits.shape[-1] // PART_KEYS
    if logits.shape[-1] % PART_KEYS or parts <= k:
        return logits.topk(min(k, logits.shape[-1]), dim=-1)
    by_part = logits.unflatten(-1, (parts, PART_KEYS))
    part = by_part.amax(-1).topk(k, dim=-1).indices
    candidates = by_part.gather(-2, part[..., None].expand(*part.shape, PART_KEYS)).flatten(-2)
    found, at = candidates.topk(k, dim=-1)
    return found, part.gather(-1, at // PART_KEYS) * PART_KEYS + at % PART_KEYS


def _add_bins(
    bins: torch.Tensor, weights: torch.Tensor, queries: _Queries, start: int, stop: int, seeing: slice
) -> None:
    """Adds the `weights` (K, G, a, b) of a block of keys to the `bins` (K, G, a, D) of their distances."""
    known = queries.known[seeing]
    low = max(0, int(known[0]) - stop + 1)
    used = range((low + 1).bit_length() - 1, (int(known[-1]) - start + 1).bit_length())
    number = torch.arange(start, stop, dtype=torch.int32, device=weights.device)
    distance = queries.position[seeing, None].to(torch.int32) - number
    edges = (2 ** torch.arange(used.start, used.stop + 1, device=weights.device) - 1).to(torch.int32)[:, None, None]
    inside = (distance >= edges[:-1]) & (distance < edges[1:])  # (bins, a, b)
    by_query = weights.flatten(0, 1).transpose(0, 1)  # (a, K G, b)
    summed = torch.bmm(by_query, inside.to(torch.float32).permute(1, 2, 0))
    summed = summed.transpose(0, 1).unflatten(0, weights.shape[:2])
    bins[..., used.start : used.stop] += summed
