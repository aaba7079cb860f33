"""Checks parts of the estimators alone: the draw of neighbouring pairs, and degenerate cases."""

import numpy as np
import pytest

from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.drift import orientation
from qk_sniffer.plasticity.estimators import FullCovariance, plasticity, standardised
from qk_sniffer.plasticity.key_pairs import KeyGroups, generator


def full_covariance() -> FullCovariance:
    queries = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    return FullCovariance(queries, np.arange(50), np.array([20.0]), 0.1)


def test_neighbours_are_drawn_from_long_examples_more_often_and_near_each_other() -> None:
    sizes = (200, 40, 2, 1)  # the last example has no pair
    example = np.repeat(np.arange(4), sizes)
    place = np.concatenate([np.arange(size) for size in sizes])
    groups = KeyGroups(np.zeros(len(place)), example, place * 7)
    first, second = full_covariance().draw(groups, 0, 24_200, generator(0, 0, 0, 3))
    assert (example[first] == example[second]).all() and (first != second).all()
    counts = np.bincount(example[first], minlength=4)
    # In proportion to 200 : 40 : 2, within four standard deviations of the counts.
    np.testing.assert_allclose(counts, [20_000, 4_000, 200, 0], atol=4 * np.sqrt(4_000))
    distance = np.abs(place[first] - place[second])
    assert [distance[example[first] == number].max() for number in range(3)] == [10, 2, 1]
    near = np.bincount(distance[(example[first] == 0)], minlength=11)[1:]
    assert near.min() > 1_500, "all distances are about equally frequent"
    is_ascending = (place[first] < place[second]).mean()
    assert 0.48 < is_ascending < 0.52, "the order within a pair is random"
    assert len(full_covariance().draw(groups, 1, 10, generator(0, 0, 0, 3))[0]) == 0


def test_without_a_variance_the_sign_of_the_mean_decides() -> None:
    z = standardised(np.array([2.0, -3.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.0, 4.0]))
    assert z.tolist() == [np.inf, -np.inf, 0.0, 0.5]
    assert plasticity(z).tolist()[:3] == [0.0, 0.0, 1.0]
    assert plasticity(z)[3] == pytest.approx(4 * 0.6914624612740131 * 0.3085375387259869)


def test_a_bucket_at_a_time_gives_what_all_of_them_give() -> None:
    queries = np.random.default_rng(1).normal(size=(200, 4)).astype(np.float32)
    estimator = FullCovariance(queries, np.arange(200), np.array([20.0, 90.0, 170.0]), 0.05)
    differences = np.random.default_rng(2).normal(size=(6, 4))
    together = estimator.z(differences, slice(0, 3))
    for bucket in range(3):
        np.testing.assert_allclose(estimator.z(differences, slice(bucket, bucket + 1))[0], together[bucket], rtol=1e-12)
    assert estimator.z(differences, slice(1, 1)).shape == (0, 6)


def test_orientation_weighs_buckets_alike_and_takes_0_for_positive() -> None:
    keys = np.array([[1, -1, 0, 1], [1, -1, 0, 1], [1, -1, 0, 1], [-2, 2, 0, -1]], np.float32)
    assert orientation(keys, np.array([0, 0, 0, 1])).tolist() == [-1.0, 1.0, 1.0, 1.0]


def test_weights_are_even_where_nothing_is_explained() -> None:
    assert tables.weights([0.0, -0.5, 0.0, -1.0]) == [0.25] * 4
    assert tables.weights([0.3, -0.5, 0.1, 0.0]) == pytest.approx([0.75, 0.0, 0.25, 0.0])
