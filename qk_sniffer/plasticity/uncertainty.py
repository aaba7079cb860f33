"""Gives the numbers of a head their uncertainty: bias, standard error and interval, from replicates of the dataset.

A value T of the sample has replicates T*. Then bias = mean(T*) - T, se is the standard deviation of T*, and the 95 %
interval is T - bias -+ 1.96 se (the normal interval of Davison and Hinkley, "Bootstrap Methods and their Application",
1997, equation 5.5). The quantiles of T* are no interval here: plasticity falls with every error of the mean query, so
that T lies below the plasticity of the texts' population, and T* below T by the same again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from qk_sniffer.plasticity.drift import Float64, Int64
from qk_sniffer.plasticity.resampling import Clusters, Replicates, spreads

_NORMAL = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""

_BLOCK_PAIRS = 4096
_DIGITS = 6
"""Significant digits of what is stored: fewer than the last ones, which depend on the processor."""

_SMALLEST_VARIANCE = 1e-300
"""Stands for a variance of 0, with which the sign of the mean decides, and 0 is open: see `standardised`."""

UNIT_RANGE = (0.0, 1.0)
_ANY, _POSITIVE = (-np.inf, np.inf), (0.0, np.inf)
_LIMITS = {
    "q_R2_pos": UNIT_RANGE,
    "q_R2_scalar": UNIT_RANGE,
    "q_beta_norm": _POSITIVE,
    "q_mae_baseline": _POSITIVE,
    "q_mae_proj": _POSITIVE,
    "q_mae_ratio": _POSITIVE,
    "q_resid0_kurt": (-2.0, np.inf),
}
"""The least and the largest number that can be."""


class Estimate(NamedTuple):
    """A number of the sample with its uncertainty. `corrected` is the number without its bias."""

    value: float
    corrected: float
    se: float
    low: float
    high: float


def quantile(groups: int) -> float:
    """The 97.5 % quantile of Student's t for a jackknife of `groups`, or the normal one without groups."""
    from scipy.special import stdtrit

    return float(stdtrit(groups - 1, 0.975)) if groups > 1 else _NORMAL


def estimate(replicates: Float64, limits: tuple[float, float] = _ANY, *, quantile: float = _NORMAL) -> Estimate:
    """The estimate of a number from its replicates, of which the first is the sample itself.

    Replicates without the number (NaN) do not count; with fewer than half of them, only the value is known.

    Args:
        replicates: (1 + count,).
        limits: the least and the largest number that can be.
        quantile: half of the interval's width, in standard errors.
    """
    value, others = float(replicates[0]), replicates[1:]
    known = others[np.isfinite(others)]
    if not np.isfinite(value) or len(known) < max(2, len(others) / 2):
        return Estimate(value, *[np.nan] * 4)
    corrected, se = 2 * value - known.mean(), known.std(ddof=1)
    ends = (min(max(each, limits[0]), limits[1]) for each in (corrected - quantile * se, corrected + quantile * se))
    low, high = ends
    return Estimate(value, *map(_rounded, (min(max(corrected, limits[0]), limits[1]), se, low, high)))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


class BucketEstimate(NamedTuple):
    """Of a pair of a query bucket and a key bucket: what it is measured from, and its plasticity."""

    q_bucket: int
    k_bucket: int
    n_q_rows: int
    n_q_texts: int
    n_pairs: int
    n_pair_texts: int
    ap: Estimate
    ap_null: float


@dataclass
class Uncertainty:
    """The uncertainty of a head: `of_head` by the name of the number; `components` are the R2 of each component, and
    `weights` its share of the head's sum.

    `groups` is the number of groups of a jackknife, whose `as_replicates` stand for replicates of plasticity; 0 for
    those of a bootstrap. `overall` are the replicates of the mean over all pairs of buckets: of plasticity, and of its
    value without drift. `means` has, for each query bucket, the bucket and both for the mean over its key buckets.
    """

    texts: int
    groups: int = 0
    of_head: dict[str, Estimate] = field(default_factory=dict)
    buckets: list[BucketEstimate] = field(default_factory=list)
    components: list[Estimate] = field(default_factory=list)
    weights: list[Estimate] = field(default_factory=list)
    overall: tuple[list[float], list[float]] = ([], [])
    means: list[tuple[int, list[float], list[float]]] = field(default_factory=list)


class PlasticityReplicates:
    """Measures the plasticity of a head in each replicate, one key bucket after another.

    The null value is that of the same keys and queries if positions said nothing: the mean query is that of all
    positions, and what the line explains is part of the queries' spread.
    """

    groups = 0

    def __init__(self, drift: Replicates, clusters: Clusters, lowest: int, q_buckets: Int64, q_texts: Int64) -> None:
        self.clusters, self._drift, self._lowest = clusters, drift, lowest
        self._start(q_buckets, q_texts, len(clusters.weights))

    def _start(self, q_buckets: Int64, q_texts: Int64, replicates: int) -> None:
        self._rows = np.bincount(q_buckets)
        self._texts = np.bincount(np.unique(np.stack([q_buckets, q_texts]), axis=1)[0])
        shape = len(self._rows), replicates
        self._sums, self._null_sums = np.zeros((2, *shape))
        self._counts = np.zeros(shape, np.int64)
        self._found: list[BucketEstimate] = []

    def add(self, key_bucket: int, queries: range, differences: Callable[[], Float64], texts: Int64) -> None:
        """Adds the pairs of a key bucket.

        Args:
            key_bucket: the bucket.
            queries: the query buckets that see it.
            differences: returns those of the oriented keys (m, head_dim).
            texts: (m,) of the pairs, as columns of the weights.
        """
        self._record(key_bucket, queries, texts, *self._measure(queries, differences(), texts))

    def _record(self, key_bucket: int, queries: range, texts: Int64, values: Float64, null: Float64) -> None:
        """Adds the replicates of a key bucket: (query buckets, replicates), and (replicates,) of the null."""
        facts, width = (len(texts), len(np.unique(texts))), quantile(self.groups)
        of_null = estimate(null, UNIT_RANGE, quantile=width).corrected
        for query, replicates in zip(queries, values, strict=True):
            place = query - self._lowest
            known = np.isfinite(replicates) & np.isfinite(null)
            self._sums[place] += np.where(known, replicates, 0)
            self._null_sums[place] += np.where(known, null, 0)
            self._counts[place] += known
            rows = int(self._rows[place]), int(self._texts[place])
            found = estimate(replicates, UNIT_RANGE, quantile=width)
            self._found.append(BucketEstimate(query, key_bucket, *rows, *facts, found, of_null))

    def _measure(self, queries: range, differences: Float64, texts: Int64) -> tuple[Float64, Float64]:
        """The mean plasticity over the pairs: for each query bucket (buckets, replicates), and null (replicates,)."""
        from scipy.special import erf

        drift, lowest = self._drift, self._lowest
        sums = np.zeros((len(queries), len(drift.alpha)))
        null_sum, total = np.zeros((2, len(drift.alpha)))
        for start in range(0, len(differences), _BLOCK_PAIRS):
            block = differences[start : start + _BLOCK_PAIRS]
            weights = self.clusters.weights[:, texts[start : start + _BLOCK_PAIRS]].T
            variances, null_variances = (np.maximum(each, _SMALLEST_VARIANCE) for each in spreads(drift, block))
            at_start, slope = block @ drift.alpha.T, block @ drift.beta.T
            with np.errstate(invalid="ignore", divide="ignore"):
                per_root = 1 / np.sqrt(2 * variances)
                scaled_start, scaled_slope = at_start * per_root, slope * per_root
                for number, query in enumerate(queries):
                    # 4 P (1 - P) with P = Phi(z) is 1 - erf(z / sqrt 2)^2.
                    z = scaled_slope * drift.bucket_positions[:, query - lowest]
                    z += scaled_start
                    erf(z, out=z)
                    np.square(z, out=z)
                    sums[number] -= np.einsum("mr,mr->r", weights, z)
                z = (at_start + slope * drift.mean_position) / np.sqrt(2 * null_variances)
            null_sum -= np.einsum("mr,mr->r", weights, erf(z) ** 2)
            total += weights.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return 1 + sums / total, 1 + null_sum / total

    def result(self) -> Uncertainty:
        """The uncertainty of all that was added."""
        found = Uncertainty(len(self.clusters.ids), self.groups, buckets=sorted(self._found))
        with np.errstate(invalid="ignore"):
            ap, null = (sums.sum(axis=0) / self._counts.sum(axis=0) for sums in (self._sums, self._null_sums))
            found.overall = ap.tolist(), null.tolist()
            found.of_head |= of_plasticity(ap, null, self.groups)
            for place in np.flatnonzero(self._counts[:, 0]):
                of_bucket = (sums[place] / self._counts[place] for sums in (self._sums, self._null_sums))
                ap, null = of_bucket
                found.means.append((self._lowest + int(place), ap.tolist(), null.tolist()))
        return found


def of_queries(measured: Mapping[str, Float64]) -> dict[str, Estimate]:
    """The estimates of numbers of the queries alone, from their replicates by name."""
    return {name: estimate(values, _LIMITS.get(name, _ANY)) for name, values in measured.items()}


def of_components(r2: Float64) -> tuple[list[Estimate], list[Estimate]]:
    """The estimates of the R2 (replicates, head_dim) of each component, and of its weight: see `tables.weights`."""
    floored = np.maximum(r2, 0.0)
    total = floored.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shares = np.where(total == 0, 1 / r2.shape[1], floored / total)
    estimates = ([estimate(values, UNIT_RANGE) for values in numbers.T] for numbers in (r2, shares))
    of_r2, of_weights = estimates
    return of_r2, of_weights


def of_plasticity(ap: Float64, null: Float64, groups: int = 0) -> dict[str, Estimate]:
    """The estimates of plasticity, of its value without drift, and of what the drift takes from it."""
    width = quantile(groups)
    return {
        "ap_overall": estimate(ap, UNIT_RANGE, quantile=width),
        "ap_null": estimate(null, UNIT_RANGE, quantile=width),
        "ap_drift": estimate(null - ap, (-1.0, 1.0), quantile=width),
    }
