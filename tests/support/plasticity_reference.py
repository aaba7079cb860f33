"""Computes attention plasticity directly from its definition, with loops, whole matrices and scipy.

It is slow and takes one query head at a time. It draws nothing: it takes all pairs of keys and tests all components.
Buckets are those of the queries' sampler.
"""

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import scipy.stats

Bucket = Callable[[int], int]
Span = Callable[[int], tuple[int, int]]


def orientation(keys: np.ndarray, buckets: list[int]) -> np.ndarray:
    means = []
    for bucket in sorted(set(buckets)):
        means.append(np.mean([key for key, b in zip(keys, buckets, strict=True) if b == bucket], axis=0))
    signs = np.sign(np.mean(means, axis=0))
    signs[signs == 0] = 1
    return signs


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the intercept and slope of y on x."""
    design = np.stack([np.ones(len(x)), x], axis=1)
    intercept, slope = np.linalg.lstsq(design, y, rcond=None)[0]
    return float(intercept), float(slope)


def r2(y: np.ndarray, fitted: np.ndarray) -> float:
    total = sum((value - y.mean()) ** 2 for value in y)
    rest = sum((value - guess) ** 2 for value, guess in zip(y, fitted, strict=True))
    return float(min(1.0, 1 - rest / max(total, 1e-12)))


def householder(u: np.ndarray) -> np.ndarray:
    normal = np.eye(len(u))[0] - u
    if not normal.any():
        return np.eye(len(u))
    normal /= np.linalg.norm(normal)
    return np.eye(len(u)) - 2 * np.outer(normal, normal)


def reference(
    x: np.ndarray,
    positions: np.ndarray,
    k: np.ndarray,
    key_positions: np.ndarray,
    key_examples: np.ndarray,
    bucket: Bucket,
    span: Span,
    window: int | None = None,
    p_alpha: float = 0.01,
) -> dict[str, Any]:
    x, k, p = x.astype(np.float64), k.astype(np.float64), positions.astype(np.float64)
    dims = x.shape[1]
    q_buckets, k_buckets = [bucket(int(i)) for i in positions], [bucket(int(i)) for i in key_positions]
    signs = orientation(k, k_buckets)
    x, k = x * signs, k * signs

    lines = [fit(p, x[:, j]) for j in range(dims)]
    component_r2 = [r2(x[:, j], lines[j][0] + lines[j][1] * p) for j in range(dims)]
    beta = np.array([slope for _, slope in lines])
    found: dict[str, Any] = {"q_R2_pos": np.mean(component_r2), "q_beta_norm": np.linalg.norm(beta)}

    u = beta / np.linalg.norm(beta)
    t, y = x @ u, np.log2(p + 1)
    start, slope = fit(t, y)
    found["q_R2_scalar"] = r2(y, start + slope * t)
    found["q_mae_baseline"] = np.mean(np.abs(y - y.mean()))
    found["q_mae_proj"] = np.mean(np.abs(y - start - slope * t))
    found["q_mae_ratio"] = found["q_mae_proj"] / found["q_mae_baseline"]

    turn = householder(u)
    x, k = x @ turn, k @ turn
    lines = [fit(p, x[:, j]) for j in range(dims)]
    alpha, beta = (np.array(values) for values in zip(*lines, strict=True))
    residuals = np.stack([x[:, j] - alpha[j] - beta[j] * p for j in range(dims)], axis=1)
    variances = [np.var(residuals[:, j], ddof=1) for j in range(dims)]

    first = residuals[:, 0] / np.std(residuals[:, 0], ddof=1)
    found["q_resid0_skew"] = scipy.stats.skew(first, bias=False)
    found["q_resid0_kurt"] = scipy.stats.kurtosis(first, bias=False)
    found["q_resid0_ks_p"] = scipy.stats.kstest(first, "norm").pvalue
    noise = [(x[:, j] - x[:, j].mean()) / np.std(x[:, j], ddof=1) for j in range(1, dims)]
    found["q_noise_med_abs_skew"] = np.median([abs(scipy.stats.skew(each, bias=False)) for each in noise])
    found["q_noise_med_abs_kurt"] = np.median([abs(scipy.stats.kurtosis(each, bias=False)) for each in noise])
    tests = np.array([scipy.stats.kstest(each, "norm").pvalue for each in noise])
    found["q_noise_med_ks_p"] = np.median(tests)
    found["q_noise_frac_ks_p_lt_alpha"] = np.mean([value < p_alpha for value in tests])

    found["buckets"] = {}
    for query_bucket in sorted(set(q_buckets) - {0}):
        for key_bucket in sorted(set(k_buckets)):
            if key_bucket >= query_bucket or not is_visible(span(query_bucket), span(key_bucket), window):
                continue
            mean_position = np.mean([i for i, b in zip(p, q_buckets, strict=True) if b == query_bucket])
            m = alpha + beta * mean_position
            keys = [i for i, b in enumerate(k_buckets) if b == key_bucket]
            values = []
            for one, other in combinations(keys, 2):
                if key_examples[one] == key_examples[other]:
                    difference = k[one] - k[other]
                    spread = math.sqrt(sum(v * d * d for v, d in zip(variances, difference, strict=True)))
                    prefers = scipy.stats.norm.cdf((m @ difference) / spread)
                    values.append(4 * prefers * (1 - prefers))
            found["buckets"][query_bucket, key_bucket] = np.mean(values) if values else math.nan
    known = [value for value in found["buckets"].values() if not math.isnan(value)]
    found["ap_overall"] = np.mean(known) if known else math.nan

    floored = [max(value, 0.0) for value in component_r2]
    found["component_r2"] = component_r2
    found["component_weight"] = [v / sum(floored) if sum(floored) else 1 / dims for v in floored]
    return found


def is_visible(queries: tuple[int, int], keys: tuple[int, int], window: int | None) -> bool:
    """Whether some query position p of the one range and some key position of the other lie within (p - window, p]."""
    for p in range(queries[0], queries[1] + 1):
        for j in range(keys[0], keys[1] + 1):
            if j <= p and (window is None or j > p - window):
                return True
    return False


def ewm(x: np.ndarray, positions: np.ndarray, time: int, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and covariance of the queries at `time`, row by row from the weights of the definition."""
    observed = sorted({int(p) for p in positions if p <= time})
    weight, first = 0.0, np.zeros(x.shape[1])
    second = np.zeros((x.shape[1], x.shape[1]))
    for age, position in enumerate(reversed(observed)):
        rows = [row.astype(np.float64) for row, p in zip(x, positions, strict=True) if p == position]
        w = (1 - alpha) ** age
        weight += w
        first += w * np.mean(rows, axis=0)
        second += w * np.mean([np.outer(row, row) for row in rows], axis=0)
    mean = first / weight
    return mean, second / weight - np.outer(mean, mean)


def spans(size: int) -> tuple[Bucket, Span]:
    """Returns the bucket and span functions of a uniform sampler."""
    return (lambda position: position // size), (lambda bucket: (bucket * size, (bucket + 1) * size - 1))


def log_spans(size: int) -> tuple[Bucket, Span]:
    """Returns the bucket and span functions of a log_uniform sampler."""
    lowest = math.ceil(math.log2(size))
    edges = [0, *(2**b - 1 for b in range(lowest + 1, 40))]

    def bucket(position: int) -> int:
        return lowest + next(i for i, (start, stop) in enumerate(pairwise(edges)) if start <= position < stop)

    return bucket, lambda b: (edges[b - lowest], edges[b - lowest + 1] - 1)
