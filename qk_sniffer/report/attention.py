"""Summarizes where heads attend to: scores and distances from the attention summaries, and maps of dense heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.dataset.head_scores import ranges_of, scores_of
from qk_sniffer.dataset.head_vectors import HeadVectors
from qk_sniffer.dataset.reader import Dataset, sampler_of
from qk_sniffer.dataset.recomputed_attention import attention_of, logits_of, unknown_logits
from qk_sniffer.errors import StoreError
from qk_sniffer.report.packed import Json, numbers, shares
from qk_sniffer.store.layout import ATTENTION, HeadKey, head_file

MOST_SUMMARIES = 65_536
"""The most rows of attention summaries that are read of a head."""

MAP_BYTES = 1 << 20
"""The bytes of all attention maps together."""

MAP_SIDES = (128, 96, 64)
"""The numbers of positions that a map may show, the largest first."""


DENSE = 0.25
"""The share of the queries of a map that must be stored."""


class Summaries:
    """Reads the attention summaries of the query heads of a dataset."""

    def __init__(self, dataset: Dataset, examples: Sequence[int]) -> None:
        """`examples` are read of a head with more than `MOST_SUMMARIES` rows."""
        self._dataset = dataset
        self._examples = examples
        self._ranges = ranges_of(dataset)

    def of(self, key: HeadKey) -> tuple[dict[str, float], Json]:
        """Returns the scores of a query head, and what the page shows of it.

        Raises:
            StoreError: the file is missing or damaged.
            HubError: the file cannot be fetched.
        """
        rows = self._dataset.manifest["files"][head_file(key.layer, key.head, ATTENTION)].get("rows", 0)
        only: Any = {} if rows <= MOST_SUMMARIES else {"example_id": self._examples}
        summary = self._dataset.attention_summary(key.layer, key.head, **only)
        scores = scores_of(summary, self._ranges)
        return scores, {"distance": numbers(_by_distance(summary, self._ranges.first_position))}


class Maps:
    """Computes the attention of one example from the sampled rows of heads whose keys are all stored."""

    def __init__(self, dataset: Dataset) -> None:
        self._layers = {layer["layer"]: layer for layer in dataset.manifest["model"]["layers"]}
        self._pre_rope = bool(dataset.manifest["config"]["capture"]["capture_pre_rope"])
        queries = [key for key in dataset.heads if key.kind == "q"]
        sides = [side for side in MAP_SIDES if len(queries) * side**2 <= MAP_BYTES]
        self.side = sides[0] if sides else MAP_SIDES[-1]
        """The positions that a map shows, from 0."""
        step = max(1.0, len(queries) * self.side**2 / MAP_BYTES)
        chosen = range(int(len(queries) / step))
        self.heads = {queries[int(place * step)] for place in chosen} if _has_all_keys(dataset) else set()
        """The query heads that get a map: all, or some that are spread over all."""
        lengths, ids = (dataset.examples[name].to_numpy() for name in ("num_tokens", "example_id"))
        self.example = int(ids[0]) if len(ids) else None
        self._tokens = int(min(self.side, lengths[0])) if len(ids) else 0

    def of(self, key: HeadKey, queries: HeadVectors, keys: HeadVectors) -> Json | None:
        """Returns the map of a query head; None if its weights are not known.

        `weights` has a row for each of `positions` of the queries, and a column for each position below `tokens`.
        """
        layer = self._layers[key.layer]
        if key not in self.heads or unknown_logits(layer, pre_rope=self._pre_rope) is not None:
            return None
        some_queries, some_keys = (self._first(rows) for rows in (queries, keys))
        if len(some_queries[1]) < DENSE * self._tokens or len(some_keys[1]) != self._tokens:
            return None
        try:
            found = attention_of(logits_of(layer, key.head, some_queries, some_keys), None)
        except StoreError:  # keys are missing
            return None
        if not np.isfinite(found.weights).all():
            return None
        return {
            "tokens": self._tokens,
            "positions": found.query_positions.tolist(),
            "weights": shares(found.weights),
        }

    def _first(self, rows: HeadVectors) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        chosen = (rows.example_ids == self.example) & (rows.positions < self.side)
        return rows.vectors[chosen], rows.positions[chosen]


def _has_all_keys(dataset: Dataset) -> bool:
    sampler = sampler_of(dataset.manifest)
    config, longest = sampler.config, dataset.manifest["longest_example"]
    is_whole = config.max_rows_per_example is None and config.segments is None
    return is_whole and all(p == 1 for p in sampler.inclusion("k", longest).values())


def _by_distance(summary: AttentionSummary, first: int) -> npt.NDArray[np.float64]:
    """Returns the mean weight of the keys in each bin of distances, of queries at positions from `first` on."""
    mass = summary.distance_mass[summary.positions >= first].astype(np.float64)
    mass = mass[np.isfinite(mass).all(axis=1)]
    return mass.mean(axis=0) if len(mass) else np.full(summary.distance_mass.shape[1], np.nan)
