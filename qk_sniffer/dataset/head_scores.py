"""Scores query heads by where their attention goes, from the attention summaries of a dataset.

A score is the mean over the rows of a head at positions from `Ranges.first_position` on, where each kind of key is far
enough from the others. The rows of an example are not independent, so the standard error takes each example as one
draw: it is sqrt(g / (g - 1) * sum over examples of (sum of (x - mean) over its rows)²) / rows, with g examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import ConfigError, StoreError

Float64 = npt.NDArray[np.float64]

RANKED = {
    "sink": "weight of the first tokens",
    "local": "weight of close keys",
    "long_range": "weight of distant keys, without the first tokens",
    "previous": "weight of the token before",
}
"""The scores that heads are ranked by, with their names for people."""

SCORES = (*RANKED, "learned_sink", "entropy", "effective_keys")


@dataclass(frozen=True)
class Ranges:
    """The distances that count as close and as distant. Distances are those of the bins of the summaries: 2**b - 1."""

    local_distance: int
    """A key is close if its distance is below this."""
    far_distance: int
    """A key is distant if its distance is at least this."""
    sink_tokens: int
    """The first tokens of an example, which `first_mass` sums."""

    @property
    def first_position(self) -> int:
        """The first position of a query all of whose first tokens are distant."""
        return self.far_distance + self.sink_tokens - 1

    def check(self) -> None:
        """Checks the distances.

        Raises:
            ConfigError: the summaries have no bins of these distances, or close keys are distant.
        """
        lines = [
            f"{name} is {value}, and the summaries have bins from the distances 1, 3, 7, 15, 31, ... on: set it to "
            f"{2 ** max(1, (value + 1).bit_length() - 1) - 1}"
            for name, value in (("local_distance", self.local_distance), ("far_distance", self.far_distance))
            if value < 1 or (value + 1).bit_count() != 1
        ]
        if not lines and self.local_distance > self.far_distance:
            lines = [f"local_distance is {self.local_distance}, above far_distance, {self.far_distance}"]
        if lines:
            raise ConfigError(lines)


def ranges_of(dataset: Dataset) -> Ranges:
    """Returns the distances of close and distant keys for a picture of a dataset: below 63, and 511 and more.

    In short texts they are smaller, so that queries in half of the longest text count.

    Raises:
        StoreError: the dataset has no attention summaries.
    """
    sink_tokens, longest = dataset.attention_settings.sink_tokens, dataset.manifest["longest_example"]
    far = min(511, 2 ** max(2, (longest // 2).bit_length() - 1) - 1)
    return Ranges(min(63, max(1, (far + 1) // 8 - 1)), far, sink_tokens)


class NoRowsError(StoreError):
    """No row of a dataset counts in the scores of its heads."""


def head_scores(dataset: Dataset, ranges: Ranges) -> pa.Table:
    """Returns a row for each captured query head, by layer and head.

    Columns: layer, head, key_head, sliding_window (null on full attention), rows and examples that count; each of
    `SCORES` and its standard error (`sink`, `sink_error`, ...); and the rank of each of `RANKED` among all heads, 1 for
    the largest (`sink_rank`, ...). Rows with NaN or Inf do not count. The scores of a head without rows, and standard
    errors of fewer than two examples, are NaN.

    Raises:
        ConfigError: as `Ranges.check`.
        NoRowsError: no row counts.
        StoreError: the dataset has no attention summaries, or a file is damaged.
        HubError: a file cannot be fetched.
    """
    ranges.check()
    windows = {layer["layer"]: layer["sliding_window"] for layer in dataset.manifest["model"]["layers"]}
    rows = []
    for layer, head, _ in (key for key in dataset.heads if key.kind == "q"):
        summary = dataset.attention_summary(layer, head)
        of_head = {
            "layer": layer,
            "head": head,
            "key_head": dataset.key_head(layer, head),
            "sliding_window": windows[layer],
        }
        rows.append(of_head | scores_of(summary, ranges))
    if not any(row["rows"] for row in rows):
        raise NoRowsError(
            f"{dataset} has no query at a position from {ranges.first_position:,} on: lower far_distance, and "
            "local_distance with it, or capture longer texts"
        )
    for score in RANKED:
        values = np.array([row[score] for row in rows])
        order = np.lexsort((np.arange(len(rows)), -np.nan_to_num(values, nan=-np.inf)))
        for rank, place in enumerate(order.tolist(), start=1):
            rows[place][f"{score}_rank"] = rank
    return pa.Table.from_pylist(rows, schema=_schema())


def scores_of(summary: AttentionSummary, ranges: Ranges) -> dict[str, float]:
    """Returns `rows` and `examples` that count, and each of `SCORES` with its standard error, as `head_scores` does."""
    values = np.column_stack([*_values(summary, ranges)]).astype(np.float64)
    counts = (summary.positions >= ranges.first_position) & np.isfinite(values).all(axis=1)
    means, errors, examples = _means(values[counts], summary.example_ids[counts])
    found: dict[str, float] = {"rows": int(counts.sum()), "examples": examples}
    for name, mean, error in zip(SCORES, means.tolist(), errors.tolist(), strict=True):
        found |= {name: mean, f"{name}_error": error}
    return found


def _values(summary: AttentionSummary, ranges: Ranges) -> Iterator[npt.NDArray[np.float32]]:
    """Yields the values (rows,) of each of `SCORES`."""
    starts = summary.bin_edges[:-1]
    is_before = summary.top_position == summary.positions[:, None] - 1
    yield summary.first_mass
    yield summary.distance_mass[:, starts < ranges.local_distance].sum(axis=1)
    distant = summary.distance_mass[:, starts >= ranges.far_distance].sum(axis=1)
    yield np.maximum(distant - summary.first_mass, 0)
    yield np.where(is_before, summary.top_weight, 0).sum(axis=1)
    yield summary.sink_weight
    yield summary.entropy
    yield summary.effective_keys


def _means(values: Float64, example_ids: npt.NDArray[np.int32]) -> tuple[Float64, Float64, int]:
    """Returns the mean and the standard error of each column of `values` (rows, scores), and the examples."""
    absent = np.full(values.shape[1], np.nan)
    if not len(values):
        return absent, absent, 0
    means = values.mean(axis=0)
    _, example = np.unique(example_ids, return_inverse=True)
    groups = int(example.max()) + 1
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, example, values - means)
    if groups == 1:
        return means, absent, 1
    return means, np.sqrt(groups / (groups - 1) * (sums**2).sum(axis=0)) / len(values), groups


def _schema() -> pa.Schema:
    integers = [pa.field(name, pa.int32(), nullable=False) for name in ("layer", "head", "key_head")]
    integers += [pa.field("sliding_window", pa.int32())]
    integers += [pa.field(name, pa.int64(), nullable=False) for name in ("rows", "examples")]
    scores = [pa.field(f"{name}{end}", pa.float64(), nullable=False) for name in SCORES for end in ("", "_error")]
    ranks = [pa.field(f"{name}_rank", pa.int32(), nullable=False) for name in RANKED]
    return pa.schema(integers + scores + ranks)
