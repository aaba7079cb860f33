"""Gives all pictures their style and their files: a PNG for pages, and an SVG for papers, whose text stays text.

They fit the columns of a paper, and are readable in grey and for colour-blind readers (cividis, and the palette of
Okabe and Ito). The same numbers give the same bytes with one version of matplotlib.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import QkSnifferError
from qk_sniffer.machine import release_memory
from qk_sniffer.store.disk import explained
from qk_sniffer.store.layout import PICTURE_MARK, PICTURE_SUFFIXES
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.own_files import refuse_foreign, rename_over_own, temporary_name
from qk_sniffer.store.places import is_drawn
from qk_sniffer.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Float64 = npt.NDArray[np.float64]

COLUMN_IN, PAGE_IN = 3.4, 7.0
"""The widths of a column and of a page of two columns, in inches."""

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#999999", "#000000"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 200,
    "savefig.dpi": "figure",
    "image.cmap": "cividis",
    "legend.frameon": False,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # TrueType: journals refuse the Type 3 fonts that matplotlib embeds by default
    "svg.fonttype": "none",
    "svg.hashsalt": "qk-sniffer",
}

PAPER_SUFFIXES = (*PICTURE_SUFFIXES, ".pdf")
"""The formats of pictures for papers; LaTeX includes a PDF as it is."""

ABSENT: dict[str, Any] = {"facecolor": "#EEEEEE", "edgecolor": GREY, "hatch": "////", "linewidth": 0}
"""The style of a cell without a value."""

MOST_CELLS = 1 << 25
"""The most cells that a picture is computed from: 256 MB. Files of someone else may name any numbers of heads, buckets
and channels, and a small file can describe a grid of any size."""

_METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": PICTURE_MARK},
    ".svg": {"Date": None, "Creator": PICTURE_MARK},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": PICTURE_MARK},
}
"""Names this package, and leaves out the version and the time that matplotlib writes by default."""


def save(
    path: Path,
    make: "Callable[[], Figure | None]",
    *,
    suffixes: Sequence[str] = PICTURE_SUFFIXES,
    access: Access = PLAIN,
    held: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Path]:
    """Draws a picture in the style of this module, and writes it in each format, whole or not at all.

    Replaces only pictures that this package has drawn. `path` is without a suffix. Each file gets its name within a
    context of `held`, which may hold a lock. Returns the files; none if there is nothing to draw.

    Raises:
        StoreError: a file cannot be written, or is of someone else.
    """
    files = [path.with_name(path.name + suffix) for suffix in suffixes]
    for file in files:  # before any is replaced, and before the drawing
        with explained(file, "write"), access.open(file.parent) as folder:
            refuse_foreign(folder, file.name, is_drawn)
    with styled():
        drawn = make()
        if drawn is None:
            return []
        for file in files:
            temporary = temporary_name(file.name)
            with explained(file, "write"), access.open(file.parent) as folder:
                access.check()
                with folder.temporary(temporary) as target:
                    drawn.savefig(target, format=file.suffix[1:], metadata=_METADATA[file.suffix])
                    target.flush()
                    with held():
                        access.check()
                        rename_over_own(folder, temporary, file.name, is_drawn)
            drawn.set_layout_engine("none")  # computed by now, and the same for every format
    del drawn
    release_memory()  # parts of a picture refer to each other: Python would collect them some time after the next ones
    return files


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style of this module within the block, and nothing else."""
    with _in_folder_of_root():
        import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@contextmanager
def _in_folder_of_root() -> Iterator[None]:
    """Makes / the current folder of the process within the block.

    matplotlib reads a file matplotlibrc of the current folder when it is imported, which may be anyone's: its lines are
    quoted in warnings, as a pipe it never ends, and it may have LaTeX read any file into a picture.
    """
    if "matplotlib" in sys.modules:
        yield
        return
    here = os.open(".", os.O_PATH)
    try:
        os.chdir("/")
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def as_text(text: str) -> str:
    """Returns a text that matplotlib draws as it is: in one line, without formulas, and in a legend."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def figure(width: float, height: float) -> "Figure":
    """A figure of the given size in inches. Avoids pyplot, which keeps figures alive and looks for a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def mark_absent(axes: "Axes") -> None:
    """Hatches what no cell of an image covers, so that no reader takes an absent value for a value."""
    axes.patch.set(**ABSENT)


def absent_patch(label: str) -> Any:
    """The legend's patch for a hatched cell."""
    from matplotlib.patches import Patch

    return Patch(**ABSENT, label=label)


def check_cells(shape: tuple[int, int], most: int = MOST_CELLS) -> None:
    """Checks the size of a grid before memory is taken for it.

    Raises:
        QkSnifferError: it has more than `most` cells.
    """
    if shape[0] * shape[1] > most:
        raise QkSnifferError(
            f"the files name heads, buckets or channels that make a grid of {shape[0]:,} x {shape[1]:,} cells; a "
            f"picture shows at most {most:,}. Check the files with other programs, or make them again"
        )
