"""Packs numbers for the page: rounded for JSON, or as the bytes of an array in base64.

The script of the page (`page/report.js`) unpacks them.
"""

import base64
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

DIGITS = 4
"""The significant digits of a number in JSON. A reader sees at most so many."""

Json = dict[str, Any]


def number(value: float) -> float | int | None:
    """Returns a number with `DIGITS` significant digits; None for NaN and Inf, which JSON does not have."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS - 1}e}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def numbers(values: Iterable[float]) -> list[float | int | None]:
    """Returns each number as `number` does."""
    return [number(float(value)) for value in values]


def grid(rows: Iterable[Iterable[float]]) -> list[list[float | int | None]]:
    """Returns the numbers of a grid, row by row."""
    return [numbers(row) for row in rows]


def points(places: npt.NDArray[np.float64], positions: npt.NDArray[np.int32]) -> Json:
    """Packs points (n, 2) and their positions (n,).

    `xy` has int16 numbers, x and y in turn, of which 32767 is `scale`. `positions` has int32 numbers.
    """
    scale = float(np.abs(places).max(initial=0)) or 1.0
    steps = np.round(places / scale * 32767).astype("<i2")
    return {"scale": number(scale), "xy": _base64(steps), "positions": _base64(positions.astype("<i4"))}


def shares(values: npt.NDArray[np.floating[Any]]) -> str:
    """Packs shares from 0 to 1 as bytes: 255 times their square root, which keeps small shares apart."""
    return _base64(np.round(255 * np.sqrt(np.clip(values, 0, 1))).astype(np.uint8))


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
