"""Compares the sampler with its definition, written again in plain Python integers, and tests its statistics."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qk_sniffer.capture.sampling import LONGEST_TABLE, Sampler, counter_hash, problems
from qk_sniffer.config import KeySamplerConfig, SamplerConfig
from qk_sniffer.errors import ConfigError

TABLE = Path(__file__).parents[1] / "data" / "sampled_rows.json"
MASK = 2**64 - 1
# A wrong sampler exceeds this by far. The draws are the same in every run.
ALPHA = 1e-3

UNIFORM = SamplerConfig(type="uniform")
CONFIGS = {
    "log_uniform": SamplerConfig(),
    "log_uniform_odd": SamplerConfig(min_bucket_size=100, base_rate=2.5, seed=3),
    "log_uniform_one": SamplerConfig(min_bucket_size=1, base_rate=0.75),
    "uniform": UNIFORM,
    "uniform_odd": SamplerConfig(type="uniform", min_bucket_size=37, base_rate=3.0, seed=-5),
    "uniform_full": SamplerConfig(type="uniform", min_bucket_size=8, base_rate=9.0),
    "all": SamplerConfig(type="all", min_bucket_size=64),
    "shared": SamplerConfig(type="uniform", min_bucket_size=64, base_rate=4.0, share="example", seed=2**40),
    "capped": SamplerConfig(type="uniform", min_bucket_size=16, max_rows_per_example=7),
    "capped_all": SamplerConfig(type="all", min_bucket_size=16, max_rows_per_example=5, share="example"),
    "other_keys": SamplerConfig(type="uniform", keys=KeySamplerConfig(type="all")),
    "denser_keys": SamplerConfig(min_bucket_size=64, keys=KeySamplerConfig(base_rate=6.0)),
    "shared_denser_keys": SamplerConfig(share="example", keys=KeySamplerConfig(base_rate=8.0)),
}
CASES = [(-7, 0, "q", 700), (0, 3, "q", 1500), (2**31 - 1, 3, "k", 1500), (41, 35, "k", 255), (5, 1, "q", 1)]


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def reference_hash(*words: int) -> int:
    state = 0
    for word in words:
        state = mix(state ^ mix((word + 0x9E3779B97F4A7C15) & MASK))
    return state


def reference_bucket(config: SamplerConfig, kind: str, position: int) -> tuple[int, int]:
    """Returns (bucket, number of positions that it spans)."""
    if rule_of(config, kind)[0] != "log_uniform":
        return position // config.min_bucket_size, config.min_bucket_size
    low = 0
    while 2**low < config.min_bucket_size:
        low += 1
    bucket = max(low, (position + 1).bit_length() - 1)
    return bucket, 2 ** (low + 1) - 1 if bucket == low else 2**bucket


def reference_positions(
    config: SamplerConfig, example_id: int, layer: int, kind: str, count: int, start: int = 0
) -> list[int]:
    sampler_type, base_rate = rule_of(config, kind)
    stream = (layer, "qk".index(kind)) if config.share == "layer_kind" else ()
    kept = {}
    for position in range(start, start + count):
        value = reference_hash(config.seed, example_id, *stream, position)
        width = reference_bucket(config, kind, position)[1]
        p = 1.0 if sampler_type == "all" else min(1.0, base_rate / width)
        if Fraction(value >> 11, 2**53) < Fraction(p):
            kept[position] = value
    return sorted(sorted(kept, key=kept.__getitem__)[: config.max_rows_per_example])


def rule_of(config: SamplerConfig, kind: str) -> tuple[str, float]:
    if kind == "q":
        return config.type, config.base_rate
    rate = config.keys.base_rate
    return config.keys.type or config.type, config.base_rate if rate is None else rate


def config_from(values: dict[str, Any]) -> SamplerConfig:
    return SamplerConfig(**{**values, "keys": KeySamplerConfig(**values.get("keys", {}))})


def test_the_mixer_is_that_of_splitmix64() -> None:
    # The first outputs of SplitMix64 for the seed 1234567, as published with the algorithm.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + n * 0x9E3779B97F4A7C15) & MASK) for n in (1, 2, 3)] == expected


@pytest.mark.parametrize("words", [(0,), (1, 2, 3), (-1, 2**31 - 1, -(2**63), 2**63 - 1)])
def test_hash_agrees_with_plain_integers(words: tuple[int, ...]) -> None:
    assert counter_hash(*words).tolist() == [reference_hash(*words)]


def test_hash_takes_arrays() -> None:
    last = np.array([-3, 0, 5, 2**40])
    assert counter_hash(9, last, 1).tolist() == [reference_hash(9, word, 1) for word in last.tolist()]


@pytest.mark.few(10)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_positions_agree_with_the_definition(name: str, case: tuple[int, int, str, int]) -> None:
    kept = Sampler(CONFIGS[name]).positions(*case)
    assert kept.dtype == np.int32
    assert kept.tolist() == reference_positions(CONFIGS[name], *case)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("start", [LONGEST_TABLE - 300, 2**31 - 1501])
def test_far_positions_agree_with_the_definition_and_take_no_memory_of_their_own(name: str, start: int) -> None:
    sampler = Sampler(CONFIGS[name])
    tracemalloc.start()
    kept = {kind: sampler.plan([5], [1500], [(2, kind)], starts=[start])[2, kind].position for kind in "qk"}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {kind: positions.tolist() for kind, positions in kept.items()} == {
        kind: reference_positions(CONFIGS[name], 5, 2, kind, 1500, start) for kind in "qk"
    }
    assert peak < 1e6


def test_rows_have_not_drifted() -> None:
    cases = json.loads(TABLE.read_text())["cases"]
    assert {case["sampler"].get("type", "log_uniform") for case in cases} == {"uniform", "log_uniform", "all"}
    for case in cases:
        sampler = Sampler(config_from(case["sampler"]))
        kept = sampler.positions(case["example_id"], case["layer"], case["kind"], case["num_tokens"])
        assert kept.tolist() == case["positions"], case


@pytest.mark.parametrize("name", ["log_uniform", "log_uniform_odd", "log_uniform_one", "uniform", "uniform_odd"])
def test_buckets_are_exact_up_to_the_last_position(name: str) -> None:
    powers = [2**n for n in range(32)]
    multiples = [37 * (2**31 // 37), 128 * 12345, 100]
    near = {p + d for p in (*powers, *multiples) for d in (-2, -1, 0, 1)}
    positions = sorted(p for p in near if 0 <= p < 2**31)
    assert positions[-1] == 2**31 - 1
    sampler = Sampler(CONFIGS[name])
    buckets = sampler.bucket("q", positions)
    assert buckets.dtype == np.int32
    expected = [reference_bucket(CONFIGS[name], "q", p) for p in positions]
    assert buckets.tolist() == [bucket for bucket, _ in expected]
    rate = CONFIGS[name].base_rate
    assert sampler.probability("q", buckets).tolist() == [min(1.0, rate / width) for _, width in expected]
    for position, (bucket, width) in zip(positions, expected, strict=True):
        first, last = sampler.span("q", bucket)
        assert first <= position <= last and last - first + 1 == width


def test_a_bucket_below_the_lowest_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket 6 does not exist: the lowest is 7"):
        Sampler(SamplerConfig()).probability("q", [8, 6])


def test_inclusion_lists_the_buckets_of_all_positions() -> None:
    sampler = Sampler(SamplerConfig(min_bucket_size=100, keys=KeySamplerConfig(type="all")))
    assert sampler.inclusion("q", 0) == {}
    assert sampler.inclusion("q", 255) == {7: 1 / 255}
    assert sampler.inclusion("q", 512) == {7: 1 / 255, 8: 1 / 256, 9: 1 / 512}
    assert sampler.inclusion("k", 201) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_a_rate_above_the_width_keeps_everything() -> None:
    sampler = Sampler(SamplerConfig(base_rate=300.0))
    # Bucket 7 spans 255 positions, bucket 8 spans 256, bucket 9 spans 512 and keeps about 300 of them.
    kept = sampler.positions(1, 2, "q", 1023)
    assert kept[:511].tolist() == list(range(511))
    assert 200 < len(kept) - 511 < 400


@pytest.mark.parametrize("name", ["log_uniform", "log_uniform_odd", "shared", "denser_keys", "uniform_full"])
def test_rows_do_not_depend_on_max_length(name: str) -> None:
    sampler = Sampler(CONFIGS[name])
    whole = sampler.positions(9, 4, "k", 10_000)
    for cut in (1, 254, 255, 4095, 4096, 4097, 9_999):
        assert sampler.positions(9, 4, "k", cut).tolist() == whole[whole < cut].tolist()


@pytest.mark.parametrize(
    "name", ["log_uniform", "uniform_odd", "shared", "capped", "other_keys", "capped_all", "shared_denser_keys"]
)
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    rng = np.random.default_rng(0)
    sampler = Sampler(CONFIGS[name])
    ids = [0, 1, -4, 2**31 - 1, 17, 18]
    lengths = [1000, 1, 0, 4097, 333, 1000]
    layer_kinds = [(layer, kind) for layer in (0, 5, 6) for kind in "kq"]
    for order in (rng.permutation(6), rng.permutation(6)[:3], np.array([2])):
        plan = sampler.plan([ids[i] for i in order], [lengths[i] for i in order], layer_kinds)
        assert list(plan) == layer_kinds
        for (layer, kind), picks in plan.items():
            assert picks.row.dtype == picks.position.dtype == np.int32
            assert np.all(np.diff(picks.row) >= 0)
            for row, i in enumerate(order):
                alone = Sampler(CONFIGS[name]).positions(ids[i], layer, kind, lengths[i])
                assert picks.position[picks.row == row].tolist() == alone.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_values_have_the_positions_of_keys_and_outputs_those_of_queries(name: str) -> None:
    sampler = Sampler(CONFIGS[name])
    plan = sampler.plan([5, -7], [700, 90], [(layer, kind) for layer in (0, 3) for kind in "ovkq"])
    for layer in (0, 3):
        assert plan[layer, "v"] is plan[layer, "k"] and plan[layer, "o"] is plan[layer, "q"]
        for kind, of in (("v", "k"), ("o", "q")):
            expected = reference_positions(CONFIGS[name], 5, layer, of, 700)
            assert sampler.positions(5, layer, kind, 700).tolist() == expected
            assert sampler.bucket(kind, expected).tolist() == sampler.bucket(of, expected).tolist()


def test_an_empty_batch_has_an_empty_plan() -> None:
    assert len(Sampler(SamplerConfig()).plan([], [], [(0, "q")])[0, "q"].row) == 0


@pytest.mark.parametrize(
    "config",
    [
        UNIFORM,
        replace(UNIFORM, min_bucket_size=100, base_rate=30.0),
        SamplerConfig(),
        SamplerConfig(min_bucket_size=100, base_rate=5.0),
        SamplerConfig(min_bucket_size=1, base_rate=0.5),
    ],
    ids=["uniform", "uniform_odd", "log_uniform", "log_uniform_odd", "log_uniform_one"],
)
def test_counts_per_bucket_are_as_expected(config: SamplerConfig) -> None:
    sampler, examples, layers = Sampler(config), 500, 8
    num_tokens = 2**12 - 1 if config.type == "log_uniform" else 4000 // config.min_bucket_size * config.min_bucket_size
    plan = sampler.plan(range(examples), [num_tokens] * examples, [(layer, "q") for layer in range(layers)])
    positions = np.concatenate([picks.position for picks in plan.values()])
    buckets, observed = np.unique(sampler.bucket("q", positions), return_counts=True)
    widths = np.array([last - first + 1 for first, last in (sampler.span("q", b) for b in buckets.tolist())])
    assert widths.sum() == num_tokens
    p, draws = sampler.probability("q", buckets), examples * layers
    # Every bucket expects base_rate rows, the lowest one too.
    np.testing.assert_allclose(p * widths, config.base_rate)
    chi2 = np.sum((observed - draws * widths * p) ** 2 / (draws * widths * p * (1 - p)))
    assert ALPHA < stats.chi2.sf(chi2, len(buckets)) < 1 - ALPHA
    # Within a bucket all positions are equally likely.
    largest = positions[sampler.bucket("q", positions) == buckets[-1]]
    parts = np.histogram(largest, bins=10, range=(sampler.span("q", buckets[-1])[0], num_tokens))[0]
    if widths[-1] % 10 == 0 or widths[-1] >= 1000:
        assert stats.chisquare(parts).pvalue > ALPHA


FAIR = SamplerConfig(type="uniform", min_bucket_size=2)
RARE = SamplerConfig(type="uniform", min_bucket_size=64)


@pytest.mark.few(3)
@pytest.mark.parametrize("config", [FAIR, RARE], ids=["half", "one in 64"])
@pytest.mark.parametrize("differs_in", ["layer", "kind", "example", "seed", "position"])
def test_streams_are_independent(config: SamplerConfig, differs_in: str) -> None:
    num_tokens = 2**18

    def stream(seed: int = 0, example: int = 7, layer: int = 3, kind: str = "q") -> np.ndarray:
        kept = np.zeros(num_tokens, dtype=bool)
        kept[Sampler(replace(config, seed=seed)).positions(example, layer, kind, num_tokens)] = True
        return kept

    base = stream()
    others = {
        "layer": lambda: [stream(layer=layer) for layer in (0, 1, 2, 4, 7, 11)],
        "kind": lambda: [stream(kind="k"), stream(kind="k", layer=4)],
        "example": lambda: [stream(example=example) for example in (-7, 3, 6, 8, 7 + 2**16)],
        "seed": lambda: [stream(seed=seed) for seed in (-1, 1, 3, 7, 2**32)],
        "position": lambda: [np.roll(base, shift) for shift in (1, 2, 64, 4096)],
    }[differs_in]()
    p_values = []
    for other in others:
        cells = np.bincount(base * 2 + other.astype(int), minlength=4).reshape(2, 2)
        p_values.append(stats.chi2_contingency(cells, correction=False).pvalue)
    assert min(p_values) > ALPHA / len(p_values)


def test_many_streams_are_jointly_independent() -> None:
    # Six streams of fair bits: all 64 combinations are equally frequent.
    plan = Sampler(FAIR).plan([12, 13], [2**17] * 2, [(layer, kind) for layer in (0, 1, 2) for kind in "qk"])
    combination = np.zeros(2**18, dtype=int)
    for bit, picks in enumerate(plan.values()):
        combination[picks.row * 2**17 + picks.position] += 1 << bit
    assert stats.chisquare(np.bincount(combination, minlength=64)).pvalue > ALPHA


def test_uniform_numbers_are_uniform() -> None:
    values = counter_hash(0, 1, 2, 0, np.arange(2**18)) / 2.0**64
    assert stats.kstest(values, "uniform").pvalue > ALPHA


def test_share_example_keeps_the_same_tokens_everywhere() -> None:
    sampler = Sampler(replace(UNIFORM, share="example"))
    layer_kinds = [(layer, kind) for layer in range(4) for kind in "qk"]
    plan = sampler.plan([3, 4], [5000, 4000], layer_kinds)
    assert len({id(picks) for picks in plan.values()}) == 1
    for example_id, row in ((3, 0), (4, 1)):
        assert set(plan[0, "q"].position[plan[0, "q"].row == row]) != set(
            Sampler(UNIFORM).positions(example_id, 0, "q", 5000)
        )
    assert set(sampler.positions(3, 0, "q", 5000)) != set(sampler.positions(4, 0, "q", 5000))


def test_shared_tokens_are_nested_where_the_keys_are_denser() -> None:
    config = replace(UNIFORM, share="example", keys=KeySamplerConfig(base_rate=8.0))
    queries, keys = (set(Sampler(config).positions(3, 0, kind, 50_000).tolist()) for kind in "qk")
    assert queries < keys


def test_keys_differ_only_in_their_own_settings() -> None:
    plain = Sampler(UNIFORM)
    for keys, alike in (
        (KeySamplerConfig(), UNIFORM),
        (KeySamplerConfig(base_rate=4.0), replace(UNIFORM, base_rate=4.0)),
        (KeySamplerConfig(type="log_uniform"), replace(UNIFORM, type="log_uniform")),
        (KeySamplerConfig(type="all", base_rate=2.0), replace(UNIFORM, type="all")),
    ):
        sampler = Sampler(replace(UNIFORM, keys=keys))
        assert sampler.positions(1, 2, "q", 9000).tolist() == plain.positions(1, 2, "q", 9000).tolist()
        assert sampler.positions(1, 2, "k", 9000).tolist() == Sampler(alike).positions(1, 2, "k", 9000).tolist()
        assert sampler.inclusion("k", 9000) == Sampler(alike).inclusion("k", 9000)
        assert sampler.same_rule() == (keys == KeySamplerConfig())


@pytest.mark.parametrize("sampler_type", ["uniform", "log_uniform", "all"])
def test_max_rows_keeps_the_smallest_hashes(sampler_type: str) -> None:
    config = SamplerConfig(type=sampler_type, min_bucket_size=64, base_rate=4.0)
    unlimited = set(Sampler(config).positions(8, 1, "q", 3000).tolist())
    before: set[int] = set()
    for limit in (1, 2, 9, len(unlimited) - 1, len(unlimited), 10**6):
        kept = Sampler(replace(config, max_rows_per_example=limit)).positions(8, 1, "q", 3000)
        assert len(kept) == min(limit, len(unlimited))
        assert np.all(np.diff(kept) > 0)
        chosen = set(kept.tolist())
        assert before <= chosen <= unlimited
        left = [reference_hash(0, 8, 1, 0, position) for position in unlimited - chosen]
        assert max(reference_hash(0, 8, 1, 0, position) for position in chosen) < min(left, default=2**64)
        before = chosen


def test_max_rows_counts_each_example_alone() -> None:
    config = replace(UNIFORM, min_bucket_size=8, max_rows_per_example=10)
    picks = Sampler(config).plan([1, 2, 3], [4000, 8, 2000], [(0, "k")])[0, "k"]
    counts = np.bincount(picks.row, minlength=3)
    assert counts[0] == counts[2] == 10 and counts[1] <= 8


def test_bad_values_are_named_together() -> None:
    config = SamplerConfig(
        type="log", base_rate=0.0, min_bucket_size=0, max_rows_per_example=0, share="all",
        keys=KeySamplerConfig(type="every", base_rate=float("nan")),
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        Sampler(config)
    keys = ("type", "keys.type", "share", "base_rate", "keys.base_rate", "min_bucket_size", "max_rows_per_example")
    assert len(error.value.problems) == len(keys)
    for key, problem in zip(keys, error.value.problems, strict=True):
        assert problem.startswith(f"sampler.{key} is ")
    assert "uniform, log_uniform, all, none, null" in error.value.problems[1]


def test_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "transformers", "scipy", "pyarrow"}
    code = f"import sys, qk_sniffer.capture.sampling; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("options", [{"type": "uniform"}, {"type": "log_uniform"}, {"type": "all"}])
@pytest.mark.parametrize("num_tokens", [1, 7, 100, 1000])
def test_expected_rows_sum_the_probabilities_of_all_positions(options: dict[str, Any], num_tokens: int) -> None:
    sampler = Sampler(SamplerConfig(**options, base_rate=3.0, min_bucket_size=12))
    whole = sampler.probability("q", sampler.bucket("q", np.arange(num_tokens))).sum()
    assert sampler.expected_rows("q", num_tokens) == pytest.approx(whole)
    capped = Sampler(SamplerConfig(**options, base_rate=3.0, min_bucket_size=12, max_rows_per_example=2))
    assert capped.expected_rows("q", num_tokens) == pytest.approx(min(whole, 2))


def test_the_smallest_rate_keeps_no_row() -> None:
    sampler = Sampler(SamplerConfig(type="uniform", base_rate=5e-324))
    assert len(sampler.positions(0, 0, "q", 4096)) == 0


# ---- segments


@pytest.mark.parametrize("sampler_type", ["uniform", "log_uniform", "all"])
@pytest.mark.parametrize("limit", [None, 3])
def test_segments_leave_some_of_the_rows_of_the_same_sampler_without_them(sampler_type: str, limit: int | None) -> None:
    config = SamplerConfig(type=sampler_type, base_rate=6.0, min_bucket_size=16, max_rows_per_example=limit)
    lengths, ids = [40, 7, 130], [11, 12, 13]
    in_segments = np.random.default_rng(0).random(sum(lengths)) < 0.4
    groups = [(layer, kind) for layer in (0, 1) for kind in "qkv"]
    whole = Sampler(config).plan(ids, lengths, groups)
    some = Sampler(replace(config, segments=["assistant"])).plan(ids, lengths, groups, in_segments)
    before = np.concatenate([[0], np.cumsum(lengths)])
    for group in groups:
        kept = in_segments[before[whole[group].row] + whole[group].position]
        assert 0 < kept.sum() < len(kept)
        assert some[group].row.tolist() == whole[group].row[kept].tolist()
        assert some[group].position.tolist() == whole[group].position[kept].tolist()
    assert some[0, "k"] is some[0, "v"]


@pytest.mark.parametrize("names", [[], ["user", "user"]])
def test_segments_must_be_named_once(names: list[str]) -> None:
    assert problems(SamplerConfig(segments=names)) == [
        f"sampler.segments is {names}; it must name at least one segment, and each once"
    ]
