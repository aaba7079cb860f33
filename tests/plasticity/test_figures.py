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
from qk_sniffer.plasticity.compare import Run, Settings, Step, compare, draw, names, read, step_of
from qk_sniffer.plasticity.figures import Names
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


def of(results: Path, name: str, make: Any) -> Any:
    with style.styled():
        return make(tables.read(results, name), Names(record(results)))


def grid(axes: Any) -> np.ndarray:
    (image,) = axes.get_images()
    return np.ma.filled(image.get_array().astype(float), np.nan)


def hatched(axes: Any) -> set[tuple[int, int]]:
    """The cells without a value, through which the hatched background shows."""
    assert axes.patch.get_hatch() == style.ABSENT["hatch"]
    return {(int(row), int(column)) for row, column in np.argwhere(np.isnan(grid(axes)))}


def test_every_head_is_a_faint_line_and_the_mean_a_strong_one(results: Path) -> None:
    drawn = of(results, "head_bucket_plasticity", figures.by_query_bucket)
    (axes,) = drawn.axes
    columns = tables.read(results, "head_bucket_plasticity")
    buckets = range(columns["q_bucket"].min(), columns["q_bucket"].max() + 1)
    expected = []
    for layer in SIZES[0]:
        for head in SIZES[1]:
            mine = (columns["layer"] == layer) & (columns["q_head"] == head)
            means = []
            for bucket in buckets:
                values = columns["ap_bucket"][mine & (columns["q_bucket"] == bucket)]
                values = values[np.isfinite(values)]
                means.append(values.mean() if len(values) else np.nan)
            expected.append(means)
    lines = axes.get_lines()
    faint = [line for line in lines if line.get_color() == style.GREY and len(line.get_ydata())]
    assert len(faint) == 11, "one head has no plasticity"
    shown = [line.get_ydata() for line in faint]
    np.testing.assert_allclose(shown, [means for means in expected if np.isfinite(means).any()])
    (strong,) = [line for line in lines if line.get_label() == "mean of 11 heads"]
    np.testing.assert_allclose(strong.get_ydata(), np.nanmean(expected, axis=0))
    assert strong.get_linewidth() > 2 * faint[0].get_linewidth() and strong.get_color() == style.BLUE
    compared = read(Results(results))
    np.testing.assert_allclose(compared.by_bucket, strong.get_ydata(), err_msg="the comparison shows the same mean")
    assert len(compared.heads) == 11
    model = record(results)["dataset"]["model"]["slug"]
    assert (
        axes.get_title() == f"{model} on texts"
        and model.startswith("qwen3")
        and axes.get_ylabel() == "attention plasticity"
    )


def test_bucket_pairs_are_means_over_heads(results: Path) -> None:
    axes = of(results, "head_bucket_plasticity", figures.by_bucket_pair).axes[0]
    columns = tables.read(results, "head_bucket_plasticity")
    lowest = columns["k_bucket"].min()
    shown = grid(axes)
    for (row, column), value in np.ndenumerate(shown):
        mine = (columns["q_bucket"] == lowest + 1 + row) & (columns["k_bucket"] == lowest + column)
        values = columns["ap_bucket"][mine]
        values = values[np.isfinite(values)]
        np.testing.assert_allclose(value, values.mean() if len(values) else np.nan)
    assert np.isnan(shown[0, 1]), "no key follows its query"


def test_heads_without_a_value_are_hatched(results: Path) -> None:
    metrics_of = tables.read(results, "head_metrics")
    some = np.flatnonzero((metrics_of["layer"] != 1) | (metrics_of["q_head"] != 2))
    with style.styled():
        some_columns = {name: values[some] for name, values in metrics_of.items()}
        drawn = figures.by_head(some_columns, Names(record(results)))
    plasticity, r2 = drawn.axes[:2]
    rows = metrics(results)
    for axes, column in ((plasticity, "ap_overall"), (r2, "q_R2_pos")):
        expected = [[rows[layer, head][column] for head in SIZES[1]] for layer in SIZES[0]]
        expected[1][2] = np.nan
        np.testing.assert_allclose(grid(axes), expected)
        assert hatched(axes) == {(1, 2), (2, 3)}, "one head is not captured, one has no value"
    (legend,) = drawn.legends
    assert legend.get_texts()[0].get_text() == "not captured, or not measured"


def test_component_weights_are_shares_of_an_even_one(results: Path) -> None:
    axes = of(results, "head_component_weights", figures.component_weights).axes[0]
    columns = tables.read(results, "head_component_weights")
    np.testing.assert_allclose(grid(axes), columns["component_weight"].reshape(12, 16) * 16)


RUN = Run("folder", "smollm3-3b", "texts", "main", "regression", np.linspace(0.5, 1, 101), np.array([0.9, 0.8]))


def checkpoints() -> list[Run]:
    """Returns checkpoints in another order than that of the training."""
    steps = ["lc-32k-to-64k-step-4000", "lc-4k-to-32k-step-20000", "stage2-step-4200000", "stage1-step-40000"]
    return [replace(RUN, revision=step, heads=np.full(3, number / 10)) for number, step in enumerate(steps)]


def test_checkpoints_are_in_the_order_of_their_training() -> None:
    with style.styled():
        left, right = draw(checkpoints()).axes[:2]
    assert [tick.get_text() for tick in left.get_xticklabels()] == [
        "stage1 40k",
        "stage2 4,200k",
        "lc-4k-to-32k 20k",
        "lc-32k-to-64k 4k",
    ]
    (means,) = left.get_lines()
    np.testing.assert_allclose(means.get_ydata(), [0.3, 0.2, 0.1, 0.0])
    assert means.get_linestyle() == "-" and "training step" in left.get_xlabel()
    assert len(right.get_lines()) == 4
    assert str(step_of(replace(RUN, model="pythia", revision="step512"))) == "512" and step_of(RUN) is None


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
        lambda: figures.by_head(metrics, None),
    ):
        with pytest.raises(QkSnifferError, match=r"make a grid of .* cells; a picture shows at most"):
            draw_one()


def test_other_runs_keep_the_given_order_and_are_not_joined() -> None:
    runs = [*checkpoints(), replace(RUN, heads=np.linspace(0.5, 1, 101))]
    with style.styled():
        left = draw(runs).axes[0]
    assert [tick.get_text() for tick in left.get_xticklabels()] == [run.revision for run in runs]
    (means,) = left.get_lines()
    assert means.get_linestyle() == "None" and left.get_xlabel() == ""
    nine_tenths, half = (collection.get_segments()[-1][:, 1] for collection in left.collections)
    np.testing.assert_allclose(nine_tenths, [0.525, 0.975])
    np.testing.assert_allclose(half, [0.625, 0.875])


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"model": "qwen3"}, ["smollm3-3b", "qwen3"]),
        ({"estimator": "full_covariance"}, ["regression", "full covariance"]),
        ({"model": "qwen3", "texts": "books"}, ["smollm3-3b, texts", "qwen3, books"]),
        ({"folder": "again"}, ["folder", "again"]),
    ],
)
def test_runs_are_called_by_what_differs(others: dict[str, Any], expected: list[str]) -> None:
    assert names([RUN, replace(RUN, **others)]) == expected


def test_several_datasets_in_one_figure(results: Path, tmp_path: Path) -> None:
    measure(tmp_path / "out", tmp_path / "b", num_pairs_per_bucket=20)
    command = [sys.executable, "-m", "qk_sniffer.plasticity.compare", "runs=results,b", "output=pictures/both.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment_of())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures" / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "stage" not in done.stdout and "both.png, pictures/both.svg" in done.stdout
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
