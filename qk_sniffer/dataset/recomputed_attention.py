"""Computes the logits and the weights of attention from the stored queries and keys of one example.

Shapes: P stored queries, J stored keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.dataset.array_facts import span
from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.errors import StoreError

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False, repr=False)
class Logits:
    """The logits of a query head in one example, as the model's softmax receives them, up to rounding."""

    logits: Float64
    """(P, J): scaled and capped; -inf where the query does not see the key."""
    query_positions: Int32
    """(P,): ascending."""
    key_positions: Int32
    """(J,): ascending."""
    num_keys: npt.NDArray[np.int64]
    """(P,): the keys that each query sees, its own included, stored or not."""
    sink: float | None
    """The learned logit that joins the softmax of each query; None without one."""

    def __repr__(self) -> str:
        sink = "" if self.sink is None else f", a learned sink of {self.sink:.3g}"
        return f"<Logits: {_pairs(self)}{sink}>"


@dataclass(frozen=True, eq=False, repr=False)
class Attention:
    """The attention weights of a query head in one example, up to rounding."""

    weights: Float64
    """(P, J): the weights of the stored keys, in a softmax over all keys and the learned sink; 0 where the query does
    not see the key. A row sums to 1 less the weights of the sink and of keys that are not stored."""
    query_positions: Int32
    """(P,): ascending."""
    key_positions: Int32
    """(J,): ascending."""
    logsumexp: Float64
    """(P,): the natural logarithm of the sum of exp(logit) over all keys that the query sees and the sink."""

    def __repr__(self) -> str:
        return f"<Attention: {_pairs(self)}>"


def unknown_logits(layer: Mapping[str, Any], *, pre_rope: bool) -> str | None:
    """Returns why the logits of a layer of the manifest do not follow from its stored vectors; None if they do."""
    if pre_rope:
        return "its vectors are from before RoPE: capture with capture.capture_pre_rope=false"
    if layer.get("position_bias"):
        return "a bias is added to its logits, which is not stored"
    if layer.get("sparse_attention"):
        return "its queries see only some of the keys before them, and the selection is not stored"
    if not (layer.get("full_attention") or layer["sliding_window"] or layer.get("attention_chunk")):
        return "it is not known which keys its queries see"
    return None


def logits_of(
    layer: Mapping[str, Any],
    head: int,
    queries: tuple[npt.NDArray[np.float32], Int32],
    keys: tuple[npt.NDArray[np.float32], Int32],
) -> Logits:
    """Returns the logits of query head `head` of a layer of the manifest.

    `queries` are (P, d) with their positions (P,), `keys` (J, d) with theirs (J,), all of one example.
    """
    (query, query_positions), (key, key_positions) = queries, keys
    logits = layer["softmax_scale"] * (query.astype(np.float64) @ key.astype(np.float64).T)
    if (softcap := layer.get("softcap")) is not None:
        logits = softcap * np.tanh(logits / softcap)
    first = _first_seen(layer, query_positions)
    is_seen = (key_positions <= query_positions[:, None]) & (key_positions >= first[:, None])
    sinks = layer.get("sinks")
    return Logits(
        np.where(is_seen, logits, -np.inf),
        query_positions,
        key_positions,
        num_keys=query_positions - first + 1,
        sink=None if sinks is None else float(sinks[head]),
    )


def attention_of(found: Logits, summary: AttentionSummary | None) -> Attention:
    """Returns the weights of the logits of an example. `summary` is that of their queries, if there is one.

    Raises:
        StoreError: keys are missing, and there is no summary, or one of other queries.
    """
    missing, pairs = int((found.num_keys - (found.logits != -np.inf).sum(axis=1)).sum()), int(found.num_keys.sum())
    if not missing:
        total = _logsumexp(found)
    elif summary is None:
        raise StoreError(
            f"the attention is not known: {missing:,} of the {pairs:,} pairs of a stored query and a key that it sees "
            "lack the key. Capture all keys (sampler.keys.type=all), or summaries (capture.attention.enabled=true)"
        )
    else:
        if not np.array_equal(summary.positions, found.query_positions):
            raise StoreError(
                "the attention summaries have other rows than the queries: fetch the dataset again, or recreate it "
                "with output.overwrite=true"
            )
        total = summary.logsumexp.astype(np.float64)
    weights = np.exp(found.logits - total[:, None])
    return Attention(weights, found.query_positions, found.key_positions, total)


def _first_seen(layer: Mapping[str, Any], positions: Int32) -> npt.NDArray[np.int64]:
    """Returns the first position that each query sees."""
    at = positions.astype(np.int64)
    first = np.zeros_like(at)
    if (window := layer["sliding_window"]) is not None:
        first = np.maximum(first, at - window + 1)
    if (chunk := layer.get("attention_chunk")) is not None:
        first = np.maximum(first, at - at % chunk)
    return first


def _logsumexp(found: Logits) -> Float64:
    sinks = np.full((len(found.logits), 1), -np.inf if found.sink is None else found.sink)
    logits = np.concatenate([found.logits, sinks], axis=1)
    top = logits.max(axis=1)
    total: Float64 = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return total


def _pairs(found: Logits | Attention) -> str:
    queries = f"{len(found.query_positions):,} stored queries{span(found.query_positions)}"
    return f"{queries}, x {len(found.key_positions):,} stored keys{span(found.key_positions)}"
