"""Checks the intervals of plasticity: replicates against datasets of copies, and coverage on data of known truth."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import owens_t
from support.plasticity_cases import ALL_PAIRS, bytes_of, full_covariance, measure, metrics, record, rewrite

from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.drift import (
    components,
    fit_drift,
    normality,
    orientation,
    predictability,
    rotate_residuals,
)
from qk_sniffer.plasticity.estimators import Regression, plasticity
from qk_sniffer.plasticity.key_pairs import KeyGroups, generator
from qk_sniffer.plasticity.resampled_queries import along_drift, of_lines
from qk_sniffer.plasticity.resampling import Clusters, first_signs, replicate_drift, text_weights
from qk_sniffer.plasticity.uncertainty import PlasticityReplicates, Uncertainty, estimate, of_components, of_queries
from qk_sniffer.store.layout import head_name

WIDTH = 16
"""Positions of a bucket."""


@dataclass
class Rows:
    vectors: np.ndarray
    positions: np.ndarray
    texts: np.ndarray

    @property
    def buckets(self) -> np.ndarray:
        return self.positions // WIDTH

    def repeated(self, times: np.ndarray) -> "Rows":
        """Each text as many times as `times` says, as texts of their own."""
        which = np.repeat(np.arange(len(self.positions)), times[self.texts])
        copy = np.concatenate([np.arange(times[text]) for text in self.texts]) if len(which) else which
        return Rows(self.vectors[which], self.positions[which], self.texts[which] + 1000 * copy)


def draw(
    random: np.random.Generator, texts: int, rate: int, alpha: Any, beta: Any, *, buckets: int = 4, effect: float = 0.5
) -> tuple[Rows, Rows]:
    """Queries about alpha + beta (position / length - 1/2), and keys. Each text moves its queries by `effect`."""
    found = []
    for line in ((np.asarray(alpha, float), np.asarray(beta, float)), None):
        positions = np.sort(random.permuted(np.tile(np.arange(WIDTH), (texts * buckets, 1)), axis=1)[:, :rate], axis=1)
        positions = positions + np.tile(np.arange(buckets) * WIDTH, texts)[:, None]
        of_text = np.repeat(np.arange(texts), buckets * rate)
        positions = positions.ravel()
        noise = random.normal(size=(len(positions), len(np.atleast_1d(alpha))))
        if line is not None:
            noise += line[0] + np.outer(positions / (buckets * WIDTH) - 0.5, line[1])
            noise += effect * random.normal(size=(texts, noise.shape[1]))[of_text]
        found.append(Rows(noise.astype(np.float32), positions, of_text))
    return found[0], found[1]


def replicated(queries: Rows, keys: Rows, weights: np.ndarray, pairs: int = ALL_PAIRS) -> Uncertainty:
    """The uncertainty of a head, without files."""
    signs = orientation(keys.vectors, keys.buckets)
    clusters = Clusters(np.arange(weights.shape[1]), weights)
    drift = fit_drift(components(queries.vectors, signs), queries.positions)
    first = first_signs(keys.vectors, keys.buckets, keys.texts, clusters, signs[0])
    found = replicate_drift(drift, queries.positions, queries.buckets, queries.texts, clusters, first)
    measured = PlasticityReplicates(found, clusters, 0, queries.buckets, queries.texts)
    groups = KeyGroups(keys.buckets, keys.texts, keys.positions)
    last = int(queries.buckets.max())
    for bucket in range(last):
        one, other = groups.draw(bucket, pairs, generator(0, 0, 0, 3))
        differences = (keys.vectors[one].astype(np.float64) - keys.vectors[other]) * signs
        measured.add(bucket, range(bucket + 1, last + 1), partial(np.copy, differences), keys.texts[one])
    result = measured.result()
    numbers = of_lines(found)
    numbers |= along_drift(drift, queries.positions, queries.texts, clusters, found)
    result.of_head |= of_queries(numbers)
    result.components, result.weights = of_components(found.r2)
    return result


def directly(queries: Rows, keys: Rows) -> dict[str, float]:
    """The numbers of a dataset as the tables have them."""
    signs = orientation(keys.vectors, keys.buckets)
    drift = fit_drift(components(queries.vectors, signs), queries.positions)
    along = predictability(drift, queries.positions)
    variances = rotate_residuals(drift)
    width = len(variances)
    shape = normality(drift.residuals, variances, np.zeros(width, bool), np.arange(1, width), 0.01)
    means = np.bincount(queries.buckets, queries.positions) / np.bincount(queries.buckets)
    estimator = Regression(drift, signs, variances, means)
    groups = KeyGroups(keys.buckets, keys.texts, keys.positions)
    values = []
    for bucket in range(int(queries.buckets.max())):
        one, other = groups.draw(bucket, ALL_PAIRS, generator(0, 0, 0, 3))
        z = estimator.z(keys.vectors[one].astype(np.float64) - keys.vectors[other], slice(bucket + 1, None))
        values.extend(plasticity(z).mean(axis=1))
    return {
        "ap_overall": float(np.mean(values)),
        "q_R2_pos": float(drift.r2.mean()),
        "q_beta_norm": float(np.linalg.norm(drift.beta)),
        **along,
        **{name: value for name, value in shape.items() if name not in WITHOUT_INTERVAL},
    }


WITHOUT_INTERVAL = {
    "q_resid0_ks_p",
    "q_noise_med_abs_skew",
    "q_noise_med_abs_kurt",
    "q_noise_med_ks_p",
    "q_noise_frac_ks_p_lt_alpha",
}
"""The p of a test, of which a population has none, and medians of absolute values, for which a bootstrap fails."""


@pytest.mark.parametrize("seed", range(4))
def test_a_replicate_is_the_dataset_with_copies_of_its_texts(seed: int) -> None:
    random = np.random.default_rng(seed)
    queries, keys = draw(random, 7, 5, random.normal(size=5) * 0.4, random.normal(size=5))
    signs = set()
    for weights in text_weights(seed, np.arange(7), 6):
        times = weights.astype(int)
        expected = directly(queries.repeated(times), keys.repeated(times))
        found = replicated(queries, keys, np.stack([weights, weights]))  # the first is the value
        for name, value in expected.items():
            assert found.of_head[name].value == pytest.approx(value, rel=1e-9), name
        signs.add(orientation(keys.repeated(times).vectors, keys.repeated(times).buckets)[0])
    if seed == 0:
        assert len(signs) == 2, "the mean of the keys is near 0: a wrong reflection would show"


@pytest.mark.parametrize("settings", [{}, {"estimator": full_covariance(0.1)}], ids=["regression", "full covariance"])
def test_the_first_replicate_is_the_sample_and_agrees_with_the_tables(
    settings: dict[str, Any], verify_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    assert measure(verify_base, folder, replicates=20, **settings) == 0
    columns = tables.read(folder, "head_intervals")
    measured = metrics(folder)
    names = {*tables.QUERY_METRICS, "ap_overall"} - WITHOUT_INTERVAL
    assert {*columns["quantity"]} == names | {"ap_null", "ap_drift"}
    rows = zip(*(columns[name] for name in ("layer", "q_head", "quantity", "value")), strict=True)
    found = {(layer, head, name): value for layer, head, name, value in rows}
    for (layer, head), row in measured.items():
        for name in names:
            assert found[layer, head, name] == pytest.approx(row[name], rel=1e-8), name
    assert np.isfinite([columns[name] for name in ("corrected", "se", "low", "high")]).all()
    pairs, raw = (tables.read(folder, name) for name in ("head_bucket_intervals", "head_bucket_plasticity"))
    np.testing.assert_allclose(pairs["value"], raw["ap_bucket"], rtol=1e-9)
    r2, weights = tables.read(folder, "head_component_intervals"), tables.read(folder, "head_component_weights")
    np.testing.assert_allclose(r2["value"], weights["component_r2"], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(r2["weight_value"], weights["component_weight"], rtol=1e-8, atol=1e-12)
    means = tables.read(folder, "mean_intervals")
    of_all = means["value"][(means["attention"] == "all") & (means["quantity"] == "ap_overall")]
    assert of_all == pytest.approx([record(folder)["mean_ap_overall"]], rel=1e-9)
    assert {*means["attention"]} == {"all", "full", "limited"}, "layers 0 and 2 have a sliding window"
    full = [row["ap_overall"] for (layer, _), row in measured.items() if layer == 1]
    of_full = (means["attention"] == "full") & (means["quantity"] == "ap_overall")
    assert means["value"][of_full] == pytest.approx([np.mean(full)], rel=1e-9)
    by_bucket = tables.read(folder, "mean_bucket_intervals")
    assert set(by_bucket["q_bucket"]) == set(raw["q_bucket"])


def test_weights_belong_to_a_text_and_are_poisson_s() -> None:
    some, more = text_weights(3, [5, 9], 50), text_weights(3, [-4, 5, 7, 9], 80)
    np.testing.assert_array_equal(some, more[:51, [1, 3]])
    assert (some[0] == 1).all() and (some != text_weights(4, [5, 9], 50)).any()
    # On every machine, as hashes are integers.
    assert text_weights(0, range(12), 2)[1:].astype(int).tolist() == PINNED
    many = text_weights(0, np.arange(2000), 100)[1:]
    assert many.mean() == pytest.approx(1, abs=0.01) and many.var() == pytest.approx(1, abs=0.02)
    assert np.mean(many == 0) == pytest.approx(np.exp(-1), abs=0.005)


PINNED = [[1, 1, 0, 1, 2, 2, 1, 1, 0, 0, 2, 1], [0, 2, 1, 2, 0, 2, 0, 1, 1, 1, 0, 1]]


def test_an_estimate_is_the_normal_interval_about_the_value_without_its_bias() -> None:
    replicates = np.array([0.9, 0.86, 0.90, 0.88, np.nan])
    found = estimate(replicates)
    assert found.value == 0.9 and found.corrected == pytest.approx(0.92) and found.se == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx((0.92 - 0.0391993, 0.92 + 0.0391993), abs=1e-6)
    assert estimate(np.array([0.99, 0.9, 0.94, 0.92]), (0, 1))[1:5:3] == (1.0, 1.0), "no value is outside of its range"
    for unknown in ([np.nan, 1, 1, 1], [1, np.nan, np.nan, 1], [1.0, 1.0]):
        assert np.isnan(estimate(np.array(unknown))[1:]).all()


@pytest.mark.slow
def test_intervals_contain_the_truth_of_the_numbers_of_the_queries() -> None:
    """In samples of 40 texts. A sample's kurtosis is too small where a few rows decide it, and so is its interval."""
    line = np.full(8, 0.2), 1.5 * np.array([1.0, -1.0, 0.5, 0.0, 0.3, 0.0, 0.7, -0.2])
    shape = np.array([1.0, 2, 4, 8, 16, 32, 3, 6])

    def skewed(random: np.random.Generator, texts: int) -> tuple[Rows, Rows]:
        queries, keys = draw(random, texts, 4, *line)
        noise = (random.gamma(shape, size=queries.vectors.shape) - shape) / np.sqrt(shape)
        return Rows(queries.vectors + noise.astype(np.float32), queries.positions, queries.texts), keys

    true = replicated(*skewed(np.random.default_rng(10**6), 6000), np.ones((2, 6000)), 64)
    random, inside = np.random.default_rng(1), dict[str, list[bool]]()
    for seed in range(200):
        found = replicated(*skewed(random, 40), text_weights(seed, np.arange(40), 200), 64)
        numbers = {name: (each, true.of_head[name]) for name, each in found.of_head.items() if name.startswith("q_")}
        numbers["weight"] = found.weights[0], true.weights[0]
        for name, (each, expected) in numbers.items():
            inside.setdefault(name, []).append(each.low <= expected.value <= each.high)
    shares = {name: float(np.mean(values)) for name, values in inside.items()}
    least = {"q_resid0_kurt": 0.8}
    assert all(least.get(name, 0.88) <= share <= 0.99 for name, share in shares.items()), shares


def cover(simulated: int, texts: int, rate: int, beta: float, seed: int) -> dict[str, float]:
    """Shares of simulated datasets, and means over them. The truth is the value of a very large sample."""
    line = np.full(4, 0.2), beta * np.array([1.0, -1.0, 0.5, 0.0])
    queries, keys = draw(np.random.default_rng(10**6), 6000, 4, *line)
    true = replicated(queries, keys, np.ones((2, 6000)), 20_000).of_head
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in ("ap", "drift", "null is inside", "raw", "corrected")}
    for number in range(simulated):
        of_head = replicated(
            *draw(random, texts, rate, *line), text_weights(number, np.arange(texts), 200), 256
        ).of_head
        ap, null, drift = (of_head[name] for name in ("ap_overall", "ap_null", "ap_drift"))
        found["ap"].append(ap.low <= true["ap_overall"].value <= ap.high)
        found["drift"].append(drift.low <= true["ap_drift"].value <= drift.high)
        found["null is inside"].append(ap.low <= null.corrected <= ap.high)
        found["raw"].append(ap.value)
        found["corrected"].append(ap.corrected)
    return {name: float(np.mean(values)) for name, values in found.items()} | {"true": true["ap_overall"].value}


@pytest.mark.slow
@pytest.mark.parametrize(("texts", "rate"), [(30, 4), (60, 2)])
def test_intervals_contain_the_truth_of_a_head_that_drifts(texts: int, rate: int) -> None:
    found = cover(300, texts, rate, 1.5, 1)
    assert 0.90 <= found["ap"] <= 0.98 and 0.90 <= found["drift"] <= 0.98, found
    assert found["null is inside"] < 0.5, "the drift shows"
    bias, rest = found["true"] - found["raw"], found["true"] - found["corrected"]
    assert bias > 0.002 and abs(rest) < bias / 2, found


@pytest.mark.slow
def test_without_drift_the_null_is_inside_the_interval() -> None:
    found = cover(200, 30, 4, 0.0, 2)
    assert found["null is inside"] > 0.95 and found["ap"] > 0.9 and found["drift"] > 0.9, found


def test_few_texts_bias_plasticity_and_the_correction_removes_it() -> None:
    """A random model has the plasticity 1 of queries whose mean is 0."""
    raw, corrected = [], []
    for texts in (6, 24, 96):
        found = [
            replicated(
                *draw(np.random.default_rng(seed), texts, 2, np.zeros(6), np.zeros(6)),
                text_weights(seed, np.arange(texts), 100),
                64,
            ).of_head["ap_overall"]
            for seed in range(12)
        ]
        raw.append(np.mean([each.value for each in found]))
        corrected.append(np.mean([each.corrected for each in found]))
    assert raw[0] < raw[1] < raw[2] and 1 - raw[0] > 6 * (1 - raw[2])
    for before, after in zip(raw, corrected, strict=True):
        assert 1 - after < (1 - before) / 2, "a corrected value above 1 counts as 1"


@pytest.mark.slow
def test_the_bias_of_independent_rows_has_a_closed_form() -> None:
    """The z of a mean of 0 is normal, with the leverage v of the line at the bucket as variance. Then the mean of
    4 P (1 - P) is 8 T(0, 1 / sqrt(1 + 2 v)), with Owen's T (Owen, "A table of normal integrals", 1980): about
    1 - (2 / pi) v."""
    values, leverage = [], []
    for seed in range(400):
        queries, keys = draw(np.random.default_rng(seed), 3, 2, np.zeros(8), np.zeros(8), effect=0.0)
        values.append(directly(queries, keys)["ap_overall"])
        p = queries.positions
        means = np.bincount(queries.buckets, p) / np.bincount(queries.buckets)
        v = 1 / len(p) + (means - p.mean()) ** 2 / ((p - p.mean()) ** 2).sum()
        leverage.append(np.mean([8 * owens_t(0, 1 / np.sqrt(1 + 2 * v[b])) for b in range(1, 4) for _ in range(b)]))
    # Estimated variances make z a little wider than normal.
    assert np.mean(values) == pytest.approx(np.mean(leverage), abs=0.004)
    assert np.mean(leverage) < 0.96


def test_without_replicates_there_are_no_intervals(verify_base: Path, tmp_path: Path, capsys: Any) -> None:
    assert measure(verify_base, tmp_path / "none", replicates=0) == 0
    said = capsys.readouterr().out
    assert "too low, replicates=200 adds a corrected number" in said and "intervals" not in said
    assert f"{tmp_path}/none/head_metrics, head_bucket_plasticity, head_component_weights (csv, parquet)" in said
    for table in tables.TABLES:
        rows = len(tables.read(tmp_path / "none", table)["n_heads" if "mean" in table else "layer"])
        assert bool(rows) == ("intervals" not in table)
    assert measure(verify_base, tmp_path / "some", replicates=20) == 0
    three = ("head_metrics", "head_bucket_plasticity", "head_component_weights")
    for table in three:
        same = [(tmp_path / name / f"{table}.csv").read_bytes() for name in ("none", "some")]
        assert same[0] == same[1], "replicates change no number of these tables"
    assert bytes_of(tmp_path / "none").keys() == bytes_of(tmp_path / "some").keys()


def test_a_warning_names_heads_of_few_rows_or_texts(root: Path, tmp_path: Path, capsys: Any) -> None:
    random = np.random.default_rng(0)
    positions = np.tile(np.arange(0, 64, 4), 40)  # four rows in each of four buckets of 16, in 40 texts
    texts = np.repeat(np.arange(40), 16)
    for kind in "qk":
        rewrite(root, 1, 0, kind, random.normal(size=(640, 16)), positions, texts)
        few = texts % 2 == 0  # of 20 texts
        rewrite(root, 1, 1, kind, random.normal(size=(320, 16)), positions[few], texts[few])
    assert measure(root, tmp_path / "results") == 0
    notes = record(tmp_path / "results")["notes"]
    named = {note: heads for note, heads in notes.items() if "make plasticity too low" in note}
    assert "l01h00q" not in str(named), "160 rows in a bucket, of 40 texts"
    assert "l01h01q" in str(
        named["20 texts, fewer than 30: this sample seems to make plasticity too low, see " + WHERE]
    )
    assert (
        "l01h01q"
        in named["a bucket has fewer than 100 queries: this sample seems to make plasticity too low, see " + WHERE]
    )
    assert "fewer than 100 queries" in (said := capsys.readouterr().out)
    assert f"Tables: {tmp_path}/results/{', '.join(tables.TABLES)} (csv, parquet)" in said


def test_a_warning_names_the_way_that_the_heads_are_off(verify_base: Path, tmp_path: Path) -> None:
    assert measure(verify_base, tmp_path / "results", estimator=full_covariance(0.1)) == 0
    found = tables.read(tmp_path / "results", "head_intervals")
    rows = found["quantity"] == "ap_overall"
    names = [
        head_name(int(layer), int(head), "q")
        for layer, head in zip(found["layer"][rows], found["q_head"][rows], strict=True)
    ]
    shifts = dict(zip(names, found["corrected"][rows] - found["value"][rows], strict=True))
    notes = record(tmp_path / "results")["notes"]
    ways = {"this sample seems to make plasticity too low": 1, "this sample seems to make plasticity too high": -1}
    seen = {
        head: sign
        for note, heads in notes.items()
        for way, sign in ways.items()
        if f": {way}, " in note
        for head in heads
    }
    assert seen == {head: np.sign(shift) for head, shift in shifts.items()} and set(seen.values()) == {1, -1}
    assert measure(verify_base, tmp_path / "none", estimator=full_covariance(0.1), replicates=0) == 0
    assert "too low" not in str(record(tmp_path / "none")["notes"])


WHERE = "`corrected` and its interval in the tables of intervals"
