"""Writes examples whose tokens have segments: token ids, with the starts of their segments."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from support.jobs import TEXTS
from support.tiny import ALPHABET

NAMES = ("system", "user", "assistant")

COLUMNS: dict[str, Any] = {"tokens_column": "input_ids", "segments_column": "segments"}
"""The settings of `dataset` for these files."""


def runs_of(index: int) -> list[tuple[str, int]]:
    """Returns the name and the first position of each segment of an example. Some have no tokens of the assistant."""
    length = len(TEXTS[index])
    if index % 7 == 3:
        return [("user", 0)]
    starts = sorted({0, *np.random.default_rng(index).integers(0, length, 1 + index % 5).tolist()})
    return [(NAMES[(index + place) % 3], start) for place, start in enumerate(starts)]


def names_of(index: int) -> list[str]:
    """Returns the segment of each token of an example."""
    runs = runs_of(index)
    stops = [start for _, start in runs[1:]] + [len(TEXTS[index])]
    return [name for (name, start), stop in zip(runs, stops, strict=True) for _ in range(start, stop)]


def write(path: Path, number: int = len(TEXTS)) -> Path:
    """Writes the first examples to a jsonl file. Their ids are those of `TEXTS`."""
    rows = [
        {
            "input_ids": [1 + ALPHABET.index(each) for each in TEXTS[index]],
            "segments": runs_of(index),
            "id": f"doc-{index}",
        }
        for index in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
