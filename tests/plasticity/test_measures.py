"""Compares the numbers with a slow reference written from the definition, with scipy, and with known answers."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from support.jobs import heads_of, run, vectors
from support.plasticity_cases import ALL_PAIRS, buckets, full_covariance, measure, metrics, record, rewrite
from support.plasticity_reference import ewm, log_spans, reference, spans
from support.verify_cases import edit

from qk_sniffer.dataset.reader import open_dataset, sampler_of
from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.drift import direction, fit_drift, kolmogorov_smirnov_p, normality, reflection_to, shapes
from qk_sniffer.plasticity.key_pairs import KeyGroups, generator
from qk_sniffer.plasticity.measure import KeyHead

WINDOWS = {0: 12, 1: None, 2: 12, 3: None}
"""Sliding windows of the layers of the test model."""


def agree(root: Path, folder: Path, rule: Any) -> None:
    """Compares all three tables of `folder` with the reference."""
    bucket, span = rule
    rows = heads_of(root)
    found, pairs = metrics(folder), buckets(folder)
    weights = tables.read(folder, "head_component_weights")
    heads = sorted((int(name[1:3]), int(name[4:6])) for name in rows if name.endswith("q"))
    assert sorted(found) == heads
    for layer, head in heads:
        q, k = rows[f"l{layer:02d}h{head:02d}q"], rows[f"l{layer:02d}h{head // 2:02d}k"]
        expected = reference(
            vectors(q),
            q["position"].to_numpy(),
            vectors(k),
            k["position"].to_numpy(),
            k["example_id"].to_numpy(),
            bucket,
            span,
            WINDOWS[layer],
        )
        ours = found[layer, head]
        assert (ours["k_head"], ours["n_q_tokens"], ours["n_k_tokens"], ours["d_model"]) == (
            head // 2,
            len(q),
            len(k),
            16,
        )
        for name in (*tables.QUERY_METRICS, "ap_overall"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-8, abs=1e-11), (layer, head, name)
        assert pairs[layer, head].keys() >= expected["buckets"].keys()
        for key, value in pairs[layer, head].items():
            assert value == pytest.approx(expected["buckets"].get(key, np.nan), rel=1e-8, nan_ok=True), (
                layer,
                head,
                key,
            )
        of_head = (weights["layer"] == layer) & (weights["q_head"] == head)
        assert weights["component"][of_head].tolist() == list(range(16))
        for name in ("component_r2", "component_weight"):
            np.testing.assert_allclose(weights[name][of_head], expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_a_captured_dataset_agrees_with_the_reference(verify_base: Path, tmp_path: Path) -> None:
    """The dataset has uniform buckets, grouped queries, and sliding and full layers."""
    assert measure(verify_base, tmp_path / "results") == 0
    agree(verify_base, tmp_path / "results", spans(16))
    seen = buckets(tmp_path / "results")
    assert set(seen[0, 0]) == {(b, b - 1) for b in range(1, 7)}, "a window of 12 reaches only the next bucket of 16"
    assert set(seen[1, 0]) == {(b, c) for b in range(1, 7) for c in range(b)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "rule"),
    [
        ({"type": "log_uniform", "min_bucket_size": 8, "base_rate": 3.0}, log_spans(8)),
        ({"type": "log_uniform", "min_bucket_size": 8, "base_rate": 4.0, "keys": {"type": "all"}}, log_spans(8)),
    ],
    ids=["log_uniform", "all keys"],
)
def test_other_samplers_agree(
    sampler: dict[str, Any], rule: Any, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """Keys with a sampler of their own get the buckets of the queries. The dataset has only drawn heads."""
    capture = {"head_sampling": {"count": 3, "seed": 1}}
    texts.write_text("".join(texts.read_text(encoding="utf-8").splitlines(keepends=True)[:9]), encoding="utf-8")
    root = run(checkpoint, texts, tmp_path / "data", sampler=sampler, capture=capture, verify={"examples": 0})
    assert measure(root, tmp_path / "results") == 0
    agree(root, tmp_path / "results", rule)
    assert len(metrics(tmp_path / "results")) == 3


def test_the_sampler_s_buckets_are_the_stored_ones(verify_base: Path) -> None:
    dataset = open_dataset(verify_base)
    sampler = sampler_of(dataset.manifest)
    for key in dataset.heads:
        table = dataset.table(*key, ["bucket", "position"])
        np.testing.assert_array_equal(sampler.bucket("q", table["position"].to_numpy()), table["bucket"].to_numpy())


@pytest.mark.parametrize("seed", range(12))
def test_shapes_and_ks_are_scipy_s(seed: int) -> None:
    random = np.random.default_rng(seed)
    dims, rows = int(random.integers(1, 7)), int(random.integers(4, 400))
    x = random.standard_t(3, size=(dims, rows)) * random.uniform(1e-3, 1e3, size=(dims, 1))
    x -= x.mean(axis=1, keepdims=True)
    skews, kurtoses = shapes(x, np.zeros(dims, bool))
    deviations = x.std(axis=1, ddof=1)
    p = kolmogorov_smirnov_p(x, deviations, np.arange(dims))
    np.testing.assert_allclose(skews, scipy.stats.skew(x, axis=1, bias=False), rtol=1e-9)
    np.testing.assert_allclose(kurtoses, scipy.stats.kurtosis(x, axis=1, bias=False), rtol=1e-9)
    expected = [
        scipy.stats.kstest(row / deviation, "norm").pvalue for row, deviation in zip(x, deviations, strict=True)
    ]
    np.testing.assert_allclose(p, expected, rtol=1e-9)


@pytest.mark.parametrize("beta", [[0, 0, 0], [1, 0, 0], [-2, 0, 0], [1, 1e-12, 0], [3, -4, 0.5], [-1e-9, 1e-9, 0]])
def test_the_reflection_takes_the_first_unit_vector_to_the_direction(beta: list[float]) -> None:
    u = direction(np.array(beta, float))
    normal = reflection_to(u)
    turned = np.eye(3) - 2 * np.outer(normal, normal)
    np.testing.assert_allclose(turned[0], u, atol=1e-15)
    np.testing.assert_allclose(turned @ turned, np.eye(3), atol=1e-15)
    if not any(beta):
        assert u.tolist() == [1, 0, 0]


def test_constant_components_and_an_exact_line() -> None:
    """The definition of R2 replaces a sum of squares of 0 with 1e-12: a constant counts as explained."""
    positions = np.array([0, 1, 2, 5, 9, 40])
    x = np.stack([2.0 + 0.5 * positions, np.full(6, 1000.1), [1.0, -1, 2, -2, 0, 0]])
    drift = fit_drift(x, positions)
    np.testing.assert_allclose(drift.r2[:2], 1.0)
    np.testing.assert_allclose(drift.beta[:2], [0.5, 0], atol=1e-12)
    is_constant = np.array([True, True, False])
    found = normality(drift.residuals, np.array([0.0, 0.0, 2.0]), is_constant, np.array([1, 2]), 0.01)
    assert np.isnan(found["q_resid0_skew"]) and np.isnan(found["q_resid0_ks_p"])
    assert found["q_noise_med_abs_skew"] == pytest.approx(abs(scipy.stats.skew(drift.residuals[2], bias=False)))


def grid(examples: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions and examples of a dataset with every position of every example."""
    return np.tile(np.arange(length), examples), np.repeat(np.arange(examples), length)


LENGTH, DIMS = 64, 16


def synthetic(root: Path, queries: np.ndarray, keys: np.ndarray, layer: int = 1) -> None:
    """Replaces the vectors of query head 0 and key head 0 of a layer with these (examples x LENGTH, DIMS)."""
    for kind, values in (("q", queries), ("k", keys)):
        positions, examples = grid(len(values) // LENGTH, LENGTH)
        rewrite(root, layer, 0, kind, values, positions, examples)


ESTIMATORS = [
    pytest.param({}, id="regression"),
    pytest.param({"estimator": full_covariance(0.01)}, id="full covariance"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_queries_of_mean_zero_have_plasticity_1(estimator: dict[str, Any], root: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    half = random.normal(size=(20 * LENGTH, DIMS))
    synthetic(root, np.concatenate([half, -half]), random.normal(3, 1, size=(4 * LENGTH, DIMS)))
    measure(root, tmp_path / "results", **estimator)
    np.testing.assert_allclose(list(buckets(tmp_path / "results")[1, 0].values()), 1.0, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_mean_far_out_along_every_difference_has_plasticity_0(
    estimator: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    axis = random.normal(size=DIMS)
    queries = 1e4 * axis + random.normal(size=(20 * LENGTH, DIMS))
    # The keys step along one axis, so that every difference lies along it.
    keys = np.outer(np.arange(4 * LENGTH) + 1.0, axis) + random.normal(scale=1e-3, size=(4 * LENGTH, DIMS))
    synthetic(root, queries, keys)
    measure(root, tmp_path / "results", **estimator)
    assert max(buckets(tmp_path / "results")[1, 0].values()) < 1e-12


def expected_of(means: np.ndarray, covariance: np.ndarray, keys: np.ndarray) -> dict[tuple[int, int], float]:
    """Returns the analytic plasticity of normal queries with these means (buckets, DIMS).

    It takes all pairs of keys in buckets of 16.
    """
    positions, examples = grid(len(keys) // LENGTH, LENGTH)
    values = {}
    for c in range(3):
        rows = np.flatnonzero(positions // 16 == c)
        pairs = [(i, j) for i, j in combinations(rows, 2) if examples[i] == examples[j]]
        differences = np.array([keys[i] - keys[j] for i, j in pairs])
        spread = np.sqrt(np.einsum("md,de,me->m", differences, covariance, differences))
        for b in range(c + 1, 4):
            p = scipy.stats.norm.cdf(differences @ means[b] / spread)
            values[b, c] = float(np.mean(4 * p * (1 - p)))
    return values


def test_normal_queries_have_the_analytic_value(root: Path, tmp_path: Path) -> None:
    """With 20,000 rows around a line, the error of z is about 0.02, and that of plasticity is smaller."""
    random = np.random.default_rng(3)
    alpha, beta = random.normal(size=DIMS), random.normal(scale=0.05, size=DIMS)
    positions, _ = grid(320, LENGTH)
    queries = alpha + np.outer(positions, beta) + 2.0 * random.normal(size=(320 * LENGTH, DIMS))
    keys = random.normal(size=(3 * LENGTH, DIMS))
    synthetic(root, queries, keys)
    measure(root, tmp_path / "results")
    means = np.stack([alpha + beta * (16 * b + 7.5) for b in range(4)])
    expected = expected_of(means, 4.0 * np.eye(DIMS), keys)
    found = buckets(tmp_path / "results")[1, 0]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=0.01), key
    assert min(expected.values()) < 0.8, "otherwise the test could not fail"


@pytest.mark.slow
def test_full_covariance_has_the_analytic_value_where_components_depend(root: Path, tmp_path: Path) -> None:
    """The regression treats rotated components as independent. It is wrong here, and the covariance is right."""
    random = np.random.default_rng(4)
    shape = 0.3 * np.eye(DIMS) + 0.1 * np.ones((DIMS, DIMS))  # all components move together
    mean = np.full(DIMS, 0.4)
    queries = mean + random.normal(size=(320 * LENGTH, DIMS)) @ shape.T
    # Keys are independent, so that neighbours differ like any other two keys.
    keys = random.normal(size=(40 * LENGTH, DIMS)) + random.normal(size=(40 * LENGTH, 1))
    synthetic(root, queries, keys)
    expected = expected_of(np.tile(mean, (4, 1)), shape @ shape.T, keys)
    measure(root, tmp_path / "full", estimator=full_covariance(0.01), num_pairs_per_bucket=5000)
    measure(root, tmp_path / "regression", num_pairs_per_bucket=5000)
    full, regression = (buckets(tmp_path / name)[1, 0] for name in ("full", "regression"))
    for key, value in expected.items():
        assert full[key] == pytest.approx(value, abs=0.02), key
    assert abs(regression[1, 0] - expected[1, 0]) > 0.1


@pytest.mark.slow
def test_a_rotation_changes_nothing_of_the_full_covariance(root: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    rotation = scipy.stats.ortho_group.rvs(DIMS, random_state=5)
    positions, _ = grid(40, LENGTH)
    mean, drift, shape = (
        random.normal(size=DIMS),
        random.normal(scale=0.02, size=DIMS),
        random.normal(size=(DIMS, DIMS)),
    )
    queries = mean + np.outer(positions, drift) + random.normal(size=(40 * LENGTH, DIMS)) @ shape.T
    keys = random.normal(size=(6 * LENGTH, DIMS))
    found = {}
    for name, turn in (("as it is", np.eye(DIMS)), ("turned", rotation)):
        synthetic(root, queries @ turn, keys @ turn)
        for kind, settings in (("full", {"estimator": full_covariance(0.05)}), ("regression", {})):
            measure(root, tmp_path / f"{name} {kind}", num_pairs_per_bucket=256, **settings)
            found[name, kind] = np.array(list(buckets(tmp_path / f"{name} {kind}")[1, 0].values()))
    np.testing.assert_allclose(found["turned", "full"], found["as it is", "full"], atol=1e-5)
    assert np.abs(found["turned", "regression"] - found["as it is", "regression"]).max() > 1e-3


@pytest.mark.slow
def test_the_exponential_weights_are_those_of_the_definition(root: Path, tmp_path: Path) -> None:
    """With a single pair of keys, each value depends on one mean and one covariance."""
    random = np.random.default_rng(6)
    count = 90
    positions, examples = np.sort(random.integers(0, LENGTH, count)), np.arange(count)
    queries = random.normal(size=(count, DIMS)) + np.outer(positions, random.normal(scale=0.1, size=DIMS))
    rewrite(root, 1, 0, "q", queries, positions, examples)
    keys = random.normal(size=(2, DIMS))
    rewrite(root, 1, 0, "k", keys, [3, 9], [0, 0])
    measure(root, tmp_path / "results", estimator=full_covariance(0.1))
    found = buckets(tmp_path / "results")[1, 0]
    difference = keys[0].astype(np.float32).astype(np.float64) - keys[1].astype(np.float32)
    for b in (1, 2, 3):
        inside = positions[positions // 16 == b]
        time = max(int(p) for p in inside if p <= inside.mean())
        mean, covariance = ewm(queries.astype(np.float32), positions, time, 0.1)
        p = scipy.stats.norm.cdf(difference @ mean / np.sqrt(difference @ covariance @ difference))
        assert found[b, 0] == pytest.approx(4 * p * (1 - p), rel=1e-8)


def test_pairs_are_drawn_evenly_and_only_within_an_example_and_bucket() -> None:
    random = np.random.default_rng(0)
    sizes = {(0, 7): 2, (0, 3): 5, (0, 9): 1, (1, 3): 4, (1, 9): 40}
    rows = random.permutation([(b, e) for (b, e), size in sizes.items() for _ in range(size)])
    bucket, example = rows.T
    groups = KeyGroups(bucket, example, np.arange(len(rows)))
    counts: dict[tuple[int, int], int] = {}
    for seed in range(400):
        first, second = groups.draw(1, 100, generator(seed, 0, 0, 3))
        assert len({frozenset(pair) for pair in zip(first, second, strict=True)}) == 100, "no pair occurs twice"
        assert (example[first] == example[second]).all() and (bucket[first] == 1).all() and (bucket[second] == 1).all()
        for pair in zip(first.tolist(), second.tolist(), strict=True):
            counts[min(pair), max(pair)] = counts.get((min(pair), max(pair)), 0) + 1
    total = 6 + 780
    assert len(counts) == total
    test = scipy.stats.chisquare(list(counts.values()))
    assert test.pvalue > 1e-4
    first, second = groups.draw(0, ALL_PAIRS, generator(0, 0, 0, 3))
    assert {frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)} == {
        frozenset((i, j))
        for i, j in combinations(range(len(rows)), 2)
        if bucket[i] == bucket[j] == 0 and example[i] == example[j]
    }
    assert len(groups.draw(5, 10, generator(0, 0, 0, 3))[0]) == 0


def test_pairs_of_a_long_example_need_no_memory_of_their_number() -> None:
    size = 300_000  # 45 billion pairs
    groups = KeyGroups(np.zeros(size, int), np.zeros(size, int), np.arange(size))
    first, second = groups.draw(0, 5000, generator(0, 0, 0, 3))
    assert (first < second).all() and first.min() >= 0 and second.max() < size
    assert scipy.stats.kstest((second / size) ** 2, "uniform").pvalue > 1e-4, "key i is the second of i pairs"


@pytest.mark.parametrize(
    ("first_query", "last_key", "window", "chunk", "sees"),
    [
        (16, 15, None, None, True),
        (16, 5, 12, None, True),
        (16, 4, 12, None, False),
        (128, 63, 66, None, True),
        (128, 63, 65, None, False),
        (16, 15, None, 16, False),
        (16, 15, None, 32, True),
        (32, 15, None, 32, False),
    ],
)
def test_which_buckets_see_which(
    first_query: int, last_key: int, window: int | None, chunk: int | None, sees: bool
) -> None:
    assert KeyHead(0, 0, (0,), window, chunk).sees(first_query, last_key) is sees


@pytest.mark.slow
def test_draws_depend_on_nothing_but_their_seed(verify_base: Path, tmp_path: Path) -> None:
    small = {"max_tokens_per_head": 150, "normality_max_dims": 4, "num_pairs_per_bucket": 8}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        measure(verify_base, tmp_path / name, seed=seed, **small)
    one, same, other = (metrics(tmp_path / name) for name in "abc")
    assert {row["n_q_tokens"] for row in one.values()} == {row["n_k_tokens"] for row in one.values()} == {150}
    assert str(one) == str(same) and str(one) != str(other)
    whole = metrics_of_all(verify_base, tmp_path)
    for key in one:
        assert one[key]["q_R2_pos"] == pytest.approx(whole[key]["q_R2_pos"], abs=0.2)
    assert record(tmp_path / "a")["settings"]["seed"] == 1


def metrics_of_all(root: Path, tmp_path: Path) -> dict[tuple[int, int], dict[str, float]]:
    measure(root, tmp_path / "all")
    return metrics(tmp_path / "all")


@pytest.mark.few(3)
@pytest.mark.parametrize("seed", range(8))
def test_random_small_heads_agree(seed: int, root: Path, tmp_path: Path) -> None:
    """Heads have few rows, 2 to 8 dimensions and repeated positions, in a layer with or without a window."""
    random = np.random.default_rng(seed)
    layer, dims = int(random.integers(0, 2)), int(random.integers(2, 9))
    edit(root, lambda manifest: manifest["model"]["layers"][layer].update(head_dim=dims))
    rows = {}
    for kind, count in (("q", int(random.integers(4, 40))), ("k", int(random.integers(1, 60)))):
        positions, examples = random.integers(0, 80, count), random.integers(0, 4, count)
        vectors_ = random.standard_t(4, size=(count, dims)) + np.outer(positions, random.normal(scale=0.02, size=dims))
        for head in (0, 1) if kind == "q" else (0,):
            rewrite(root, layer, head, kind, vectors_, positions, examples)
        rows[kind] = (vectors_.astype(np.float32), positions, examples)
    measure(root, tmp_path / "results")
    (q, positions, _), (k, key_positions, key_examples) = rows["q"], rows["k"]
    expected = reference(q, positions, k, key_positions, key_examples, *spans(16), WINDOWS[layer])
    ours, pairs = metrics(tmp_path / "results")[layer, 0], buckets(tmp_path / "results")[layer, 0]
    for name in (*tables.QUERY_METRICS, "ap_overall"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-7, abs=1e-10, nan_ok=True), name
    assert pairs.keys() >= expected["buckets"].keys()
    for key, value in pairs.items():
        assert value == pytest.approx(expected["buckets"].get(key, np.nan), rel=1e-7, abs=1e-10, nan_ok=True), key
