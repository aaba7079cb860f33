"""Estimates plasticity in two ways: how certain a query of a bucket is which of two earlier keys it prefers.

A query of bucket B is assumed to be normal. It prefers a key by the sign of its product with the keys' difference D.
The product is normal too, with mean m and variance v; z = m / sqrt(v), and P = Phi(z) is the probability that it
prefers the first key. The estimators differ in the normal distribution, and in the draw of the pairs.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from qk_sniffer.plasticity.drift import Drift, Float32, Float64, Int64
from qk_sniffer.plasticity.key_pairs import KeyGroups

_BLOCK_ROWS = 4096

NEIGHBOURHOOD = 0.05
"""The largest distance of a neighbour, as a share of the example's keys."""


class Estimator(Protocol):
    """Draws pairs of keys, and computes z of the queries of each bucket for their differences."""

    def draw(self, groups: KeyGroups, bucket: int, count: int, random: np.random.Generator) -> tuple[Int64, Int64]:
        """The rows of the first and the second key of pairs in `bucket`; empty if no example has two keys there."""

    def z(self, differences: Float64, buckets: slice) -> Float64:
        """z (buckets, pairs) for differences (pairs, head_dim) and a slice of query buckets."""


class Regression:
    """Queries at the mean position of their bucket, from the line fitted to all queries.

    Assumes independent components of the residuals in the basis in which the line moves along the first component:
    z = (m . D) / sqrt(sum of var D^2), with m = alpha + beta (mean position).

    Args:
        signs: (head_dim,) of the orientation of `drift`.
        variances: (head_dim,) of the rotated residuals.
        mean_positions: (buckets,) of the queries; NaN for a bucket without queries.
    """

    def __init__(self, drift: Drift, signs: Float64, variances: Float64, mean_positions: Float64) -> None:
        means = drift.alpha + np.multiply.outer(mean_positions, drift.beta)
        self._drift, self._signs, self._variances = drift, signs, variances
        self._means = drift.rotated(means)

    def draw(self, groups: KeyGroups, bucket: int, count: int, random: np.random.Generator) -> tuple[Int64, Int64]:
        """Draws uniformly over all pairs, with `KeyGroups.draw`."""
        return groups.draw(bucket, count, random)

    def z(self, differences: Float64, buckets: slice) -> Float64:
        """z (buckets, pairs)."""
        rotated = self._drift.rotated(differences * self._signs)
        products = np.einsum("bd,md->bm", self._means[buckets], rotated)
        return standardised(products, np.einsum("md,md,d->m", rotated, rotated, self._variances))


class FullCovariance:
    """Queries at a time t, with an exponentially weighted mean mu_t and covariance Sigma_t.

    z = (D . mu_t) / sqrt(D' Sigma_t D). The weight of an observed position falls by 1 - alpha with every later observed
    position up to t. Rows at one position share its weight. For a bucket, t is its last observed position that is not
    above its mean position.

    Args:
        queries: (n, head_dim).
        positions: (n,) of the queries.
        mean_positions: (buckets,) ascending; NaN for a bucket without queries.
        alpha: the forgetting factor, above 0 and below 1.
    """

    def __init__(self, queries: Float32, positions: Int64, mean_positions: Float64, alpha: float) -> None:
        observed, which, rows = np.unique(positions, return_inverse=True, return_counts=True)
        order = np.argsort(which, kind="stable")
        size = queries.shape[1]
        # About the mean of all queries, so that a large mean does not cancel digits of the second moment.
        centre = queries.mean(axis=0, dtype=np.float64)
        weight, first, second = 0.0, np.zeros(size), np.zeros((size, size))
        self._means = np.full((len(mean_positions), size), np.nan)
        self._covariances = np.full((len(mean_positions), size, size), np.nan)
        done, seen = 0, 0
        for bucket in np.flatnonzero(np.isfinite(mean_positions)):
            until = int(np.searchsorted(observed, mean_positions[bucket], side="right"))
            stop = int(rows[:until].sum())
            decay = (1 - alpha) ** (until - seen)
            weight, first, second = weight * decay, first * decay, second * decay
            for start in range(done, stop, _BLOCK_ROWS):
                block = order[start : min(start + _BLOCK_ROWS, stop)]
                weights = (1 - alpha) ** (until - 1 - which[block]) / rows[which[block]]
                x = queries[block] - centre
                weight += weights.sum()
                first += weights @ x
                second += (x * weights[:, None]).T @ x
            done, seen = stop, until
            mean = first / weight
            self._means[bucket] = centre + mean
            self._covariances[bucket] = second / weight - np.multiply.outer(mean, mean)

    def draw(self, groups: KeyGroups, bucket: int, count: int, random: np.random.Generator) -> tuple[Int64, Int64]:
        """Draws `count` pairs with replacement.

        Draws an example with a probability proportional to its number of keys in the bucket, one of these keys, and
        another one at most max(1, floor(0.05 x number)) places away by position. The order of the two is random.
        """
        sequences = groups.sequences(bucket)
        if not sequences:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        sizes = np.array([len(sequence) for sequence in sequences])
        starts = np.cumsum(sizes) - sizes
        # A key of all keys: this draws the example in proportion to its keys.
        anchor = random.integers(sizes.sum(), size=count)
        example = np.searchsorted(starts, anchor, side="right") - 1
        place, size = anchor - starts[example], sizes[example]
        reach = np.maximum(1, np.floor(NEIGHBOURHOOD * size).astype(np.int64))
        lowest, highest = np.maximum(place - reach, 0), np.minimum(place + reach, size - 1)
        other = lowest + random.integers(highest - lowest)
        other += other >= place  # skips the anchor's own place
        rows = np.concatenate(sequences)
        first, second = rows[anchor], rows[starts[example] + other]
        is_swapped = random.random(count) < 0.5
        return np.where(is_swapped, second, first), np.where(is_swapped, first, second)

    def z(self, differences: Float64, buckets: slice) -> Float64:
        """z (buckets, pairs)."""
        products = self._means[buckets] @ differences.T
        # One bucket at a time: all at once would copy the differences for each.
        variances = [np.einsum("md,md->m", differences @ each, differences) for each in self._covariances[buckets]]
        return standardised(products, np.maximum(np.reshape(variances, products.shape), 0))


def standardised(products: Float64, variances: npt.NDArray[np.float64]) -> Float64:
    """products / sqrt(variances); infinite with the product's sign for a variance of 0, and 0 for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = products / np.sqrt(variances)
    z[(products == 0) & (variances == 0)] = 0.0
    return z


def plasticity(z: Float64) -> Float64:
    """AP = 4 P (1 - P) with P = Phi(z): 1 where the preference is open, 0 where it is certain."""
    from scipy.special import ndtr

    values: Float64 = 4 * ndtr(z) * ndtr(-z)
    return values
