"""What the positions say about the queries of one head, and what is left of them.

Arrays of queries are (head_dim, n): a component is one run of memory, so that every pass over it stays in the
processor's cache. Nothing here calls BLAS: its threads would get in the way of ours, and sums over many rows would
depend on how many there are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

SMALLEST_SUM = 1e-12
"""Below this a sum of squares about the mean counts as this, so that a constant has an R2."""

CONSTANT = 1e-20
"""A component whose residual variance is below this share of the head's largest variance is constant: what is left of
it is rounding, which has no shape."""

_BLOCK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Drift:
    """The least squares X = alpha + beta p of oriented queries X (head_dim, n) on their positions p.

    `r2` is by component, `residuals` are X - alpha - beta p. `u` is beta / |beta|, the first unit vector where beta
    is 0. `reflection` is the unit normal v of the Householder reflection H = I - 2 v v' that takes the first unit
    vector to u; it is 0 where they are the same, and H = I.
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
        turned: Float64 = vectors - np.multiply.outer(along, self.reflection)
        return turned


def orientation(keys: Float32, buckets: npt.NDArray[np.integer[Any]]) -> Float64:
    """The signs (head_dim,) of the mean over buckets of each bucket's mean key; 0 counts as 1.

    Args:
        keys: (n, head_dim); n at least 1.
        buckets: (n,).
    """
    means = [keys[buckets == bucket].mean(axis=0, dtype=np.float64) for bucket in np.unique(buckets)]
    return np.where(np.mean(means, axis=0) < 0, -1.0, 1.0)


def components(vectors: Float32, signs: Float64) -> Float64:
    """`vectors` (n, head_dim), each column times its sign, as (head_dim, n)."""
    turned = np.empty(vectors.shape[::-1])
    for start in range(0, len(vectors), _BLOCK_ROWS):  # else every number comes from another line of the cache
        turned[:, start : start + _BLOCK_ROWS] = vectors[start : start + _BLOCK_ROWS].T
    turned *= signs[:, None]
    return turned


def fit_drift(x: Float64, positions: Int64) -> Drift:
    """Fits the positions, of which there are two or more; `x` (head_dim, n) becomes the residuals."""
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
    """beta / |beta|; the first unit vector where beta is 0, which has no direction."""
    length = np.sqrt(np.einsum("d,d->", beta, beta))
    u: Float64 = beta / length if length > 0 else np.eye(1, len(beta))[0]
    return u


def reflection_to(u: Float64) -> Float64:
    """The unit normal of the Householder reflection that takes the first unit vector to the unit vector `u`; 0 where
    they are the same."""
    rest = float(np.einsum("d,d->", u[1:], u[1:]))
    normal = -u
    # 1 - u[0], without the cancellation where u[0] is nearly 1.
    normal[0] = rest / (1 + u[0]) if u[0] > 0 else 1 - u[0]
    length = np.sqrt(normal[0] ** 2 + rest)
    return normal / length if length > 0 else normal


def predictability(drift: Drift, positions: Int64) -> dict[str, float]:
    """How well t = X u predicts y = log2(p + 1), by least squares; there are two positions or more."""
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
    """Turns the residuals into the basis of H, in place; returns their variances (head_dim,), ddof 1."""
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
        is_constant: (head_dim,) components without a shape, which are left out.
        chosen: those of the components from 1 on whose p is computed.
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
    which take three and four rows; NaN where there are fewer.
    """
    n = x.shape[1]
    skews, kurtoses = np.full((2, len(x)), np.nan)
    for j in np.flatnonzero(~is_constant):
        squares = x[j] * x[j]
        m2 = squares.mean()
        if n > 2:
            m3 = np.einsum("i,i->", squares, x[j]) / n
            skews[j] = m3 / m2**1.5 * np.sqrt(n * (n - 1)) / (n - 2)
        if n > 3:
            excess = np.einsum("i,i->", squares, squares) / n / m2**2 - 3
            kurtoses[j] = ((n + 1) * excess + 6) * (n - 1) / ((n - 2) * (n - 3))
    return skews, kurtoses


def kolmogorov_smirnov_p(x: Float64, deviations: Float64, chosen: Int64) -> Float64:
    """The p of the two-sided Kolmogorov-Smirnov test of components over their deviations against N(0, 1).

    The exact distribution of D under the null hypothesis, as `scipy.stats.kstest(x, "norm")` computes it. The result is
    (head_dim,), NaN but at `chosen`.
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
