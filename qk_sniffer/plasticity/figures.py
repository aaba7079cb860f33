"""Draws the pictures of a dataset's plasticity, for a paper's appendix."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.dataset.reader import sampler_of
from qk_sniffer.drawing.style import (
    BLUE,
    COLUMN_IN,
    GREY,
    PAGE_IN,
    Float64,
    absent_patch,
    as_text,
    check_cells,
    figure,
    mark_absent,
    save,
)
from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.config import ESTIMATORS
from qk_sniffer.plasticity.results import Results
from qk_sniffer.store.disk import explained, make_folder
from qk_sniffer.store.layout import PICTURE_SUFFIXES
from qk_sniffer.store.own_files import refuse_foreign
from qk_sniffer.store.places import is_drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = dict[str, np.ndarray[Any, Any]]

PICTURES = {"by_query_bucket", "by_bucket_pair", "by_head", "component_weights"}

PLASTICITY = "attention plasticity"
MOST_TICKS = 7
MOST_LINES = 150
MOST_NUMBERS = 10
"""The most buckets of a heatmap with numbers in its cells."""

MOST_HEAD_CELLS = 1 << 17
"""The most cells of the picture with one cell for each head."""


def draw_all(results: Results) -> list[Path]:
    """Draws all pictures of the results, replaces earlier ones, and returns their files.

    Without any plasticity there are none of buckets.

    Raises:
        StoreError: a table is missing or damaged; the folder cannot be written.
    """
    record = results.record()
    metrics, pairs, weights = (results.table(name, record) for name in tables.TABLES)
    names = Names(record)
    pictures: dict[str, Callable[[], Figure]] = {}
    if np.isfinite(pairs["ap_bucket"]).any():
        pictures["by_query_bucket"] = lambda: by_query_bucket(pairs, names)
        pictures["by_bucket_pair"] = lambda: by_bucket_pair(pairs, names)
    pictures |= {
        "by_head": lambda: by_head(metrics, names),
        "component_weights": lambda: component_weights(weights, names),
    }
    with explained(results.pictures, "make"):
        results.check()
        make_folder(results.pictures, results.access)
    drawn = [
        file for name, make in pictures.items() for file in save(results.pictures / name, make, access=results.access)
    ]
    earlier = {f"{name}{suffix}" for name in PICTURES - pictures.keys() for suffix in PICTURE_SUFFIXES}
    results.remove_pictures(earlier.__contains__)
    return drawn


def check_places(results: Results) -> None:
    """Checks that no picture of someone else has the name of one that is drawn: before the measurement.

    Raises:
        StoreError: one has.
    """
    with (
        explained(results.pictures, "read"),
        suppress(FileNotFoundError),
        results.access.open(results.pictures) as folder,
    ):
        for name in sorted(f"{name}{suffix}" for name in PICTURES for suffix in PICTURE_SUFFIXES):
            refuse_foreign(folder, name, is_drawn)


class Names:
    """The names of a dataset and its buckets in a picture. A bucket is named by its first position."""

    def __init__(self, record: dict[str, Any]) -> None:
        estimator = record["settings"]["estimator"]["name"]
        of_which = "" if estimator == ESTIMATORS[0] else f" ({estimator.replace('_', ' ')})"
        self.dataset = as_text(f"{record['dataset']['model']['slug']} on {record['dataset']['texts']}{of_which}")
        self._sampler = sampler_of({"config": {"sampler": record["dataset"]["sampler"]}})

    def buckets(self, axis: Any, buckets: npt.NDArray[np.integer[Any]]) -> None:
        """Labels the ticks 0, 1, 2, ... of an axis with the first positions of `buckets`, as many as fit."""
        step = -(-len(buckets) // MOST_TICKS)
        labels = [f"{self._sampler.span('q', int(bucket))[0]:,}" for bucket in buckets[::step]]
        axis.set_ticks(range(0, len(buckets), step), labels)


def by_query_bucket(pairs: Columns, names: Names) -> "Figure":
    """Draws plasticity by query bucket, as the mean over key buckets: every head faint, their mean strong."""
    buckets, lines, mean = by_head_and_bucket(pairs)
    drawn = figure(COLUMN_IN, 2.5)
    axes = drawn.add_subplot()
    axes.plot(lines.T, color=GREY, alpha=float(np.clip(30 / len(lines), 0.03, 0.5)), linewidth=0.6)
    axes.plot(mean, color=BLUE, linewidth=2, marker="o", markersize=3.5, label=f"mean of {len(lines):,} heads")
    axes.plot([], [], color=GREY, linewidth=0.8, label="each head")
    names.buckets(axes.xaxis, buckets)
    axes.set(xlabel="query bucket (its first token position)", ylabel=PLASTICITY, title=names.dataset)
    axes.set_ylim(top=1.0 + 0.02 * (1.0 - axes.get_ylim()[0]))
    axes.grid(axis="y", linewidth=0.3)
    axes.legend()
    return drawn


def by_bucket_pair(pairs: Columns, names: Names) -> "Figure":
    """Draws plasticity by query bucket and key bucket, as the mean over heads."""
    lowest, highest = int(pairs["k_bucket"].min()), int(pairs["q_bucket"].max())
    size = highest - lowest  # the lowest bucket has no query here, the highest no key
    grid = mean_by(pairs["q_bucket"] - lowest - 1, pairs["k_bucket"] - lowest, pairs["ap_bucket"], (size, size))
    drawn = figure(COLUMN_IN, 2.9)
    axes = drawn.add_subplot()
    image = axes.imshow(grid, origin="lower")
    if size <= MOST_NUMBERS:
        write_numbers(axes, image, grid)
    names.buckets(axes.xaxis, np.arange(lowest, highest))
    names.buckets(axes.yaxis, np.arange(lowest + 1, highest + 1))
    axes.tick_params(axis="x", rotation=45)
    axes.set(xlabel="key bucket (its first position)", ylabel="query bucket (its first position)", title=names.dataset)
    drawn.colorbar(image, shrink=0.8, label=f"{PLASTICITY},\nmean over the heads that see both")
    return drawn


def by_head(metrics: Columns, names: Names) -> "Figure":
    """Draws plasticity and positional R2 of every head."""
    from matplotlib.ticker import MaxNLocator

    layers, heads = int(metrics["layer"].max()) + 1, int(metrics["q_head"].max()) + 1
    check_cells((layers, heads), MOST_HEAD_CELLS)
    height = float(np.clip(PAGE_IN / 2.6 * layers / heads, 1.1, 6.0)) + 0.7
    drawn = figure(PAGE_IN, height)
    panels = drawn.subplots(1, 2, sharey=True)
    is_anything_absent = False
    for axes, column, title in zip(
        panels, ("ap_overall", "q_R2_pos"), (PLASTICITY, "positional $R^2$ of the queries"), strict=True
    ):
        grid = np.full((layers, heads), np.nan)
        grid[metrics["layer"], metrics["q_head"]] = metrics[column]
        image = axes.imshow(grid, origin="lower", aspect="auto")
        drawn.colorbar(image)
        axes.set(xlabel="query head", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        mark_absent(axes)
        is_anything_absent |= bool(np.isnan(grid).any())
    panels[0].set_ylabel("layer")
    drawn.suptitle(names.dataset, fontsize=8)
    if is_anything_absent:
        drawn.legend(handles=[absent_patch("not captured, or not measured")], loc="outside lower center")
    return drawn


def component_weights(weights: Columns, names: Names) -> "Figure":
    """Draws the weight of each component: one line a head, or one a layer if there are many heads."""
    heads, which = np.unique(np.stack([weights["layer"], weights["q_head"]]), axis=1, return_inverse=True)
    size = int(weights["component"].max()) + 1
    check_cells((heads.shape[1], size))
    grid = np.full((heads.shape[1], size), np.nan)
    grid[which, weights["component"]] = weights["component_weight"] * size
    label = "layer (a line for each head)"
    if len(grid) > MOST_LINES:
        layers, which = np.unique(weights["layer"], return_inverse=True)
        values = weights["component_weight"] * size
        grid = mean_by(which, weights["component"], values, (len(layers), size))
        heads, label = layers[None], "layer (mean of its heads)"
    drawn = figure(PAGE_IN, float(np.clip(0.03 * len(grid), 2.0, 4.0)) + 0.5)
    axes = drawn.add_subplot()
    # Without a limit, a few components of a few heads would make all others dark.
    finite = grid[np.isfinite(grid)]
    top = float(np.quantile(finite, 0.99)) if len(finite) else 1.0
    image = axes.imshow(grid, aspect="auto", origin="lower", vmin=0, vmax=top, interpolation="nearest")
    starts = np.flatnonzero(np.diff(heads[0], prepend=-1))
    middles = (starts + np.append(starts[1:], len(grid)) - 1) / 2
    step = -(-len(starts) // 16)
    axes.set_yticks(middles[::step], [str(layer) for layer in heads[0][starts[::step]]])
    axes.tick_params(axis="y", length=0)
    for start in starts[1:] if len(starts) < len(grid) else ():
        axes.axhline(start - 0.5, color="white", linewidth=0.6)
    axes.set(xlabel="component of the query", ylabel=label, title=names.dataset)
    drawn.colorbar(image, extend="max", label="weight × number of components\n(1: an even share)")
    return drawn


def write_numbers(axes: "Axes", image: Any, grid: Float64) -> None:
    """Writes the number into each cell, in a readable colour."""
    digits = 3 if np.nanmax(grid) - np.nanmin(grid) < 0.1 else 2
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "black" if float(image.norm(value)) > 0.4 else "white"
            text = f"{value:.{digits}f}".removeprefix("0")
            axes.text(column, row, text, ha="center", va="center", fontsize=5.5, color=colour)


def by_head_and_bucket(pairs: Columns) -> tuple[npt.NDArray[np.int64], Float64, Float64]:
    """The query buckets (m,), the plasticity of each head as the mean over its key buckets (heads, m), and the mean of
    the heads (m,). Leaves out heads without a value; NaN for a bucket without one."""
    if not len(pairs["q_bucket"]):
        return np.empty(0, np.int64), np.empty((0, 0)), np.empty(0)
    buckets = np.arange(pairs["q_bucket"].min(), pairs["q_bucket"].max() + 1)
    heads, which = np.unique(np.stack([pairs["layer"], pairs["q_head"]]), axis=1, return_inverse=True)
    lines = mean_by(which, pairs["q_bucket"] - buckets[0], pairs["ap_bucket"], (heads.shape[1], len(buckets)))
    lines = lines[np.isfinite(lines).any(axis=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for a bucket without a value
        return buckets, lines, np.nanmean(lines, axis=0)


def mean_by(rows: Any, columns: Any, values: Float64, shape: tuple[int, int]) -> Float64:
    """The mean of the values of each (row, column), without NaN; NaN if none is left.

    Raises:
        QkSnifferError: `shape` has too many cells.
    """
    check_cells(shape)
    known = np.isfinite(values)
    cells = np.ravel_multi_index((rows[known], columns[known]), shape)
    size = shape[0] * shape[1]
    counts = np.bincount(cells, minlength=size)
    with np.errstate(invalid="ignore"):
        means: Float64 = (np.bincount(cells, values[known], minlength=size) / counts).reshape(shape)
    return means
