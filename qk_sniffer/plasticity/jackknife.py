"""Leaves out one group of texts after another, for numbers that a bootstrap takes too long to measure.

The delete-m jackknife for groups of unequal size: Busing, Meijer and van der Leeden, "Delete-m jackknife for unequal
m", Statistics and Computing 9 (1999). Of m texts, a group has m_g, and h_g = m / m_g. T is the number of the sample,
and T_g that without the group. Then T without its bias is J = G T - sum of (1 - 1 / h_g) T_g, and its variance is the
mean over groups of (h_g T - (h_g - 1) T_g - J)^2 / (h_g - 1). The interval uses Student's t with G - 1 degrees of
freedom.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from qk_sniffer.capture.sampling import counter_hash
from qk_sniffer.plasticity.drift import Float32, Float64, Int64
from qk_sniffer.plasticity.estimators import FullCovariance, plasticity, standardised
from qk_sniffer.plasticity.resampling import Clusters
from qk_sniffer.plasticity.uncertainty import PlasticityReplicates, Uncertainty

GROUPS = 20
_KIND = 5
"""The kind of draws, next to those of `key_pairs` and `resampling`."""

_SMALL = 1e-30
"""Stands for a share of 0, where the deviation is 0."""


def left_out(seed: int, example_ids: npt.ArrayLike) -> Float64:
    """Whether each sample has each text (1 + GROUPS, texts): 1 or 0. Row 0 is the dataset; each other lacks a group.

    The group of a text follows from the seed and the `example_id` alone, by the hash of the sampler. All heads, and all
    datasets of the same texts, thus have the same groups. A group may have no texts.
    """
    groups = counter_hash(seed, _KIND, np.asarray(example_ids, np.int64)) % np.uint64(GROUPS)
    others = np.arange(GROUPS, dtype=np.uint64)[:, None] != groups
    return np.concatenate([np.ones((1, len(groups))), others])


def groups_of(samples: Float64) -> int:
    """The number of groups with texts, of samples from `left_out`."""
    return int((samples[1:] == 0).any(axis=1).sum())


def as_replicates(values: Float64, samples: Float64) -> Float64:
    """Numbers with the mean and the deviation that those of replicates have: (..., 1 + 2 GROUPS).

    `uncertainty.estimate` takes them as it does replicates: its corrected number is J, and its standard error that of
    the jackknife. They are linear in `values`, so that the mean over heads has the jackknife's numbers too.

    Args:
        values: (..., 1 + GROUPS) of the samples.
        samples: (1 + GROUPS, texts) from `left_out`.
    """
    whole, others = values[..., :1], values[..., 1:]
    groups, share = groups_of(samples), 1 - samples[1:].mean(axis=1)
    if groups < 2:
        return np.concatenate([whole, np.full((*values.shape[:-1], 2 * GROUPS), np.nan)], axis=-1)
    # A group without texts has h = infinity: it adds T to the sum, and nothing to the variance.
    corrected = GROUPS * whole - ((1 - share) * others).sum(axis=-1, keepdims=True)
    deviations = (whole - (1 - share) * others - share * corrected) / np.sqrt(np.maximum(share, _SMALL) * (1 - share))
    # Of both signs, so that the mean is exact. The standard deviation of 2 GROUPS numbers divides by 2 GROUPS - 1.
    deviations *= np.sqrt((2 * GROUPS - 1) / (2 * groups))
    centre = 2 * whole - corrected
    return np.concatenate([whole, centre + deviations, centre - deviations], axis=-1)


class FullCovarianceReplicates(PlasticityReplicates):
    """Measures the plasticity of `FullCovariance` without one group of texts after another.

    The pairs are those of the dataset, without those of the texts left out. The null value has the mean and the
    covariance of all queries.

    Args:
        vectors: (n, head_dim) of the oriented queries.
        positions, buckets, texts: (n,) of the queries; buckets from 0 on, texts as columns of the weights.
        clusters: with the weights of `left_out`.
        lowest: the number of the first bucket.
        alpha: the forgetting factor.
    """

    def __init__(
        self,
        vectors: Float32,
        positions: Int64,
        buckets: Int64,
        texts: Int64,
        clusters: Clusters,
        lowest: int,
        alpha: float,
    ) -> None:
        self.clusters, self._lowest, self._alpha = clusters, lowest, alpha
        self._vectors, self._positions, self._buckets, self._of_texts = vectors, positions, buckets, texts
        self.groups = groups_of(clusters.weights)
        self._start(buckets, texts, 1 + 2 * GROUPS)
        self._pairs: list[tuple[int, range, Callable[[], Float64], Int64]] = []

    def add(self, key_bucket: int, queries: range, differences: Callable[[], Float64], texts: Int64) -> None:
        """Adds the pairs of a key bucket; see `PlasticityReplicates.add`."""
        self._pairs.append((key_bucket, queries, differences, texts))

    def result(self) -> Uncertainty:
        """The uncertainty of all that was added."""
        samples = self.clusters.weights
        shapes = [(1 + len(queries), len(samples)) for _, queries, _, _ in self._pairs]
        values = [np.full(shape, np.nan) for shape in shapes]
        # One sample at a time: the covariances of all of them would be much memory.
        for number, sample in enumerate(samples):
            self._measure_sample(sample, [each[:, number] for each in values])
        for (key_bucket, queries, _, texts), each in zip(self._pairs, values, strict=True):
            replicates = as_replicates(each, samples)
            self._record(key_bucket, queries, texts, replicates[1:], replicates[0])
        return super().result()

    def _measure_sample(self, sample: Float64, values: list[Float64]) -> None:
        """Fills in the null value of each key bucket, and then its query buckets."""
        kept = np.flatnonzero(sample[self._of_texts])
        if not len(kept):
            return
        vectors, positions, buckets = self._vectors[kept], self._positions[kept], self._buckets[kept]
        number = len(self._rows)
        with np.errstate(invalid="ignore"):
            places = np.bincount(buckets, positions, number) / np.bincount(buckets, minlength=number)
        estimator = FullCovariance(vectors, positions, places, self._alpha)
        mean = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors - mean
        covariance = centred.T @ centred / len(centred)
        for (_, queries, differences_of, texts), found in zip(self._pairs, values, strict=True):
            is_kept = sample[texts] > 0
            if not is_kept.any():
                continue
            differences = differences_of()[is_kept]
            variances = np.einsum("md,md->m", differences @ covariance, differences)
            found[0] = plasticity(standardised(differences @ mean, np.maximum(variances, 0))).mean()
            z = estimator.z(differences, slice(queries.start - self._lowest, queries.stop - self._lowest))
            found[1:] = plasticity(z).mean(axis=1)
