"""Tests the grouping of a sampler's buckets into lines of a table."""

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import SamplerConfig
from qk_sniffer.dataset.bucket_ranges import BucketRange, bucket_ranges


def test_buckets_of_one_probability_share_ranges() -> None:
    sampler = Sampler(SamplerConfig(type="uniform", min_bucket_size=4))
    ranges = bucket_ranges(sampler, "q", 22, most=3)
    assert ranges == [
        BucketRange([0, 1], 0, 7, 0.25),
        BucketRange([2, 3], 8, 15, 0.25),
        BucketRange([4, 5], 16, 21, 0.25),
    ]
    assert [(one.label, one.positions) for one in ranges] == [
        ("0-1", "0 to 7"),
        ("2-3", "8 to 15"),
        ("4-5", "16 to 21"),
    ]
    assert ranges[0].rows({0: 3, 1: 4, 2: 5}) == 7 and ranges[2].rows({}) == 0


def test_buckets_of_different_probabilities_are_never_joined() -> None:
    sampler = Sampler(SamplerConfig(type="log_uniform", min_bucket_size=1))
    ranges = bucket_ranges(sampler, "k", 2**17, most=12)
    assert [one.buckets for one in ranges] == [[bucket] for bucket in range(18)]
    assert [one.probability for one in ranges] == [2.0**-bucket for bucket in range(18)]


def test_an_empty_dataset_has_no_ranges() -> None:
    assert bucket_ranges(Sampler(SamplerConfig()), "q", 0, most=12) == []
