"""Fits the queries of one head to their positions, and measures the residuals.

Arrays of queries are (head_dim, n): a component is contiguous in memory, so a pass over it stays in the processor's
cache. Nothing here calls BLAS: its threads would compete with ours, and its sums would depend on their number.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

SMALLEST_SUM = 1e-12
"""The least sum of squares about the mean: a smaller one counts as this, so that a constant has an R2."""

CONSTANT = 1e-20
"""A component is constant if its residual variance is below this share of the head's largest variance. Its residuals
are then rounding, and have no shape."""

_BLOCK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Drift:
    """The least-squares fit X = alpha + beta p of oriented queries X (head_dim, n) to their positions p.

    `r2` (head_dim,) has one value a component. `residuals` (head_dim, n) are X - alpha - beta p. `u` (head_dim,) is
    beta / |beta|, or the first unit vector if beta is 0. `reflection` (head_dim,) is the unit normal v of the
    Householder reflection H = I - 2 v v' that maps the first unit vector to u. It is 0 if both are the same, and then
    H = I.
    """

    alpha: Float64
    beta: Float64
    r2: Float64
    residuals: Float64
    u: Float64
    reflection: Float64
    largest_variance: float

    def rotated(self, vectors: Float64) -> Float64:
        """The rows of `vectors` (m, head_dim) times H."""
        along = 2 * np.einsum("md,d->m", vectors, self.reflection)
        rotated: Float64 = vectors - np.multiply.outer(along, self.reflection)
        return rotated


def orientation(keys: Float32, buckets: npt.NDArray[np.integer[Any]]) -> Float64:
    """The signs (head_dim,) of the mean over buckets of each bucket's mean key; 0 counts as 1.

    Args:
        keys: (n, head_dim); n at least 1.
        buckets: (n,).
    """
    means = [keys[buckets == bucket].mean(axis=0, dtype=np.float64) for bucket in np.unique(buckets)]
    return np.where(np.mean(means, axis=0) < 0, -1.0, 1.0)


def components(vectors: Float32, signs: Float64) -> Float64:
    """Multiplies each column of `vectors` (n, head_dim) by its sign, and returns them as (head_dim, n)."""
    by_component = np.empty(vectors.shape[::-1])
    for start in range(0, len(vectors), _BLOCK_ROWS):  # in blocks, so that reads stay in the cache
        by_component[:, start : start + _BLOCK_ROWS] = vectors[start : start + _BLOCK_ROWS].T
    by_component *= signs[:, None]
    return by_component


def fit_drift(x: Float64, positions: Int64) -> Drift:
    """Fits `x` (head_dim, n) to at least two positions. Overwrites `x` with the residuals."""
    mean_position = float(positions.mean())
    centred = positions - mean_position
    spread = float(np.einsum("i,i->", centred, centred))
    alpha, beta, r2, totals = np.empty((4, len(x)))
    for j, component in enumerate(x):
        mean = component.mean()
        component -= mean
        totals[j] = np.einsum("i,i->", component, component)
        beta[j] = np.einsum("i,i->", component, centred) / spread
        alpha[j] = mean - beta[j] * mean_position
        component -= beta[j] * centred
        rest = np.einsum("i,i->", component, component)
        r2[j] = min(1.0, 1 - rest / max(totals[j], SMALLEST_SUM))
    u = direction(beta)
    return Drift(alpha, beta, r2, x, u, reflection_to(u), float(totals.max()) / (len(positions) - 1))


def direction(beta: Float64) -> Float64:
    """beta / |beta|; the first unit vector if beta is 0."""
    length = np.sqrt(np.einsum("d,d->", beta, beta))
    u: Float64 = beta / length if length > 0 else np.eye(1, len(beta))[0]
    return u


def reflection_to(u: Float64) -> Float64:
    """The unit normal of the Householder reflection that maps the first unit vector to the unit vector `u`.

    It is 0 if both are the same.
    """
    rest = float(np.einsum("d,d->", u[1:], u[1:]))
    normal = -u
    # 1 - u[0], without cancellation if u[0] is nearly 1.
    normal[0] = rest / (1 + u[0]) if u[0] > 0 else 1 - u[0]
    length = np.sqrt(normal[0] ** 2 + rest)
    return normal / length if length > 0 else normal


def predictability(drift: Drift, positions: Int64) -> dict[str, float]:
    """Measures how well t = X u predicts y = log2(p + 1), by least squares, for at least two positions."""
    centred = positions - positions.mean()
    slope = np.sqrt(np.einsum("d,d->", drift.beta, drift.beta))
    t = np.einsum("ji,j->i", drift.residuals, drift.u) + slope * centred
    y = np.log2(positions + 1.0)
    y -= y.mean()
    t -= t.mean()
    spread = np.einsum("i,i->", t, t)
    rest = y - t * (np.einsum("i,i->", t, y) / spread if spread > 0 else 0.0)
    total = max(float(np.einsum("i,i->", y, y)), SMALLEST_SUM)
    baseline, projected = float(np.abs(y).mean()), float(np.abs(rest).mean())
    return {
        "q_R2_scalar": min(1.0, 1 - float(np.einsum("i,i->", rest, rest)) / total),
        "q_mae_baseline": baseline,
        "q_mae_proj": projected,
        "q_mae_ratio": projected / baseline,
    }


def rotate_residuals(drift: Drift) -> Float64:
    """Rotates the residuals into the basis of H, in place. Returns their variances (head_dim,), ddof 1."""
    along = np.einsum("ji,j->i", drift.residuals, drift.reflection)
    count = drift.residuals.shape[1]
    variances = np.empty(len(drift.residuals))
    for j, component in enumerate(drift.residuals):
        component -= (2 * drift.reflection[j]) * along
        variances[j] = np.einsum("i,i->", component, component) / (count - 1)
    return variances


def normality(
    residuals: Float64, variances: Float64, is_constant: npt.NDArray[np.bool_], chosen: Int64, p_alpha: float
) -> dict[str, float]:
    """Skewness, excess kurtosis and Kolmogorov-Smirnov p of the rotated residuals (head_dim, n).

    Args:
        is_constant: (head_dim,) whether a component has no shape and is left out.
        chosen: the components, from 1 on, whose p is computed.
    """
    skews, kurtoses = shapes(residuals, is_constant)
    tested = np.concatenate([[0], chosen])
    p = kolmogorov_smirnov_p(residuals, np.sqrt(variances), tested[~is_constant[tested]])
    noise_p = p[1:][np.isfinite(p[1:])]
    return {
        "q_resid0_skew": float(skews[0]),
        "q_resid0_kurt": float(kurtoses[0]),
        "q_resid0_ks_p": float(p[0]),
        "q_noise_med_abs_skew": _median(np.abs(skews[1:])),
        "q_noise_med_abs_kurt": _median(np.abs(kurtoses[1:])),
        "q_noise_med_ks_p": _median(noise_p),
        "q_noise_frac_ks_p_lt_alpha": float((noise_p < p_alpha).mean()) if len(noise_p) else np.nan,
    }


def shapes(x: Float64, is_constant: npt.NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """Skewness and excess kurtosis of each component of `x` (head_dim, n), whose means are 0.

    The unbiased estimators G1 and G2 of Joanes and Gill, "Comparing measures of sample skewness and kurtosis" (1998),
    which need three and four rows; NaN for fewer.
    """
    n = x.shape[1]
    skews, kurtoses = np.full((2, len(x)), np.nan)
    for j in np.flatnonzero(~is_constant):
        squares = x[j] * x[j]
        sums = squares.sum(), np.einsum("i,i->", squares, x[j]), np.einsum("i,i->", squares, squares)
        skews[j], kurtoses[j] = unbiased_shapes(np.float64(n), *np.divide(sums, n))
    return skews, kurtoses


def unbiased_shapes(n: Float64 | np.float64, m2: Any, m3: Any, m4: Any) -> tuple[Any, Any]:
    """G1 and G2 of `shapes` from a number of rows and the mean powers 2, 3 and 4; NaN for fewer rows than they need."""
    with np.errstate(invalid="ignore", divide="ignore"):
        skew = m3 / m2**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
        kurtosis = ((n + 1) * (m4 / m2**2 - 3) + 6) * (n - 1) / ((n - 2) * (n - 3))
    return np.where(n > 2, skew, np.nan), np.where(n > 3, kurtosis, np.nan)


def kolmogorov_smirnov_p(x: Float64, deviations: Float64, chosen: Int64) -> Float64:
    """The p of the two-sided Kolmogorov-Smirnov test of `x` (head_dim, n) over its deviations against N(0, 1).

    Uses the exact distribution of D under the null hypothesis, as `scipy.stats.kstest(x, "norm")` does. Returns
    (head_dim,), NaN except at `chosen`.
    """
    from scipy.special import ndtr
    from scipy.stats import kstwo

    n = x.shape[1]
    steps = np.arange(n + 1) / n
    distances = np.empty(len(chosen))
    for number, j in enumerate(chosen):
        cdf = x[j] / deviations[j]
        cdf.sort()
        ndtr(cdf, out=cdf)
        distances[number] = max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    p = np.full(len(x), np.nan)
    p[chosen] = np.clip(kstwo.sf(distances, n), 0, 1)
    return p


def _median(values: Float64) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else np.nan
