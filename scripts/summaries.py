"""Compares the attention summaries that a job makes with the attention weights of eager kernels, for `examine.py`."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from recording import KernelCall, recorded

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture import attention_summary
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.gather import TokenIndices, send
from qk_sniffer.capture.sampling import Picks
from qk_sniffer.config import from_dict
from qk_sniffer.errors import CaptureError
from qk_sniffer.store.attention_table import INTEGERS, AttentionTable

Float64 = npt.NDArray[np.float64]

TOP_K, SINK_TOKENS = 5, 3
TOLERANCE = 1e-3
MOST_SLOTS = 64
"""The most slots of passes with a cache, whose summaries have the same columns in all passes."""

TINY = 1e-12
"""Weights below this are not told apart from those of hidden keys."""


@dataclass(frozen=True)
class Summaries:
    """The columns of the summaries of all queries of a text, by name: each (H, n) or (H, n, numbers)."""

    table: AttentionTable
    columns: dict[str, Float64]


def wrong_summaries(backbone: Backbone, facts: Sequence[LayerFacts], ids: torch.Tensor) -> list[str]:
    """Returns the columns that differ from those of eager attention weights, with their layers; empty if none do.

    The summaries are those of the decoder's own kernel and of the eager one, from small blocks of keys.
    """
    decoder: Any = backbone.decoder
    kernel = decoder.config._attn_implementation
    small = patch.multiple(attention_summary, BLOCK_KEYS=7, PART_KEYS=1, BLOCK_LOGITS={"cpu": 7 * 4 * 5})
    with small, torch.inference_mode():
        found = [_summaries(backbone, ids)]
        decoder.set_attn_implementation("eager")
        try:
            calls, _ = recorded(decoder, ids)
            with suppress(CaptureError):  # a family may serve the decoder's own kernel alone
                found.append(_summaries(backbone, ids))
        finally:
            decoder.set_attn_implementation(kernel)
    return [
        f"layer {fact.heads.layer}: {column}"
        for fact, call in zip(facts, calls, strict=True)
        for by_layer in found
        for row, summary in enumerate(by_layer[fact.heads.layer])
        for column in differences(summary, *(values[row] for values in weights_and_logits(fact, call)))
    ]


def summarized(
    call: AttentionCall, row: int, heads: Sequence[int] | None = None, places: npt.NDArray[np.int64] | None = None
) -> Summaries:
    """Returns the summaries that a job makes of the queries of a row of the batch.

    `heads` None: of all. `places` are those of the queries among the n of the call; None: all of them.
    """
    heads = range(call.query.shape[1]) if heads is None else heads
    places = np.arange(call.query.shape[2]) if places is None else places
    table = table_of(call.query.shape[2] if call.slots is None else MOST_SLOTS)
    summarizer = Summarizer(table, SINK_TOKENS, {call.layer: heads})
    picks = Picks(np.full(len(places), row, np.int32), places.astype(np.int32))
    out = torch.empty(len(heads), len(places), table.width)
    summarizer.write(call, send({"q": TokenIndices.of(picks, out.device)}, out.device)["q"], out)
    columns: dict[str, Float64] = {}
    for name, place in table.places.items():
        values = out[..., place].contiguous()
        columns[name] = (values.view(torch.int32) if name in INTEGERS else values).double().numpy()
        if not table.is_list(name):
            columns[name] = columns[name][..., 0]
    return Summaries(table, columns)


def differences(found: Summaries, weights: Float64, logits: Float64 | None = None) -> Iterator[str]:
    """Yields the columns of `found` that differ from those of `weights` (H, n, n).

    `logits` are (H, n, n), of hidden keys too. Without them, the logits are known but for a term that those of a query
    share.
    """
    expected = {name: np.zeros_like(values) for name, values in found.columns.items()}
    for head, of_head in enumerate(weights):
        for query, row in enumerate(of_head):
            for name, value in _of_row(row[: query + 1], found.table).items():
                expected[name][head, query] = value
    largest = expected["logsumexp"]  # the logarithm of the largest weight
    if logits is None:
        expected["max_logit"] = found.columns["logsumexp"] + largest
    else:
        expected["max_logit"] = np.where(weights > TINY, logits, -np.inf).max(axis=-1)
    expected["logsumexp"] = expected["max_logit"] - largest
    for name, values in found.columns.items():
        if name == "top_position":
            of_listed = np.take_along_axis(weights, np.maximum(values, 0).astype(np.int64), axis=-1)
            values, expected[name] = np.where(values < 0, 0.0, of_listed), expected["top_weight"]
        if name == "num_keys":
            is_wrong = values < expected[name]  # weights of visible keys may be too small to tell
        else:
            is_wrong = ~np.isclose(values, expected[name], rtol=TOLERANCE, atol=TOLERANCE)
        if is_wrong.any():
            yield f"{name} differs by {np.abs(values - expected[name])[is_wrong].max():.2g}"


def _summaries(backbone: Backbone, ids: torch.Tensor) -> dict[int, list[Summaries]]:
    """Returns the summaries of each text by layer."""
    found: dict[int, list[Summaries]] = {}

    def summarize(call: AttentionCall) -> None:
        found[call.layer] = [summarized(call, row) for row in range(len(ids))]

    backbone.forward(ids, summarize)
    return found


def weights_and_logits(fact: LayerFacts, call: KernelCall) -> tuple[Any, Any]:
    """Returns weights and logits (B, H, n, m) of m keys; a stack of None for the logits of a layer with a bias."""
    heads, n, m = *call.query.shape[1:3], call.key.shape[2]
    key = call.key.repeat_interleave(heads // call.key.shape[1], dim=1)
    logits = (call.query.double() @ key.double().mT) * fact.softmax_scale
    if fact.softcap is not None:
        logits = fact.softcap * torch.tanh(logits / fact.softcap)
    if call.weights is None:
        hidden = ~torch.ones(n, m, dtype=torch.bool).tril(m - n)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    else:
        weights = call.weights.double().view(-1, heads, n, call.weights.shape[-1])[..., :m]
    sums = weights.sum(-1)
    if fact.sinks is not None and bool((sums > 1 - TOLERANCE).all()):
        # This kernel scales its output by the sinks, and not the weights that it returns.
        normaliser = logits.masked_fill(weights == 0, -torch.inf).logsumexp(-1)
        sinks = torch.tensor(fact.sinks, dtype=torch.float64)[:, None]
        weights = weights * (normaliser - sinks).sigmoid()[..., None]
    return weights.numpy(), [None] * len(weights) if fact.position_bias else logits.numpy()


def _of_row(row: Float64, table: AttentionTable) -> dict[str, Float64 | float]:
    """Returns the columns of one query from its weights, in the order of the keys' positions."""
    seen = row[row > TINY]
    distance = np.arange(len(row) - 1, -1, -1)
    bins = np.floor(np.log2(distance + 1)).astype(np.int64)
    largest = np.zeros(TOP_K)
    largest[: len(row)] = np.sort(row)[::-1][:TOP_K]
    return {
        "num_keys": len(seen),
        "logsumexp": float(np.log(row.max())),
        "entropy": float(-(seen * np.log(seen)).sum()),
        "effective_keys": float(1 / (row**2).sum()),
        "sink_weight": float(1 - row.sum()),
        "first_mass": float(row[:SINK_TOKENS].sum()),
        "distance_mass": np.bincount(bins, row, table.widths["distance_mass"]).astype(np.float64),
        "top_weight": largest,
    }


def table_of(max_length: int) -> AttentionTable:
    """Returns the columns of summaries of texts of that many tokens."""
    settings = {"enabled": True, "top_k": TOP_K, "sink_tokens": SINK_TOKENS}
    table = AttentionTable.of(
        from_dict({"capture": {"attention": settings}, "model": {"tokenizer": {"max_length": max_length}}})
    )
    assert table is not None
    return table
