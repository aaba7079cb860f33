"""Draws the statistics of heads over all tokens: ranges of channels, norms, and rotary frequencies.

A channel is one number of a head's vector. The rows of a map are the layers that have statistics.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import STAGE_NAMES, STAGES
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.drawing.style import (
    BLUE,
    GREY,
    ORANGE,
    PAGE_IN,
    Float64,
    absent_patch,
    as_text,
    check_cells,
    figure,
    mark_absent,
)
from qk_sniffer.store.layout import KEY_HEAD_KINDS, KIND_NAMES, KINDS
from qk_sniffer.store.statistics import Statistics
from qk_sniffer.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Layers = Mapping[int, Statistics]
"""The statistics of a kind and stage, by layer."""

MOST_TICKS = 12
DECADES = 4
"""The most powers of ten that a scale of colours spans."""

STAGE_STYLES: dict[str, dict[str, Any]] = {
    "pre": {"color": ORANGE, "linestyle": "--", "linewidth": 1.0},
    "post": {"color": BLUE, "linestyle": "-", "linewidth": 2.0},
}


def pictures(dataset: Dataset) -> dict[str, "Callable[[], Figure | None]"]:
    """Returns the pictures of a dataset's statistics by name, as functions that draw them.

    A function reads the files of statistics, and returns None if none of the numbers is finite.
    """
    stages = [stage for stage in STAGES if stage in dataset.stages]
    stated = dataset.manifest.get("statistics")
    if not stages or stated is None:
        return {}
    names = {section: dataset.manifest["config"][section]["slug"] for section in ("model", "dataset")}
    tokens = counted(stated["tokens"], "token")
    title = as_text(f"{names['model']} on {names['dataset']}, {tokens} a head")
    of_stage = cache(partial(read, dataset))

    def ranges(stage: str) -> "Figure | None":
        return channel_ranges(of_stage(stage), f"{title}, {STAGE_NAMES[stage]}")

    found: dict[str, Callable[[], Figure | None]] = {
        f"channel_ranges_{stage}": partial(ranges, stage) for stage in stages
    }
    found["norms"] = lambda: norms({stage: of_stage(stage) for stage in stages}, title)
    if "pre" in stages and any(
        isinstance(layer.get("rotation"), dict) for layer in dataset.manifest["model"]["layers"]
    ):
        found["rotary_frequencies"] = lambda: rotary_frequencies(of_stage("pre"), f"{title}, {STAGE_NAMES['pre']}")
    return found


def read(dataset: Dataset, stage: str) -> dict[str, Layers]:
    """Returns the statistics of a stage by kind and layer, without covariances.

    Raises:
        StoreError: a file is missing or damaged.
        HubError: a file cannot be fetched.
    """
    found: dict[str, Layers] = {}
    for kind in sorted(KINDS, key=lambda kind: (kind not in KEY_HEAD_KINDS, KINDS.index(kind))):
        layers = sorted({key.layer for key in dataset.heads if key.kind == kind})
        of_layers = {layer: dataset.find_statistics(layer, kind, stage, covariance=False) for layer in layers}
        if known := {layer: one for layer, one in of_layers.items() if one is not None}:
            found[kind] = known
    return found


def channel_ranges(of_kinds: Mapping[str, Layers], title: str) -> "Figure | None":
    """Draws the largest absolute values: by channel over the heads of a layer, and by head over its channels."""
    drawn_kinds = {}
    for kind, of_layers in of_kinds.items():
        absmax = [finite(one.absmax) for one in of_layers.values()]
        if any(np.isfinite(values).any() for values in absmax):
            by_channel = stacked([np.fmax.reduce(values, axis=0) for values in absmax])
            of_heads = [np.fmax.reduce(values, axis=1) for values in absmax]
            heads, by_head = in_columns([one.heads for one in of_layers.values()], of_heads)
            drawn_kinds[kind] = list(of_layers), by_channel, heads, by_head
    if not drawn_kinds:
        return None
    drawn, panels = rows_of_two([layers for layers, *_ in drawn_kinds.values()], widths=(3, 1))
    for (left, right), (kind, (layers, by_channel, heads, by_head)) in zip(panels, drawn_kinds.items(), strict=True):
        name = KIND_NAMES[kind]
        norm = log_norm(by_channel)
        show(left, floored(by_channel, norm), layers, norm)
        left.set(ylabel="layer", xlabel=f"channel of the {name} head", title=f"{name} channels: largest over the heads")
        integers(left.xaxis)
        image = show(right, floored(by_head, norm), layers, norm)
        right.set(xlabel=f"{name} head", title="largest of each head")
        label(right.xaxis, heads, most=6)
        colour_bar(drawn, image, right, "largest |value| (vector units)")
    finish(drawn, title, [grid for _, by_channel, _, by_head in drawn_kinds.values() for grid in (by_channel, by_head)])
    return drawn


def norms(of_stages: Mapping[str, Mapping[str, Layers]], title: str) -> "Figure | None":
    """Draws the mean and the standard deviation of the norms of all vectors of a layer, and the mean of each head.

    The last stage is the widest line: where RoPE keeps norms, the earlier one lies upon it.
    """
    lines = {
        (kind, stage): (layers, np.array([pooled(one) for one in layers.values()]))
        for stage, of_kinds in reversed([*of_stages.items()])
        for kind, layers in of_kinds.items()
    }
    lines = {key: line for key, line in lines.items() if np.isfinite(line[1]).any()}
    kinds = list(dict.fromkeys(kind for kind, _ in lines))
    if not kinds:
        return None
    drawn = figure(PAGE_IN, 2.9)
    panels = dict(zip(kinds, drawn.subplots(1, len(kinds), squeeze=False)[0], strict=True))
    for kind, axes in panels.items():
        axes.set(xlabel="layer", title=f"{KIND_NAMES[kind]} vectors")
        integers(axes.xaxis)
        axes.grid(axis="y", linewidth=0.3)
    for (kind, stage), (layers, values) in lines.items():
        axes, places, (mean, deviation) = panels[kind], [*layers], values.T
        style: dict[str, Any] = STAGE_STYLES[stage]
        axes.fill_between(places, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(places, mean, label=f"mean ± standard deviation, {STAGE_NAMES[stage]}", marker=".", **style)
        if stage == [*of_stages][-1]:
            heads = [(layer, norm) for layer, one in layers.items() for norm in finite(one.norm_mean)]
            dots = {"color": GREY, "markersize": 1.8, "linestyle": "none", "rasterized": True, "zorder": 1.5}
            axes.plot(*zip(*heads, strict=True), label="mean of each head", marker="o", **dots)
    panels[kinds[0]].set_ylabel("Euclidean norm (vector units)")
    drawn.suptitle(title, fontsize=8)
    handles = [axes.get_legend_handles_labels() for axes in panels.values()]
    # Kinds that RoPE does not change have fewer lines.
    drawn.legend(*max(handles, key=lambda each: len(each[0])), loc="outside lower center", ncols=3)
    return drawn


def rotary_frequencies(of_kinds: Mapping[str, Layers], title: str) -> "Figure | None":
    """Draws the mean modulus of each pair of components that turns, and how far the pairs point in one direction.

    The concentration R is the modulus of the mean of a pair, as a complex number, over its mean modulus: 1 if it has
    one direction in all tokens, 0 if its directions cancel. Both are means over the heads of a layer.
    """
    drawn_kinds = {}
    for kind, of_layers in of_kinds.items():
        rotated = {layer: one for layer, one in of_layers.items() if one.frequency_modulus is not None}
        moduli = [finite(one.frequency_modulus) for one in rotated.values()]
        if any(np.isfinite(modulus).any() for modulus in moduli):
            directed = stacked([mean_of(concentration(one)) for one in rotated.values()])
            drawn_kinds[kind] = list(rotated), stacked([mean_of(modulus) for modulus in moduli]), directed
    if not drawn_kinds:
        return None
    drawn, panels = rows_of_two([layers for layers, *_ in drawn_kinds.values()], widths=(1, 1))
    for (left, right), (kind, (layers, modulus, directed)) in zip(panels, drawn_kinds.items(), strict=True):
        norm = log_norm(modulus)
        image = show(left, floored(modulus, norm), layers, norm)
        left.set(ylabel="layer", title=f"{KIND_NAMES[kind]} vectors: mean modulus")
        colour_bar(drawn, image, left, "mean modulus (vector units)")
        image = show(right, directed, layers, None)
        image.set_clim(0, 1)
        right.set(title=f"{KIND_NAMES[kind]} vectors: concentration of the direction")
        drawn.colorbar(image, ax=right, label="R = |mean| / mean modulus")
        for axes in (left, right):
            axes.set(xlabel="rotary frequency (0: the fastest)")
            integers(axes.xaxis)
    finish(drawn, title, [grid for _, *both in drawn_kinds.values() for grid in both])
    return drawn


def concentration(one: Statistics) -> Float64:
    """Returns |mean| / mean modulus by head and frequency (H, f); NaN where the modulus is 0 or not known."""
    modulus, mean = finite(one.frequency_modulus), finite(np.abs(one.frequency_mean))  # type: ignore[arg-type]
    found: Float64 = np.divide(mean, modulus, out=np.full(mean.shape, np.nan), where=modulus > 0)
    return found


def pooled(one: Statistics) -> tuple[float, float]:
    """Returns the mean and the standard deviation of the norms of the vectors of all heads; NaN if it is not known."""
    is_known = (one.count > 0) & np.isfinite(one.norm_mean)
    count, mean = one.count[is_known].astype(np.float64), one.norm_mean[is_known].astype(np.float64)
    within = np.where(count > 1, one.norm_variance[is_known], 0.0) * (count - 1)
    total = count.sum()
    if not total:
        return np.nan, np.nan
    middle = float((count * mean).sum() / total)
    squares = float(within.sum() + (count * (mean - middle) ** 2).sum())
    return middle, float(np.sqrt(squares / max(total - 1, 1)))


def finite(values: npt.NDArray[Any] | None) -> Float64:
    """Returns the values in float64, with NaN for those that are not finite."""
    assert values is not None
    return np.where(np.isfinite(values), values, np.nan).astype(np.float64)


def mean_of(values: Float64) -> Float64:
    """Returns the mean of each column, without NaN; NaN if none is left."""
    known = np.isfinite(values)
    counts = known.sum(axis=0)
    sums = np.where(known, values, 0).sum(axis=0)
    found: Float64 = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return found


def stacked(rows: Iterable[Float64]) -> Float64:
    """Returns the rows as a grid. A row that is shorter than others ends in NaN."""
    found = list(rows)
    shape = (len(found), max(map(len, found)))
    check_cells(shape)
    grid = np.full(shape, np.nan)
    for row, values in zip(grid, found, strict=True):
        row[: len(values)] = values
    return grid


def in_columns(numbers: Sequence[npt.NDArray[np.int64]], rows: Sequence[Float64]) -> tuple[list[int], Float64]:
    """Returns the numbers of any row, ascending, and the grid with the values of each row in their columns."""
    columns = np.unique(np.concatenate(numbers))
    check_cells((len(rows), len(columns)))
    grid = np.full((len(rows), len(columns)), np.nan)
    for row, own, values in zip(grid, numbers, rows, strict=True):
        row[np.searchsorted(columns, own)] = values
    return columns.tolist(), grid


def rows_of_two(rows: Sequence[Sequence[int]], widths: tuple[int, int]) -> tuple["Figure", Any]:
    """Returns a figure and its panels (rows, 2). `rows` are the layers that the two maps of a row show."""
    heights = [float(np.clip(0.07 * len(layers), 1.6, 3.0)) for layers in rows]
    drawn = figure(PAGE_IN, sum(heights) + 0.75 * len(rows) + 0.3)
    return drawn, drawn.subplots(len(rows), 2, squeeze=False, width_ratios=widths, height_ratios=heights)


def log_norm(grid: Float64) -> Any:
    """Returns the scale of colours of a grid of numbers >= 0: logarithmic, if any number is above 0."""
    from matplotlib.colors import LogNorm, Normalize

    positive = grid[grid > 0]
    if not positive.size:
        return Normalize(0, 1)
    top = float(positive.max())
    return LogNorm(max(min(float(positive.min()), top / 2), top / 10**DECADES), top)


def floored(grid: Float64, norm: Any) -> Float64:
    """Returns the grid with the lowest number of a scale for smaller ones: 0 has no place in a logarithmic scale."""
    found: Float64 = np.maximum(grid, norm.vmin)
    return found


def show(axes: "Axes", grid: Float64, layers: Sequence[int], norm: Any) -> Any:
    """Draws a map with a row for each layer; returns the image."""
    image = axes.imshow(grid, aspect="auto", origin="lower", interpolation="nearest", norm=norm)
    mark_absent(axes)
    label(axes.yaxis, layers)
    return image


def colour_bar(drawn: "Figure", image: Any, axes: "Axes", text: str) -> None:
    """Adds the bar of a scale of `log_norm`, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    bar = drawn.colorbar(image, ax=axes, label=text)
    low, high = image.norm.vmin, image.norm.vmax
    if low > 0:
        steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 8 * low else (1, 2, 5) if high < 300 * low else (1,)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=steps))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def label(axis: Any, numbers: Sequence[int], most: int = MOST_TICKS) -> None:
    """Labels the ticks 0, 1, 2, ... of an axis with `numbers`, as many as fit."""
    step = -(-len(numbers) // most)
    axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])


def integers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def finish(drawn: "Figure", title: str, grids: Iterable[Float64]) -> None:
    """Writes the title, and the legend of cells without a value if there are any."""
    drawn.suptitle(title, fontsize=8)
    if any(np.isnan(grid).any() for grid in grids):
        drawn.legend(handles=[absent_patch("none, or not captured")], loc="outside lower center")
