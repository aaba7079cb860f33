"""Describes arrays of rows in a few words, for the reprs of results."""

from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.text import counted

Ints = npt.NDArray[np.integer[Any]]


def row_facts(example_ids: Ints, positions: Ints) -> str:
    """Returns the number of rows and of their examples, and where they are: `8 rows of 2 examples, positions 0-9`."""
    return f"{counted(len(positions), 'row')} of {counted(len(np.unique(example_ids)), 'example')}{span(positions)}"


def span(positions: Ints) -> str:
    """Returns the first and the last of some positions as the end of a list, `, positions 0-9`; empty for none."""
    return f", positions {positions.min()}-{positions.max()}" if len(positions) else ""
