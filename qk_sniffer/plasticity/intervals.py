"""Gives the mean over heads its intervals, and puts them into words.

All heads have the same replicates of the texts, so their mean has them too.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qk_sniffer.plasticity.drift import Float64
from qk_sniffer.plasticity.uncertainty import Estimate, Uncertainty, of_plasticity

ENOUGH_ROWS, ENOUGH_TEXTS = 100, 30
"""The report warns of fewer queries in a bucket, or fewer texts. `docs/plasticity.md` has the figures behind this."""

ALL, FULL, LIMITED = "all", "full", "limited"
"""Which heads a mean is over: `limited` are those with a sliding window or chunks, and `full` the others."""

_OVERALL = -1
"""Stands for all pairs of buckets, among numbers of query buckets."""


def mean_rows(
    name: str, of_layers: Iterable[tuple[int, Uncertainty]], limited_layers: Container[int]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table `name`: mean_intervals, or mean_bucket_intervals, which has each query bucket.

    `of_layers` has the layer and the uncertainty of each head.
    """
    known = [(layer in limited_layers, found) for layer, found in of_layers]
    groups = max((found.groups for _, found in known), default=0)
    for attention, wanted in ((ALL, (False, True)), (FULL, (False,)), (LIMITED, (True,))):
        of_heads: dict[int, list[tuple[Sequence[float], Sequence[float]]]] = defaultdict(list)
        for is_limited, found in known:
            if is_limited not in wanted or not np.isfinite(found.overall[0][0]):
                continue
            if name == "mean_intervals":
                of_heads[_OVERALL].append(found.overall)
            else:
                for bucket, ap, null in found.means:
                    of_heads[bucket].append((ap, null))
        for bucket, heads in sorted(of_heads.items()):
            ap, null = _mean(np.array(heads))
            for quantity, each in of_plasticity(ap, null, groups).items():
                row = {"attention": attention, "n_heads": len(heads), "quantity": quantity, "q_bucket": bucket}
                yield row | each._asdict()


def in_words(means: Mapping[str, Any]) -> Iterator[str]:
    """Yields lines of the report on the mean of all heads, from the columns of mean_intervals."""
    meanings = {
        "ap_overall": "corrected for the size of the sample",
        "ap_null": "without positional drift",
        "ap_drift": "lost to positional drift",
    }
    for quantity, meaning in meanings.items():
        found = of_all(means, quantity)
        if np.isfinite(found.se):
            yield f"  {meaning}: {found.corrected:.4f} (95 % interval over texts: {found.low:.4f} to {found.high:.4f})"


def of_all(means: Mapping[str, Any], quantity: str) -> Estimate:
    """The estimate of the mean of all heads, from the columns of mean_intervals; NaN without replicates."""
    rows = np.flatnonzero((means["attention"] == ALL) & (means["quantity"] == quantity))
    return Estimate(*(float(means[name][rows[0]]) if len(rows) else np.nan for name in Estimate._fields))


def _mean(values: Float64) -> Float64:
    """The mean over the first axis of what is finite; NaN if nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: Float64 = np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)
    return means
