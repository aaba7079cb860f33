"""Draws the pictures of a dataset's plasticity, for a paper's appendix."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.dataset.reader import sampler_of
from qk_sniffer.drawing.style import (
    BLACK,
    BLUE,
    COLUMN_IN,
    GREY,
    ORANGE,
    PAGE_IN,
    PAPER_SUFFIXES,
    Float64,
    absent_patch,
    as_text,
    check_cells,
    figure,
    mark_absent,
    save,
)
from qk_sniffer.plasticity.config import ESTIMATORS
from qk_sniffer.plasticity.intervals import FULL, LIMITED
from qk_sniffer.plasticity.results import Results
from qk_sniffer.resolved import last_part
from qk_sniffer.store.disk import explained, make_folder
from qk_sniffer.store.own_files import refuse_foreign
from qk_sniffer.store.places import is_drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = dict[str, np.ndarray[Any, Any]]

PICTURES = {"by_query_bucket", "by_bucket_pair", "heads_in_order", "by_head", "component_weights"}

PICTURED = (
    "head_metrics",
    "head_bucket_plasticity",
    "head_component_weights",
    "head_intervals",
    "head_bucket_intervals",
    "mean_bucket_intervals",
)
"""The tables that the pictures show."""

WORDS = {FULL: "full attention", LIMITED: "sliding window or chunks"}

PLASTICITY = "attention plasticity"
MOST_TICKS = 7
MOST_LINES = 150
MOST_NAMES = 80
"""The most heads with their names below them."""

MOST_LAYER_TICKS = 24
MOST_NUMBERS = 10
"""The most buckets of a heatmap with numbers in its cells."""

MOST_HEAD_CELLS = 1 << 17
"""The most cells of the picture with one cell for each head."""


def draw_all(results: Results) -> list[Path]:
    """Draws all pictures of the results, replaces earlier ones, and returns their files.

    Without any plasticity there are none of buckets, and without intervals no heads in order.

    Raises:
        StoreError: a table is missing or damaged; the folder cannot be written.
    """
    record = results.record()
    columns = {name: results.table(name, record) for name in PICTURED}
    metrics, pairs, weights = (
        columns[f"head_{name}"] for name in ("metrics", "bucket_plasticity", "component_weights")
    )
    names = Names(record)
    pictures: dict[str, Callable[[], Figure]] = {}
    if np.isfinite(pairs["ap_bucket"]).any():
        shown = corrected(columns["head_bucket_intervals"]) or pairs
        means = columns["mean_bucket_intervals"]
        pictures["by_query_bucket"] = lambda: by_query_bucket(shown, means, names)
        pictures["by_bucket_pair"] = lambda: by_bucket_pair(shown, names)
    if len(columns["head_intervals"]["value"]):
        pictures["heads_in_order"] = lambda: heads_in_order(columns["head_intervals"], names)
    pictures |= {
        "by_head": lambda: by_head(metrics, columns["head_intervals"], names),
        "component_weights": lambda: component_weights(weights, names),
    }
    with explained(results.pictures, "make"):
        results.check()
        make_folder(results.pictures, results.access)
    drawn = [
        file
        for name, make in pictures.items()
        for file in save(results.pictures / name, make, suffixes=PAPER_SUFFIXES, access=results.access)
    ]
    earlier = {f"{name}{suffix}" for name in PICTURES - pictures.keys() for suffix in PAPER_SUFFIXES}
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
        for name in sorted(f"{name}{suffix}" for name in PICTURES for suffix in PAPER_SUFFIXES):
            refuse_foreign(folder, name, is_drawn)


def corrected(pairs: Columns) -> Columns | None:
    """The columns of head_bucket_plasticity with `ap_bucket` corrected for the size of the sample, from those of
    head_bucket_intervals; None if it has none."""
    if not np.isfinite(pairs["corrected"]).any():
        return None
    return {name: pairs[name] for name in ("layer", "q_head", "k_head", "q_bucket", "k_bucket")} | {
        "ap_bucket": pairs["corrected"]
    }


class Names:
    """The names of a dataset and its buckets in a picture, and which layers see only near keys. A bucket is named by
    its first position."""

    def __init__(self, record: dict[str, Any]) -> None:
        estimator = record["settings"]["estimator"]["name"]
        of_which = "" if estimator == ESTIMATORS[0] else f" ({estimator.replace('_', ' ')})"
        model = record["dataset"]["model"]
        self.dataset = as_text(f"{model_name(model)}{at_revision(model)} on {record['dataset']['texts']}{of_which}")
        self.limited = np.array(record["dataset"]["limited_layers"], np.int64)
        self._sampler = sampler_of({"config": {"sampler": record["dataset"]["sampler"]}})

    def buckets(self, axis: Any, buckets: npt.NDArray[np.integer[Any]]) -> None:
        """Labels the ticks 0, 1, 2, ... of an axis with the first positions of `buckets`, as many as fit."""
        step = -(-len(buckets) // MOST_TICKS)
        labels = [f"{self._sampler.span('q', int(bucket))[0]:,}" for bucket in buckets[::step]]
        axis.set_ticks(range(0, len(buckets), step), labels)

    def by_attention(self, columns: Columns) -> dict[str, Columns]:
        """The rows of layers with full attention, and of those with a sliding window or chunks, if there are any."""
        is_limited = np.isin(columns["layer"], self.limited)
        found = {}
        for attention, rows in ((FULL, ~is_limited), (LIMITED, is_limited)):
            if rows.any():
                found[attention] = {name: values[rows] for name, values in columns.items()}
        return found


def model_name(model: Mapping[str, Any]) -> str:
    """The last part of a model's name, as people call it; its slug if it has none."""
    return last_part(model["name"]) if model["name"] else str(model["slug"])


def at_revision(model: Mapping[str, Any]) -> str:
    """The revision of a model in its name, if it is not the usual one."""
    return "" if model["revision"] in ("main", "") else f" {model['revision']}"


def by_query_bucket(pairs: Columns, means: Columns, names: Names) -> "Figure":
    """Draws plasticity by query bucket, as the mean over key buckets: every head faint, their mean strong with its
    interval and its value without drift. Full attention and sliding windows have panels of their own."""
    groups = names.by_attention(pairs)
    buckets = np.arange(pairs["q_bucket"].min(), pairs["q_bucket"].max() + 1)
    drawn = figure(PAGE_IN if len(groups) > 1 else COLUMN_IN, 2.7)
    panels = np.atleast_1d(drawn.subplots(1, len(groups), sharey=True, sharex=True))
    for axes, (attention, columns) in zip(panels, groups.items(), strict=True):
        own, lines, mean = by_head_and_bucket(columns)
        places = own - buckets[0]
        axes.plot(places, lines.T, color=GREY, alpha=float(np.clip(30 / max(1, len(lines)), 0.03, 0.5)), linewidth=0.6)
        of_group = {name: values[means["attention"] == attention] for name, values in means.items()}
        band(axes, of_group, "ap_overall", buckets[0], BLUE, "95 % interval of the mean")
        label = f"mean of {len(lines):,} heads" if len(groups) == 1 else "mean of the heads"
        axes.plot(places, mean, color=BLUE, linewidth=2, marker="o", markersize=3.5, label=label)
        null = of_group["quantity"] == "ap_null"
        null_places = of_group["q_bucket"][null] - buckets[0]
        axes.plot(null_places, of_group["corrected"][null], "--", color=BLACK, linewidth=1, label="mean without drift")
        axes.plot([], [], color=GREY, linewidth=0.8, label="each head")
        names.buckets(axes.xaxis, buckets)
        axes.set(xlabel="query bucket (its first token position)", title=WORDS[attention] if len(names.limited) else "")
        axes.grid(axis="y", linewidth=0.3)
    panels[0].set_ylabel(PLASTICITY)
    panels[0].set_ylim(top=1.0 + 0.02 * (1.0 - panels[0].get_ylim()[0]))
    drawn.suptitle(names.dataset, fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2 if len(groups) == 1 else 4, fontsize=6)
    return drawn


def band(axes: "Axes", means: Columns, quantity: str, first: int, colour: str, label: str) -> None:
    """Fills the interval of a mean over the query buckets, of which `first` is at 0."""
    rows = (means["quantity"] == quantity) & np.isfinite(means["low"])
    if rows.any():
        places = means["q_bucket"][rows] - first
        axes.fill_between(places, means["low"][rows], means["high"][rows], color=colour, alpha=0.25, lw=0, label=label)


def by_bucket_pair(pairs: Columns, names: Names) -> "Figure":
    """Draws plasticity by query bucket and key bucket, as the mean over heads, with one scale for all panels."""
    groups = names.by_attention(pairs)
    lowest, highest = int(pairs["k_bucket"].min()), int(pairs["q_bucket"].max())
    size = highest - lowest  # the lowest bucket has no query here, the highest no key
    grids = {
        attention: mean_by(each["q_bucket"] - lowest - 1, each["k_bucket"] - lowest, each["ap_bucket"], (size, size))
        for attention, each in groups.items()
    }
    scale = {"vmin": min(map(np.nanmin, grids.values())), "vmax": max(map(np.nanmax, grids.values()))}
    drawn = figure(COLUMN_IN if len(grids) == 1 else PAGE_IN, 2.9)
    panels = np.atleast_1d(drawn.subplots(1, len(grids), sharey=True))
    for axes, (attention, grid) in zip(panels, grids.items(), strict=True):
        image = axes.imshow(grid, origin="lower", **scale)
        if size <= MOST_NUMBERS:
            write_numbers(axes, image, grid)
        names.buckets(axes.xaxis, np.arange(lowest, highest))
        axes.tick_params(axis="x", rotation=45)
        axes.set(xlabel="key bucket (its first position)", title=WORDS[attention] if len(names.limited) else "")
    names.buckets(panels[0].yaxis, np.arange(lowest + 1, highest + 1))
    panels[0].set_ylabel("query bucket (its first position)")
    drawn.suptitle(names.dataset, fontsize=8)
    drawn.colorbar(image, ax=list(panels), shrink=0.8, label=f"{PLASTICITY},\nmean over the heads that see both")
    return drawn


def heads_in_order(heads: Columns, names: Names) -> "Figure":
    """Draws the heads from the least plasticity to the largest, each with its interval and its value without drift."""
    of_heads, of_null = (
        {name: values[heads["quantity"] == quantity] for name, values in heads.items()}
        for quantity in ("ap_overall", "ap_null")
    )
    order = np.argsort(of_heads["corrected"], kind="stable")
    order = order[np.isfinite(of_heads["corrected"][order])]
    places = np.arange(len(order))
    is_limited = np.isin(of_heads["layer"][order], names.limited)
    drawn = figure(PAGE_IN, 2.9)
    axes = drawn.add_subplot()
    size = float(np.clip(160 / max(1, len(order)), 1.0, 3.5))
    axes.plot(places, of_null["corrected"][order], "_", color=BLACK, markersize=2 * size, label="without drift")
    for rows, colour, marker, label in (
        (~is_limited, BLUE, "o", WORDS[FULL]),
        (is_limited, ORANGE, "s", WORDS[LIMITED]),
    ):
        if rows.any():
            value, low, high = (of_heads[name][order][rows] for name in ("corrected", "low", "high"))
            axes.vlines(places[rows], low, high, color=colour, linewidth=size / 3)
            axes.plot(places[rows], value, marker, color=colour, markersize=size, label=f"{label}, 95 % interval")
    if len(order) <= MOST_NAMES:
        labels = [f"{of_heads['layer'][i]}.{of_heads['q_head'][i]}" for i in order]
        axes.set_xticks(places, labels, rotation=90, fontsize=5.5)
        axes.set_xlabel("layer.head, from the least plasticity to the largest")
    else:
        axes.set_xlabel("heads, from the least plasticity to the largest")
    axes.set(ylabel=PLASTICITY, title=names.dataset)
    axes.set_ylim(top=1.0 + 0.02 * (1.0 - axes.get_ylim()[0]))
    axes.margins(x=0.01)
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(loc="lower right", fontsize=6)
    return drawn


def by_head(metrics: Columns, intervals: Columns, names: Names) -> "Figure":
    """Draws plasticity, what the drift takes from it, and the positional R2 of every head."""
    from matplotlib.ticker import MaxNLocator

    shape = int(metrics["layer"].max()) + 1, int(metrics["q_head"].max()) + 1
    check_cells(shape, MOST_HEAD_CELLS)

    def grid(columns: Columns, values: Float64) -> Float64:
        cells = np.full(shape, np.nan)
        cells[columns["layer"], columns["q_head"]] = values
        return cells

    def of_intervals(quantity: str) -> Float64:
        rows = intervals["quantity"] == quantity
        return grid({name: values[rows] for name, values in intervals.items()}, intervals["corrected"][rows])

    grids: dict[str, tuple[Float64, float | None, float | None]] = {}
    if len(intervals["quantity"]):
        lost = of_intervals("ap_drift")
        grids[PLASTICITY] = of_intervals("ap_overall"), None, 1.0
        grids["lost to positional drift"] = lost, 0.0, max(0.01, float(np.nanmax(lost, initial=0.0)))
    else:
        grids[PLASTICITY] = grid(metrics, metrics["ap_overall"]), None, 1.0
    grids["positional $R^2$ of the queries"] = (grid(metrics, metrics["q_R2_pos"]), 0.0, None)
    height = float(np.clip(PAGE_IN / 2.6 * shape[0] / shape[1], 1.3, 6.0)) + 0.7
    drawn = figure(PAGE_IN, height)
    panels = drawn.subplots(1, len(grids), sharey=True)
    for axes, (title, (cells, low, high)) in zip(panels, grids.items(), strict=True):
        image = axes.imshow(cells, origin="lower", aspect="auto", vmin=low, vmax=high)
        drawn.colorbar(image)
        axes.set(xlabel="query head", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        mark_absent(axes)
    layers = np.arange(0, shape[0], -(-shape[0] // MOST_LAYER_TICKS))
    marks = [f"{layer} w" if layer in names.limited else f"{layer}" for layer in layers]
    panels[0].set_yticks(layers, marks)
    panels[0].set_ylabel("layer (w: sliding window or chunks)" if len(names.limited) else "layer")
    drawn.suptitle(names.dataset, fontsize=8)
    if any(np.isnan(cells).any() for cells, _, _ in grids.values()):
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
