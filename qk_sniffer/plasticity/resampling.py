"""Computes the drift of a head in replicates of the dataset, which have each text a random number of times.

The unit is the text, because the rows of a text depend on each other (the bootstrap of clusters: Davison and Hinkley,
"Bootstrap Methods and their Application", 1997, section 3.8). A text that a replicate has m times counts m times in
every sum over queries, and its pairs of keys count m times. A pair never has keys of two copies. Nothing is fitted
again: the sums of each text follow from one pass over the rows, and those of a replicate are matrix products of these
with its weights. They equal those of a dataset with the copies.

The products are those of BLAS, unlike the others of this package: their last digits depend on the processor.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qk_sniffer.capture.sampling import counter_hash
from qk_sniffer.plasticity.drift import SMALLEST_SUM, Drift, Float32, Float64, Int64

TEXTS = 4
"""The kind of draws, next to those of `key_pairs`."""

_BLOCK_ROWS = 4096
_LEAST_SPREAD = 0.25
"""Two rows at different positions have a sum of squares about their mean of at least 0.5."""

_POISSON = np.cumsum([1, 1, *(1 / np.cumprod(np.arange(2.0, 19.0)))]) / np.e
"""P(X <= k) of the Poisson distribution of mean 1, for k = 0, 1, ..., 18."""


def text_weights(seed: int, example_ids: npt.ArrayLike, count: int) -> Float64:
    """How many times each of `count` replicates has each text: (1 + count, texts). Row 0 is the dataset: all ones.

    The numbers are independent, with a Poisson distribution of mean 1 (the bootstrap of Hanley and MacGibbon,
    "Creating non-parametric bootstrap samples using Poisson frequencies", 2006). They follow from the seed, the
    `example_id` and the number of the replicate alone, by the hash of the sampler. All heads of a dataset, and all
    datasets of the same texts, thus have the same replicates on every machine.
    """
    ids = np.asarray(example_ids, np.int64)
    hashes = counter_hash(seed, TEXTS, np.arange(count)[:, None], ids)
    uniform = (hashes >> np.uint64(11)) / 2.0**53
    drawn = np.searchsorted(_POISSON, uniform, side="right").astype(np.float64)
    return np.concatenate([np.ones((1, len(ids))), drawn])


@dataclass(frozen=True, eq=False)
class Clusters:
    """The texts of a head's queries and keys, and how many times each replicate has them.

    `ids` (texts,) are ascending example_ids. `weights` is (replicates, texts).
    """

    ids: Int64
    weights: Float64

    def of(self, example_ids: Int64) -> Int64:
        """The column of `weights` for each row."""
        return np.searchsorted(self.ids, example_ids)


@dataclass(frozen=True, eq=False)
class Replicates:
    """The drift of a head's queries in each replicate, in the oriented basis of the dataset; see `Drift`.

    `alpha`, `beta`, `u` and `r2` are (replicates, head_dim), and so are `normal`, that of the reflection, and the
    `variances` of the rotated residuals. `of_drift` (replicates,) is the variance of the queries that the line
    explains. `mean_position` (replicates,) is that of all queries, and `bucket_positions` (replicates, buckets) that of
    each bucket; NaN for a bucket without queries.
    """

    alpha: Float64
    beta: Float64
    u: Float64
    r2: Float64
    normal: Float64
    variances: Float64
    of_drift: Float64
    mean_position: Float64
    bucket_positions: Float64


def first_signs(keys: Float32, buckets: Int64, texts: Int64, clusters: Clusters, sign: float) -> Float64:
    """The sign of the first component of `orientation` in each replicate, times `sign`: that of the dataset.

    A change of the other signs reverses the components of queries and keys alike, and changes no plasticity. The first
    one also decides which way the first unit vector is reflected.
    """
    present, which = np.unique(buckets, return_inverse=True)
    first = keys[:, 0].astype(np.float64)
    sums, counts = (_weighted(clusters, texts, which, len(present), values) for values in (first, np.ones(len(first))))
    with np.errstate(invalid="ignore"):
        means = sums / counts
    return np.where(np.nansum(means, axis=1) < 0, -sign, sign)


def replicate_drift(
    drift: Drift, positions: Int64, buckets: Int64, texts: Int64, clusters: Clusters, signs: Float64
) -> Replicates:
    """Fits the queries to their positions in each replicate.

    The fit to the residuals of the dataset, plus the line of the dataset, is the fit to the queries.

    Args:
        drift: of the dataset, with residuals (head_dim, n) that are not rotated.
        positions, buckets, texts: (n,) of the queries; buckets from 0 on, texts as columns of the weights.
        signs: (replicates,) from `first_signs`.
    """
    centre = float(positions.mean())
    centred = positions.astype(np.float64) - centre
    sums = _sums(drift.residuals, centred, texts, clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = sums.rows[:, None]
        place, means = sums.positions[:, None] / rows, sums.residuals / rows
        spread = sums.squared_positions[:, None] - rows * place**2
        spread[spread < _LEAST_SPREAD] = np.nan
        slopes = (sums.products - rows * means * place) / spread
        beta = drift.beta + slopes
        # The line of the dataset, at the mean position of the dataset, is the mean of the queries.
        alpha = drift.alpha + means - slopes * (centre + place)
        lengths = np.sqrt(np.einsum("rd,rd->r", beta, beta))[:, None]
        u = np.divide(beta, lengths, out=np.zeros_like(beta), where=lengths != 0)
        u[:, 0] += np.where(lengths[:, 0] == 0, signs, 0.0)
        normal = _reflections(u * signs[:, None])
        along = _scatter_along(drift.residuals, texts, clusters.weights, normal)
        along -= rows * means * np.einsum("rd,rd->r", means, normal)[:, None]
        along -= spread * slopes * np.einsum("rd,rd->r", slopes, normal)[:, None]
        rest = sums.squares - rows * means**2 - spread * slopes**2
        r2 = np.minimum(1.0, 1 - rest / np.maximum(rest + spread * beta**2, SMALLEST_SUM))
        # The diagonal of H S H with H = I - 2 v v', where `along` is S v and `rest` the diagonal of S.
        rotated = rest - 4 * normal * along
        rotated += 4 * normal**2 * np.einsum("rd,rd->r", normal, along)[:, None]
        variances = np.maximum(rotated, 0.0) / (rows - 1)
        number = int(buckets.max()) + 1
        places, counts = (
            _weighted(clusters, texts, buckets, number, values) for values in (centred, np.ones(len(centred)))
        )
        bucket_positions = centre + places / counts
        of_drift = (lengths**2 * spread / (rows - 1))[:, 0]
    mean_position = centre + place[:, 0]
    return Replicates(alpha, beta, u, r2, normal, variances, of_drift, mean_position, bucket_positions)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the queries of each replicate, of positions about their mean in the dataset, and of its residuals:
    `rows`, `positions`, `squared_positions` (replicates,); `residuals`, `products` of a residual and its position, and
    `squares` (replicates, head_dim)."""

    rows: Float64
    positions: Float64
    squared_positions: Float64
    residuals: Float64
    products: Float64
    squares: Float64


def _sums(residuals: Float64, centred: Float64, texts: Int64, clusters: Clusters) -> _Sums:
    number, weights = len(clusters.ids), clusters.weights
    of_positions = np.stack([np.bincount(texts, centred**power, number) for power in range(3)])
    of_residuals = np.empty((3, number, len(residuals)))
    for j, component in enumerate(residuals):
        of_residuals[0, :, j] = np.bincount(texts, component, number)
        of_residuals[1, :, j] = np.bincount(texts, component * centred, number)
        of_residuals[2, :, j] = np.bincount(texts, component * component, number)
    return _Sums(*(weights @ each for each in of_positions), *(weights @ each for each in of_residuals))


def _weighted(clusters: Clusters, texts: Int64, buckets: Int64, number: int, values: Float64) -> Float64:
    """The sum of the values (n,) of each bucket in each replicate (replicates, number)."""
    cells = texts * number + buckets
    by_text = np.bincount(cells, values, len(clusters.ids) * number).reshape(-1, number)
    sums: Float64 = clusters.weights @ by_text
    return sums


def _reflections(u: Float64) -> Float64:
    """`reflection_to` of each row of `u`."""
    rest = np.einsum("rd,rd->r", u[:, 1:], u[:, 1:])
    normal = -u
    with np.errstate(invalid="ignore", divide="ignore"):
        normal[:, 0] = np.where(u[:, 0] > 0, rest / (1 + u[:, 0]), 1 - u[:, 0])
    lengths = np.sqrt(normal[:, 0] ** 2 + rest)[:, None]
    np.divide(normal, lengths, out=normal, where=lengths != 0)
    return normal


def _scatter_along(residuals: Float64, texts: Int64, weights: Float64, vectors: Float64) -> Float64:
    """S v of each replicate (replicates, head_dim): S is the weighted sum of e e' over residuals e (head_dim, n)."""
    total = np.zeros_like(vectors)
    for start in range(0, residuals.shape[1], _BLOCK_ROWS):
        block = residuals[:, start : start + _BLOCK_ROWS]
        along = vectors @ block
        along *= weights[:, texts[start : start + _BLOCK_ROWS]]
        total += along @ block.T
    return total


def spreads(found: Replicates, differences: Float64) -> tuple[Float64, Float64]:
    """The variance of a query's product with each of the differences (m, head_dim): (m, replicates).

    With the components of the rotated residuals independent, as `Regression` has it. The second is the variance with
    that which the line explains: as if positions said nothing.
    """
    of_normal = found.variances * found.normal
    along = differences @ found.normal.T
    values = differences**2 @ found.variances.T
    values -= 4 * along * (differences @ of_normal.T)
    values += 4 * along**2 * np.einsum("rd,rd->r", of_normal, found.normal)
    np.maximum(values, 0.0, out=values)
    of_drift: Float64 = (differences @ found.u.T) ** 2 * found.of_drift
    return values, values + of_drift
