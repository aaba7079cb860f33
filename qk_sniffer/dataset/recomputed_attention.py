"""Computes the logits and the weights of attention from the stored queries and keys of one example.

Shapes: P stored queries, J stored keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import from_dict
from qk_sniffer.errors import StoreError

if TYPE_CHECKING:
    from qk_sniffer.dataset.reader import Dataset

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Logits:
    """The logits of a query head in one example, as the model's softmax receives them, up to rounding."""

    logits: Float64
    """(P, J): scaled and capped; -inf where the query does not see the key."""
    query_positions: Int32
    """(P,): ascending."""
    key_positions: Int32
    """(J,): ascending."""
    sink: float | None
    """The learned logit that joins the softmax of each query; None without one."""


@dataclass(frozen=True, eq=False)
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


def logits(dataset: "Dataset", layer: int, head: int, example_id: int) -> Logits:
    """Returns the logits of query head `head`, as `Dataset.logits`."""
    key_head = dataset.key_head(layer, head)
    described = _layer(dataset, layer)
    if (reason := _unknown(dataset, described)) is not None:
        raise StoreError(f"{dataset}: the logits of layer {layer} cannot be computed: {reason}")
    if example_id not in dataset.examples["example_id"].to_numpy():
        raise StoreError(f"{dataset} has no example {example_id} (`.examples`)")
    (queries, query_positions), (keys, key_positions) = (
        (rows.vectors[rows.example_ids == example_id], rows.positions[rows.example_ids == example_id])
        for rows in (dataset.vectors(layer, head, "q"), dataset.vectors(layer, key_head, "k"))
    )
    found = described["softmax_scale"] * (queries.astype(np.float64) @ keys.astype(np.float64).T)
    if (softcap := described.get("softcap")) is not None:
        found = softcap * np.tanh(found / softcap)
    first = _first_seen(described, query_positions)
    is_seen = (key_positions <= query_positions[:, None]) & (key_positions >= first[:, None])
    sink = None if described.get("sinks") is None else float(described["sinks"][head])
    return Logits(np.where(is_seen, found, -np.inf), query_positions, key_positions, sink)


def attention(dataset: "Dataset", layer: int, head: int, example_id: int) -> Attention:
    """Returns the attention weights of query head `head`, as `Dataset.attention`."""
    found = logits(dataset, layer, head, example_id)
    seen = int((found.logits != -np.inf).sum())
    pairs = int((found.query_positions - _first_seen(_layer(dataset, layer), found.query_positions) + 1).sum())
    if seen == pairs:
        total = _logsumexp(found)
    elif not from_dict(dataset.manifest["config"]).capture.attention.enabled:
        raise StoreError(
            f"{dataset}: the attention of layer {layer}, head {head} in example {example_id} is not known: "
            f"{pairs - seen:,} of the {pairs:,} pairs of a stored query and a key that it sees lack the key. Capture "
            "all keys (sampler.keys.type=all), or summaries (capture.attention.enabled=true)"
        )
    else:
        summary = dataset.attention_summary(layer, head)
        mine = summary.example_ids == example_id
        if not np.array_equal(summary.positions[mine], found.query_positions):
            raise StoreError(
                f"{dataset}: the attention summaries of layer {layer}, head {head} have other rows than its queries: "
                "fetch the dataset again, or recreate it with output.overwrite=true"
            )
        total = summary.logsumexp[mine].astype(np.float64)
    weights = np.exp(found.logits - total[:, None])
    return Attention(weights, found.query_positions, found.key_positions, total)


def _layer(dataset: "Dataset", layer: int) -> Mapping[str, Any]:
    """Returns the manifest's description of a layer that it has."""
    layers: list[dict[str, Any]] = dataset.manifest["model"]["layers"]
    return next(one for one in layers if one["layer"] == layer)


def _unknown(dataset: "Dataset", layer: Mapping[str, Any]) -> str | None:
    """Returns why the logits of a layer do not follow from its stored vectors; None if they do."""
    if from_dict(dataset.manifest["config"]).capture.capture_pre_rope:
        return "its vectors are from before RoPE: capture with capture.capture_pre_rope=false"
    if layer.get("position_bias"):
        return "a bias is added to its logits, which is not stored"
    if layer.get("sparse_attention"):
        return "its queries see only some of the keys before them, and the selection is not stored"
    if not (layer.get("full_attention") or layer["sliding_window"] or layer.get("attention_chunk")):
        return "it is not known which keys its queries see"
    return None


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
