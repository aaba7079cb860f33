"""Collects the maps of the heads and what the page shows of each head, in one pass over their files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qk_sniffer.dataset.head_scores import RANKED
from qk_sniffer.dataset.heads import captured_heads
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.machine import workers
from qk_sniffer.report.attention import Maps, Summaries
from qk_sniffer.report.packed import Json, grid, number, numbers, points, shares
from qk_sniffer.report.unchanged import Unchanged
from qk_sniffer.report.vectors import HeadMeasure, Sample, measured, num_bins
from qk_sniffer.store.layout import KIND_NAMES, KINDS, Head, HeadKey

WORKERS = 2
"""The heads that are read and measured at the same time: both leave Python's lock most of the time."""

POINT_BYTES = 1_600_000
"""The bytes of the points of all heads together. A point takes 8, or 11 in base64."""

MOST_POINTS, LEAST_POINTS = 256, 24

MOST_CELLS = 1 << 16
"""The most cells of a grid of layers and channels."""

LISTED_OUTLIERS = 24
"""The heads in the list of outlier channels."""


@dataclass(frozen=True)
class Score:
    """A number that a map of heads shows. `share` says that it is one from 0 to 1."""

    name: str
    label: str
    meaning: str
    is_share: bool = False


OF_VECTORS = (
    Score("norm", "norm", "mean Euclidean norm of the vectors"),
    Score("norm_spread", "norm: spread", "standard deviation of the norms over their mean"),
    Score("outlier_ratio", "outlier channel", "root mean square of the largest channel over that of the median one"),
    Score(
        "position_share",
        "position",
        "share of the variance that a line over log2(position + 1) explains, of at most 512 vectors",
        True,
    ),
    Score(
        "direction_share",
        "two directions",
        "share of the variance along two principal directions, of at most 512 vectors",
        True,
    ),
)

OF_ATTENTION = (
    *(Score(name, name.replace("_", " "), meaning, True) for name, meaning in RANKED.items()),
    Score("learned_sink", "learned sink", "weight of the learned sink", True),
    Score("entropy", "entropy", "entropy of the attention weights, in nats"),
    Score("effective_keys", "effective keys", "1 over the sum of the squared attention weights"),
)


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of a dataset, measured."""

    measures: Mapping[HeadKey, HeadMeasure]
    attention: Mapping[HeadKey, Mapping[str, float]]
    """Scores of the query heads; empty without attention summaries."""
    details: Mapping[HeadKey, Json]
    example: int | None
    """The example of the attention maps."""
    has_maps: bool
    bins: int
    """The bins of positions."""

    def maps(self) -> Iterator[Json]:
        """Yields the maps of layers and heads: a value for each head of the kind, in the order of the heads."""
        for kind in KINDS:
            keys = [key for key in self.measures if key.kind == kind]
            if not keys:
                continue
            for score in OF_VECTORS:
                values = [_value(self.measures[key], score.name) for key in keys]
                yield map_of(kind, score, "vectors", values)
        queries = [key for key in self.measures if key.kind == "q"]
        if self.attention:
            for score in OF_ATTENTION:
                values = [self.attention[key][score.name] for key in queries]
                if score.name != "learned_sink" or any(values):
                    yield map_of("q", score, "attention", values)


def map_of(kind: str, score: Score, group: str, values: Sequence[float]) -> Json:
    """Returns a map of layers and heads."""
    return {
        "kind": kind,
        "name": score.name,
        "label": score.label,
        "meaning": score.meaning,
        "share": score.is_share,
        "group": group,
        "values": numbers(values),
    }


def measured_heads(dataset: Dataset, unchanged: Unchanged) -> Heads:
    """Measures all heads, layer by layer. Reads each file once.

    Raises:
        StoreError: a file is missing, damaged or of another dataset, or was replaced or written meanwhile.
        HubError: a file cannot be fetched.
    """
    sample, maps = Sample(dataset, unchanged), Maps(dataset)
    heads = {head.key: head for head in captured_heads(dataset.manifest)}
    bins = num_bins(dataset.manifest["longest_example"])
    most = int(np.clip(POINT_BYTES / 11 / len(heads), LEAST_POINTS, MOST_POINTS))
    has_summaries = bool(dataset.manifest["config"]["capture"]["attention"]["enabled"])
    summaries = Summaries(dataset, sample.examples("q", 8192)) if has_summaries else None
    dataset.fetch([*heads])
    measures: dict[HeadKey, HeadMeasure] = {}
    attention: dict[HeadKey, Mapping[str, float]] = {}
    details: dict[HeadKey, Json] = {}

    def measure(layer: Sequence[Head]) -> list[tuple[HeadKey, HeadMeasure, Json]]:
        """Measures the heads of a layer that share a key head, its own rows first."""
        read = {}
        found = []
        for head in sorted(layer, key=lambda head: (head.kind != "k", head.key.order)):
            rows = sample.vectors(head.key, head.head_dim)
            if head.kind == "k":
                read[head.head] = rows
            one = measured(head.key, rows, bins, most)
            detail = _detail(one)
            if head.kind == "q" and head.key_head in read:
                drawn = maps.of(head.key, rows, read[head.key_head])
                detail |= {} if drawn is None else {"attention": drawn}
            if head.kind == "q" and summaries is not None:
                scores, summary = summaries.of(head.key)
                attention[head.key] = scores
                detail |= summary
            found.append((head.key, one, detail))
        return found

    groups: dict[tuple[int, int], list[Head]] = {}
    for head in heads.values():
        groups.setdefault((head.layer, head.key_head), []).append(head)
    with workers(WORKERS) as pool:
        for found in pool.map(measure, groups.values()):
            for key, one, detail in found:
                measures[key], details[key] = one, detail
    ordered = sorted(measures, key=lambda key: key.order)
    return Heads(
        {key: measures[key] for key in ordered},
        attention,
        details,
        maps.example,
        any("attention" in detail for detail in details.values()),
        bins,
    )


def by_layer(heads: Heads) -> Iterator[Json]:
    """Yields for each kind its layers, and their norms by position: the mean over heads, row by row of layers."""
    for kind in KINDS:
        layers = _of_layers(heads, kind)
        if layers:
            tables = [np.stack([one.by_position for one in of_layer]) for of_layer in layers.values()]
            yield {
                "kind": kind,
                "name": KIND_NAMES[kind],
                "layers": [*layers],
                "heads": [numbers(one.norm for one in of_layer) for of_layer in layers.values()],
                "by_position": grid(_weighted(table) for table in tables),
            }


def outliers(heads: Heads) -> list[Json]:
    """Returns the heads with the largest `outlier_ratio`, largest first, each with its largest channel."""
    known = [one for one in heads.measures.values() if np.isfinite(one.outlier_ratio)]
    known.sort(key=lambda one: (-one.outlier_ratio, one.key.order))
    return [
        {
            "head": one.key.name,
            "channel": int(one.rms.argmax()),
            "ratio": number(one.outlier_ratio),
            "rms": number(float(one.rms.max())),
            "largest": number(float(one.largest[one.rms.argmax()])),
        }
        for one in known[:LISTED_OUTLIERS]
    ]


def channels(heads: Heads) -> Iterator[Json]:
    """Yields for each kind a grid of layers and channels: the largest absolute value in the rows of all heads."""
    for kind in KINDS:
        layers = _of_layers(heads, kind)
        widest = max((len(one.largest) for of_layer in layers.values() for one in of_layer), default=0)
        if layers and len(layers) * widest <= MOST_CELLS:
            rows = [np.fmax.reduce([one.largest for one in of_layer]) for of_layer in layers.values()]
            yield {"kind": kind, "name": KIND_NAMES[kind], "layers": [*layers], "values": grid(rows)}


def _of_layers(heads: Heads, kind: str) -> dict[int, list[HeadMeasure]]:
    """Returns the heads of a kind by layer."""
    layers: dict[int, list[HeadMeasure]] = {}
    for key, one in heads.measures.items():
        if key.kind == kind:
            layers.setdefault(key.layer, []).append(one)
    return layers


def _value(one: HeadMeasure, name: str) -> float:
    if name == "norm_spread":
        return one.norm_deviation / one.norm if one.norm > 0 else float("nan")
    if name == "direction_share":
        return sum(one.direction_shares)
    value: float = getattr(one, name)
    return value


def _detail(one: HeadMeasure) -> Json:
    if not one.rows:
        return {"rows": 0}
    top = float(one.rms.max()) or 1.0
    return {
        "rows": one.rows,
        "by_position": [numbers(one.by_position[:, column]) for column in range(3)],
        "rms": {"scale": number(top), "shares": shares(one.rms / top)},
        "directions": numbers(one.direction_shares),
        "points": points(one.places, one.positions),
    }


def _weighted(table: Any) -> Any:
    """Returns the mean norm in each bin over the heads of a layer: (B,) of (heads, B, 3), weighted by their rows."""
    counts, means = table[..., 0], np.nan_to_num(table[..., 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (counts * means).sum(axis=0) / counts.sum(axis=0)
