"""Describes heads and arrays of rows in a few words, for the reprs of datasets, captures and results."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.store.layout import KINDS, HeadKey
from qk_sniffer.text import counted, numbered

Ints = npt.NDArray[np.integer[Any]]


def head_facts(heads: Sequence[HeadKey]) -> str:
    """Returns the number of heads, and what they are: `60 heads (q, k of layers 0-5)`."""
    kinds = ", ".join(kind for kind in KINDS if any(head.kind == kind for head in heads))
    return f"{counted(len(heads), 'head')} ({kinds} of {numbered('layer', (head.layer for head in heads))})"


def further_facts(*, summaries: bool, stages: Sequence[str]) -> list[str]:
    """Returns what a dataset has next to rows: attention summaries, and statistics with their stages."""
    return ["attention summaries"] * summaries + [f"statistics ({', '.join(stages)})"] * bool(stages)


def row_facts(example_ids: Ints, positions: Ints) -> str:
    """Returns the number of rows and of their examples, and where they are: `8 rows of 2 examples, positions 0-9`."""
    return f"{counted(len(positions), 'row')} of {counted(len(np.unique(example_ids)), 'example')}{span(positions)}"


def span(positions: Ints) -> str:
    """Returns the first and the last of some positions as the end of a list, `, positions 0-9`; empty for none."""
    if not len(positions):
        return ""
    first, last = positions.min(), positions.max()
    return f", position {first}" if first == last else f", positions {first}-{last}"
