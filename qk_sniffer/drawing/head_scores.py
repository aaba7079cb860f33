"""Draws where the attention of each head goes: a map of layers and heads for each score that heads are ranked by."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from qk_sniffer.dataset.head_scores import RANKED, NoRowsError, Ranges, head_scores, ranges_of
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.drawing.style import PAGE_IN, absent_patch, as_text, check_cells, figure, mark_absent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CELLS = 1 << 17
"""The most cells of a map with one cell for each head."""

MOST_TICKS = 8

LEAST_SCALE = 0.05
"""The least weight at the end of a scale of colours: smaller ones alone would look like findings."""


def attention(dataset: Dataset) -> "Figure | None":
    """Draws the maps of a dataset with attention summaries; returns None if no row counts.

    Raises:
        StoreError: a file is missing or damaged.
        HubError: a file cannot be fetched.
        QkSnifferError: as `score_maps`.
    """
    ranges = ranges_of(dataset)
    try:
        scores = head_scores(dataset, ranges)
    except NoRowsError:
        return None
    return score_maps(scores, title(dataset, ranges))


def title(dataset: Dataset, ranges: Ranges) -> str:
    """Returns the title of the maps: the model, the texts and the distances."""
    config = dataset.manifest["config"]
    close, distant = f"close: below {ranges.local_distance}", f"distant: {ranges.far_distance} and more"
    return as_text(f"{config['model']['slug']} on {config['dataset']['slug']} ({close}; {distant})")


def score_maps(scores: pa.Table, title: str) -> "Figure":
    """Draws the `scores` of `dataset.head_scores`: four maps, each of the layers (rows) and the query heads (columns).

    A head that was not captured, or has no row that counts, is hatched.

    Raises:
        QkSnifferError: the layers and heads make too large a grid.
    """
    columns = {name: scores[name].to_numpy() for name in ("layer", "head", *RANKED)}
    layers, row = np.unique(columns["layer"], return_inverse=True)
    shape = len(layers), int(columns["head"].max()) + 1
    check_cells(shape, MOST_CELLS)
    drawn = figure(PAGE_IN, float(np.clip(1.6 + 0.12 * len(layers), 2.5, 6.0)))
    axes = drawn.subplots(1, len(RANKED), sharey=True)
    step = -(-len(layers) // MOST_TICKS)
    for axis, (name, words) in zip(axes, RANKED.items(), strict=True):
        grid = np.full(shape, np.nan)
        grid[row, columns["head"]] = columns[name]
        mark_absent(axis)
        largest = max(LEAST_SCALE, float(np.nanmax(grid)))
        image = axis.imshow(grid, aspect="auto", interpolation="nearest", vmin=0, vmax=largest)
        axis.set(xlabel="query head", title=words.replace(", ", ",\n"))
        axis.spines[["left", "bottom"]].set_visible(False)
        drawn.colorbar(image, ax=axis, location="bottom", aspect=12)
    axes[0].set(ylabel="layer")
    axes[0].set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    drawn.suptitle(title)
    if np.isnan(columns["sink"]).any() or scores.num_rows < shape[0] * shape[1]:
        drawn.legend(handles=[absent_patch("not captured, or without rows")], loc="outside lower right")
    return drawn
