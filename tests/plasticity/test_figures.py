"""Checks that the pictures of plasticity show the numbers of the tables and mark the missing ones."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.plasticity_cases import environment_of, measure, metrics, record, rewrite

from qk_sniffer.drawing import style
from qk_sniffer.errors import ConfigError, QkSnifferError, StoreError
from qk_sniffer.plasticity import figures, tables
from qk_sniffer.plasticity.compare import (
    Run,
    Settings,
    Step,
    compare,
    differences,
    draw,
    names,
    read,
    step_of,
    title,
)
from qk_sniffer.plasticity.figures import Names
from qk_sniffer.plasticity.intervals import of_all
from qk_sniffer.plasticity.results import Results
from qk_sniffer.text import printable

SIZES = (0, 1, 2), (0, 1, 2, 3)
"""Layers and query heads of the dataset."""


@pytest.fixture
def results(root: Path, tmp_path: Path) -> Path:
    """Returns the results of a dataset in which one head has no plasticity."""
    rewrite(root, 2, 3, "q", np.ones((1, 16)), [5], [0])
    measure(root, tmp_path / "results", num_pairs_per_bucket=20)
    return tmp_path / "results"


def of(results: Path, make: Any, *names: str) -> Any:
    with style.styled():
        return make(*(tables.read(results, name) for name in names), Names(record(results)))


def shown(results: Path) -> dict[str, np.ndarray]:
    """The plasticity by head and buckets that the pictures show: corrected for the size of the sample."""
    found = figures.corrected(tables.read(results, "head_bucket_intervals"))
    assert found is not None
    return found


def grid(axes: Any) -> np.ndarray:
    (image,) = axes.get_images()
    return np.ma.filled(image.get_array().astype(float), np.nan)


def hatched(axes: Any) -> set[tuple[int, int]]:
    """The cells without a value, through which the hatched background shows."""
    assert axes.patch.get_hatch() == style.ABSENT["hatch"]
    return {(int(row), int(column)) for row, column in np.argwhere(np.isnan(grid(axes)))}


PANELS = {"full": [1], "limited": [0, 2]}
"""The layers of each panel."""


@pytest.mark.slow
def test_every_head_is_a_faint_line_and_the_mean_a_strong_one(results: Path) -> None:
    columns, means = shown(results), tables.read(results, "mean_bucket_intervals")
    with style.styled():
        drawn = figures.by_query_bucket(columns, means, Names(record(results)))
    buckets = range(columns["q_bucket"].min(), columns["q_bucket"].max() + 1)
    assert [axes.get_title() for axes in drawn.axes] == ["full attention", "sliding window or chunks"]
    for axes, (attention, layers) in zip(drawn.axes, PANELS.items(), strict=True):
        expected = []
        for layer in layers:
            for head in SIZES[1]:
                mine = (columns["layer"] == layer) & (columns["q_head"] == head)
                of_head = []
                for bucket in buckets:
                    values = columns["ap_bucket"][mine & (columns["q_bucket"] == bucket)]
                    values = values[np.isfinite(values)]
                    of_head.append(values.mean() if len(values) else np.nan)
                if np.isfinite(of_head).any():
                    expected.append(of_head)
        assert len(expected) == (4 if attention == "full" else 7), "one head has no plasticity"
        lines = axes.get_lines()
        faint = [line for line in lines if line.get_color() == style.GREY and len(line.get_ydata())]
        np.testing.assert_allclose([line.get_ydata() for line in faint], expected)
        (strong,) = [line for line in lines if line.get_label() == "mean of the heads"]
        np.testing.assert_allclose(strong.get_ydata(), np.nanmean(expected, axis=0))
        assert strong.get_linewidth() > 2 * faint[0].get_linewidth() and strong.get_color() == style.BLUE
        (null,) = [line for line in lines if line.get_label() == "mean without drift"]
        rows = (means["attention"] == attention) & (means["quantity"] == "ap_null")
        np.testing.assert_allclose(null.get_ydata(), means["corrected"][rows])
        (band,) = axes.collections
        rows = (means["attention"] == attention) & (means["quantity"] == "ap_overall")
        ends = band.get_datalim(axes.transData).intervaly
        np.testing.assert_allclose(ends, [means["low"][rows].min(), means["high"][rows].max()])
    assert drawn.axes[0].get_ylim() == drawn.axes[1].get_ylim(), "the panels have one scale"
    compared = read(Results(results))
    assert len(compared.heads) == 11 and len(compared.by_bucket) == len(buckets)
    of_means = tables.read(results, "mean_intervals")
    of_mean, of_null = (of_all(of_means, quantity) for quantity in ("ap_overall", "ap_null"))
    assert compared.mean == (of_mean.corrected, of_mean.low, of_mean.high) and compared.null == of_null.corrected
    name = Path(record(results)["dataset"]["model"]["name"]).name
    assert drawn.get_suptitle() == f"{name} on texts" and drawn.axes[0].get_ylabel() == "attention plasticity"


def test_bucket_pairs_are_means_over_heads(results: Path) -> None:
    columns = shown(results)
    with style.styled():
        drawn = figures.by_bucket_pair(columns, Names(record(results)))
    lowest = columns["k_bucket"].min()
    images = [axes.get_images()[0] for axes in drawn.axes[:2]]
    assert images[0].get_clim() == images[1].get_clim(), "the panels have one scale"
    for axes, layers in zip(drawn.axes[:2], PANELS.values(), strict=True):
        for (row, column), value in np.ndenumerate(grid(axes)):
            mine = (columns["q_bucket"] == lowest + 1 + row) & (columns["k_bucket"] == lowest + column)
            values = columns["ap_bucket"][mine & np.isin(columns["layer"], layers)]
            values = values[np.isfinite(values)]
            np.testing.assert_allclose(value, values.mean() if len(values) else np.nan)
        assert np.isnan(grid(axes)[0, 1]), "no key follows its query"


def test_heads_in_order_have_their_intervals(results: Path) -> None:
    columns = tables.read(results, "head_intervals")
    (axes,) = of(results, figures.heads_in_order, "head_intervals").axes
    rows = columns["quantity"] == "ap_overall"
    known = rows & np.isfinite(columns["corrected"])
    order = np.flatnonzero(known)[np.argsort(columns["corrected"][known], kind="stable")]
    labels = [f"{columns['layer'][i]}.{columns['q_head'][i]}" for i in order]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == labels and len(labels) == 11
    for line, bars, is_limited in zip(axes.get_lines()[1:], axes.collections, (False, True), strict=True):
        mine = [i for i in order if (columns["layer"][i] != 1) == is_limited]
        np.testing.assert_allclose(line.get_ydata(), columns["corrected"][mine])
        ends = [segment[:, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, np.stack([columns["low"][mine], columns["high"][mine]], axis=1))
    null = {
        (layer, head): value
        for layer, head, quantity, value in zip(
            *(columns[name] for name in ("layer", "q_head", "quantity", "corrected")), strict=True
        )
        if quantity == "ap_null"
    }
    expected = [null[columns["layer"][i], columns["q_head"][i]] for i in order]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), expected)


def test_heads_without_a_value_are_hatched(results: Path) -> None:
    metrics_of, intervals = tables.read(results, "head_metrics"), tables.read(results, "head_intervals")

    def some(columns: dict[str, Any]) -> dict[str, Any]:
        kept = (columns["layer"] != 1) | (columns["q_head"] != 2)
        return {name: values[kept] for name, values in columns.items()}

    of_heads = {
        quantity: {
            (layer, head): value
            for layer, head, name, value in zip(
                *(intervals[name] for name in ("layer", "q_head", "quantity", "corrected")), strict=True
            )
            if name == quantity
        }
        for quantity in ("ap_overall", "ap_drift")
    }
    of_heads["q_R2_pos"] = {head: row["q_R2_pos"] for head, row in metrics(results).items()}
    of_heads["raw"] = {head: row["ap_overall"] for head, row in metrics(results).items()}
    none = {name: values[:0] for name, values in intervals.items()}
    for of_intervals, quantities in (
        (some(intervals), ("ap_overall", "ap_drift", "q_R2_pos")),
        (none, ("raw", "q_R2_pos")),
    ):
        with style.styled():
            drawn = figures.by_head(some(metrics_of), of_intervals, Names(record(results)))
        for axes, quantity in zip(drawn.axes, quantities, strict=False):
            expected = [[of_heads[quantity].get((layer, head), np.nan) for head in SIZES[1]] for layer in SIZES[0]]
            expected[1][2] = np.nan
            np.testing.assert_allclose(grid(axes), expected)
            assert hatched(axes) == {(1, 2), (2, 3)}, "one head is not captured, one has no value"
        assert [tick.get_text() for tick in drawn.axes[0].get_yticklabels()] == ["0 w", "1", "2 w"]
        (legend,) = drawn.legends
        assert legend.get_texts()[0].get_text() == "not captured, or not measured"


def test_component_weights_are_shares_of_an_even_one(results: Path) -> None:
    axes = of(results, figures.component_weights, "head_component_weights").axes[0]
    columns = tables.read(results, "head_component_weights")
    np.testing.assert_allclose(grid(axes), columns["component_weight"].reshape(12, 16) * 16)


RUN = Run(
    "folder",
    "SmolLM3-3B",
    "texts",
    "main",
    "regression",
    np.linspace(0.5, 1, 101),
    np.array([0.9, 0.8]),
    (0.75, 0.7, 0.8),
    0.95,
)


def checkpoints() -> list[Run]:
    """Returns checkpoints in another order than that of the training."""
    steps = ["lc-32k-to-64k-step-4000", "lc-4k-to-32k-step-20000", "stage2-step-4200000", "stage1-step-40000"]
    return [
        replace(RUN, revision=step, heads=np.full(3, number / 10), mean=(number / 10, 0.0, 1.0))
        for number, step in enumerate(steps)
    ]


def test_checkpoints_are_in_the_order_of_their_training() -> None:
    with style.styled():
        left, right = draw(checkpoints()).axes[:2]
    assert [tick.get_text() for tick in left.get_xticklabels()] == [
        "stage1 40k",
        "stage2 4,200k",
        "lc-4k-to-32k 20k",
        "lc-32k-to-64k 4k",
    ]
    means, null = left.get_lines()
    np.testing.assert_allclose(means.get_ydata(), [0.3, 0.2, 0.1, 0.0])
    np.testing.assert_allclose(null.get_ydata(), 0.95)
    assert means.get_linestyle() == "-" and left.get_xlabel() == "training step (in order, not to scale)"
    assert len(right.get_lines()) == 4
    assert str(step_of(replace(RUN, model="pythia", revision="step512"))) == "512" and step_of(RUN) is None


@pytest.mark.parametrize(("last", "scale"), [(4000, "linear"), (143_000, "log")])
def test_steps_that_grow_are_an_axis(last: int, scale: str) -> None:
    runs = [replace(RUN, revision=f"step{step}", mean=(step / 1e6, 0.0, 1.0)) for step in (last, 1000, 3000)]
    with style.styled():
        left = draw(runs).axes[0]
    means = left.get_lines()[0]
    np.testing.assert_allclose(means.get_xdata(), [1000, 3000, last])
    np.testing.assert_allclose(means.get_ydata(), [0.001, 0.003, last / 1e6])
    assert left.get_xscale() == scale and left.get_xlabel() == "training step"
    interval = left.collections[-1].get_segments()
    np.testing.assert_allclose(interval[0], [[1000, 0.0], [1000, 1.0]])


@pytest.mark.parametrize("revision", ["step" + "1" * 5000, "step" + "1" * 400, "lc" * 5000, "lc-" * 2000 + "step"])
def test_a_name_of_any_length_is_no_training_step(revision: str) -> None:
    assert step_of(replace(RUN, revision=revision)) is None
    step = Step(revision, 1)
    assert max(step.order(), step.order()) == step.order()


def test_tables_that_make_a_grid_of_any_size_are_refused() -> None:
    count = 3000
    pairs = {name: np.arange(count) % 1000 for name in ("layer", "q_head")}
    pairs |= {"k_bucket": np.zeros(count, int), "q_bucket": np.arange(count) * 300, "ap_bucket": np.ones(count)}
    weights = {"layer": pairs["layer"], "q_head": pairs["q_head"], "component": np.arange(count) * 20}
    metrics = {"layer": np.array([1999]), "q_head": np.array([9999]), "ap_overall": np.ones(1), "q_R2_pos": np.ones(1)}
    for draw_one in (
        lambda: figures.by_head_and_bucket(pairs),
        lambda: figures.component_weights(weights | {"component_weight": np.ones(count)}, None),
        lambda: figures.by_head(metrics, {}, None),
    ):
        with pytest.raises(QkSnifferError, match=r"make a grid of .* cells; a picture shows at most"):
            draw_one()


def test_other_runs_keep_the_given_order_and_are_not_joined() -> None:
    runs = [*checkpoints(), replace(RUN, heads=np.linspace(0.5, 1, 101))]
    with style.styled():
        left = draw(runs).axes[0]
    assert [tick.get_text() for tick in left.get_xticklabels()] == [run.revision for run in runs]
    assert left.get_lines()[0].get_linestyle() == "None" and left.get_xlabel() == ""
    nine_tenths, half = (collection.get_segments()[-1][:, 1] for collection in left.collections[:2])
    np.testing.assert_allclose(nine_tenths, [0.525, 0.975])
    np.testing.assert_allclose(half, [0.625, 0.875])


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"model": "qwen3"}, ["SmolLM3-3B", "qwen3"]),
        ({"estimator": "full_covariance"}, ["regression", "full covariance"]),
        ({"model": "qwen3", "texts": "books"}, ["SmolLM3-3B, texts", "qwen3, books"]),
        ({"folder": "again"}, ["folder", "again"]),
    ],
)
def test_runs_are_called_by_what_differs(others: dict[str, Any], expected: list[str]) -> None:
    assert names([RUN, replace(RUN, **others)]) == expected


def test_the_title_names_what_the_runs_have_in_common() -> None:
    run = replace(RUN, revision="main")
    for others, expected in (
        ({"estimator": "full_covariance"}, "SmolLM3-3B on texts, estimators: full covariance, regression"),
        ({"revision": "v2"}, "on texts, estimator: regression"),
        ({"texts": "books"}, "SmolLM3-3B, estimator: regression"),
        ({"model": "qwen3", "texts": "books"}, "estimator: regression"),
    ):
        assert title([run, replace(run, **others)]) == expected
        with style.styled():
            assert draw([run, replace(run, **others)]).get_suptitle() == expected


def test_a_difference_has_the_interval_that_is_certain() -> None:
    first, unknown = replace(RUN, mean=(0.9, 0.85, 0.92)), replace(RUN, mean=(0.8, np.nan, np.nan), revision="b")
    other = replace(RUN, mean=(0.7, 0.65, 0.75), revision="a")
    runs = [replace(first, revision="main"), other, unknown]
    assert list(differences(runs)) == [
        "  a: mean of heads -0.2000 from main (interval of at least 95 %: -0.2700 to -0.1000)",
        "  b: mean of heads -0.1000 from main",
    ]
    steps = [replace(other, revision="step2"), replace(first, revision="step1")]
    assert next(differences(steps)).startswith("  2: mean of heads -0.2000 from 1 "), "in the order of training"


@pytest.mark.slow
def test_several_datasets_in_one_figure(results: Path, tmp_path: Path) -> None:
    measure(tmp_path / "out", tmp_path / "b", num_pairs_per_bucket=20)
    command = [sys.executable, "-m", "qk_sniffer.plasticity.compare", "runs=results,b", "output=pictures/both.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment_of())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures" / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "stage" not in done.stdout and "both.png, pictures/both.svg, pictures/both.pdf" in done.stdout
    assert (tmp_path / "pictures" / "both.pdf").read_bytes().startswith(b"%PDF")
    assert ">attention plasticity</text>" in (tmp_path / "pictures" / "both.svg").read_text(encoding="utf-8")
    with pytest.raises(StoreError, match="nothing has no finished results"):
        compare(Settings(f"{results},{tmp_path / 'nothing'}", tmp_path / "both.png"))
    with pytest.raises(ConfigError, match=r"runs is empty[\s\S]*output is 'both.jpg'"):
        compare(Settings("", Path("both.jpg")))


def test_the_committed_picture_is_small() -> None:
    picture = Path(__file__).parents[2] / "docs" / "plasticity.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 300_000


def test_names_are_drawn_as_they_are(results: Path) -> None:
    """A formula in a name could end the program, and a legend leaves out names that begin with an underscore."""
    for name in (r"$\frac$", r"a\$b$", "_x", "two\nlines\x1b"):
        drawn = style.figure(1.0, 1.0)
        text = drawn.text(0, 0, style.as_text(name))
        shown, is_formula = text._preprocess_math(text.get_text())  # type: ignore[attr-defined]
        assert not is_formula and shown.strip() == printable(name) and not shown.startswith("_")
    runs = [replace(read(Results(results)), model=name) for name in ("$a_{$", "_b")]
    compared = draw(runs)
    compared.canvas.draw()
    assert [text.get_text().strip() for text in compared.legends[0].get_texts()] == [r"\$a_{\$", "_b"]
