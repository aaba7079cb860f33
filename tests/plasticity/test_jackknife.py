"""Checks the jackknife: its formulas on means, its groups, and its samples against a slow reference."""

from functools import partial

import numpy as np
import pytest
import scipy.stats
from support.plasticity_reference import ewm

from qk_sniffer.plasticity.jackknife import GROUPS, FullCovarianceReplicates, as_replicates, groups_of, left_out
from qk_sniffer.plasticity.key_pairs import KeyGroups
from qk_sniffer.plasticity.resampling import Clusters
from qk_sniffer.plasticity.uncertainty import Uncertainty, estimate, quantile


def means_of(values: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The mean over the texts of each sample."""
    found: np.ndarray = samples @ values / samples.sum(axis=1)
    return found


def test_the_jackknife_of_a_mean_is_its_standard_error_and_of_a_square_its_bias() -> None:
    """With a text in each group, the jackknife of a mean is s / sqrt(n). That of its square removes all of its bias."""
    values = np.random.default_rng(0).normal(3, 1, GROUPS)
    samples = np.concatenate([np.ones((1, GROUPS)), 1 - np.eye(GROUPS)])
    mean = means_of(values, samples)
    error = values.std(ddof=1) / np.sqrt(GROUPS)
    found = estimate(as_replicates(mean, samples), quantile=quantile(groups_of(samples)))
    assert (found.value, found.corrected, found.se) == pytest.approx((values.mean(), values.mean(), error), rel=1e-5)
    half = scipy.stats.t.ppf(0.975, GROUPS - 1) * error
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-5)
    square = estimate(as_replicates(mean**2, samples))
    assert square.corrected == pytest.approx(values.mean() ** 2 - error**2, rel=1e-5)


@pytest.mark.parametrize("texts", [6, 25, 300])
def test_groups_of_any_size_have_the_error_of_the_mean(texts: int) -> None:
    """A few texts leave groups empty, and many make their sizes differ."""
    samples = left_out(0, np.arange(texts))
    assert (groups_of(samples) < GROUPS) == (texts < 60)
    random = np.random.default_rng(1)
    variances = [
        estimate(as_replicates(means_of(random.normal(size=texts), samples), samples)).se ** 2 for _ in range(2000)
    ]
    assert np.mean(variances) * texts == pytest.approx(1, abs=0.06)


def test_a_group_is_the_text_s_own_and_one_group_leaves_nothing() -> None:
    some, more = left_out(3, [5, 9]), left_out(3, [-4, 5, 7, 9])
    np.testing.assert_array_equal(some, more[:, [1, 3]])
    assert (more[0] == 1).all() and (more[1:] == 0).sum(axis=0).tolist() == [1] * 4
    assert np.isnan(estimate(as_replicates(np.ones(1 + GROUPS), left_out(3, [5])))[1:]).all()


def test_samples_of_the_full_covariance_are_measured_without_the_texts() -> None:
    random = np.random.default_rng(2)
    texts = np.repeat(np.arange(40), 8)
    positions = np.tile(np.arange(8) * 2, 40) + random.integers(0, 2, 320)
    queries = (random.normal(size=(320, 3)) + np.outer(positions, [0.1, -0.1, 0.0])).astype(np.float32)
    keys = random.normal(size=(320, 3))
    clusters = Clusters(np.arange(40), left_out(0, np.arange(40)))
    measured = FullCovarianceReplicates(queries, positions, positions // 8, texts, clusters, 0, 0.1)
    one, other = KeyGroups(positions // 8, texts, positions).draw(0, 10**6, random)
    measured.add(0, range(1, 2), partial(np.copy, keys[one] - keys[other]), texts[one])
    result = measured.result()

    def plasticity(sample: np.ndarray, *, is_null: bool) -> float:
        kept, pairs = sample[texts] > 0, sample[texts[one]] > 0
        x, p = queries[kept], positions[kept]
        late = p[p >= 8]
        time = max(int(each) for each in late if each <= late.mean())
        mean, covariance = (x.mean(axis=0), np.cov(x.T, ddof=0)) if is_null else ewm(x, p, time, 0.1)
        d = (keys[one] - keys[other])[pairs]
        prefers = scipy.stats.norm.cdf(d @ mean / np.sqrt(np.einsum("md,de,me->m", d, covariance, d)))
        return float(np.mean(4 * prefers * (1 - prefers)))

    for name, is_null in (("ap_overall", False), ("ap_null", True)):
        found = result.of_head[name]
        expected = np.array([plasticity(sample, is_null=is_null) for sample in clusters.weights])
        # The formulas of the source, for groups with texts.
        whole, of_group = expected[0], 40 - clusters.weights[1:].sum(axis=1)
        h, without = 40 / of_group[of_group > 0], expected[1:][of_group > 0]
        jackknife = len(h) * whole - ((1 - 1 / h) * without).sum()
        variance = np.mean((h * whole - (h - 1) * without - jackknife) ** 2 / (h - 1))
        assert found.value == pytest.approx(whole, rel=1e-6)
        assert (found.corrected, found.se) == pytest.approx((min(1, jackknife), np.sqrt(variance)), rel=1e-4), name


@pytest.mark.slow
def test_intervals_of_the_full_covariance_contain_the_truth() -> None:
    """In samples of 40 texts, whose queries depend on their text. The truth is the value of a very large sample."""
    slope = np.array([1.5, -1.5, 0.7, 0.0])

    def measured(random: np.random.Generator, texts: int, samples: np.ndarray, pairs: int) -> Uncertainty:
        of_text, positions = np.repeat(np.arange(texts), 16), np.tile(np.arange(0, 64, 4), texts)
        positions = positions + random.integers(0, 4, len(positions))
        queries = 0.2 + np.outer(positions / 64 - 0.5, slope) + random.normal(size=(len(positions), 4))
        queries += 0.5 * random.normal(size=(texts, 4))[of_text]
        keys, groups = random.normal(size=queries.shape), KeyGroups(positions // 16, of_text, positions)
        clusters = Clusters(np.arange(texts), samples)
        found = FullCovarianceReplicates(
            queries.astype(np.float32), positions, positions // 16, of_text, clusters, 0, 0.1
        )
        for bucket in range(3):
            one, other = groups.draw(bucket, pairs, random)
            found.add(bucket, range(bucket + 1, 4), partial(np.copy, keys[one] - keys[other]), of_text[one])
        return found.result()

    true = measured(np.random.default_rng(10**6), 6000, np.ones((1 + GROUPS, 6000)), 20_000).of_head
    random, inside, biases = np.random.default_rng(1), dict.fromkeys(true, 0), np.zeros(2)
    for seed in range(200):
        found = measured(random, 40, left_out(seed, np.arange(40)), 64).of_head
        for name, each in found.items():
            inside[name] += each.low <= true[name].value <= each.high
        biases += np.subtract([found["ap_overall"].value, found["ap_overall"].corrected], true["ap_overall"].value)
    assert all(0.88 * 200 <= number <= 0.99 * 200 for number in inside.values()), inside
    assert biases[0] < -0.002 * 200 and abs(biases[1]) < abs(biases[0]) / 2, biases / 200
