"""Formats numbers, lists and columns for people, and suggests names for mistyped ones."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


def compact_ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as people write them: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def shortened(names: Sequence[str], most: int) -> str:
    """Returns the first `most` names and the number of the others: `a, b and 3 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def in_mb(size: int) -> str:
    """Returns a number of bytes in megabytes (10^6 bytes)."""
    return f"{size / 1e6:,.1f} MB"


def closest(name: str, valid: Sequence[str], cutoff: float = 0.7) -> list[str]:
    """Returns at most three names in `valid` that `name` may be a misspelling of, the most similar first."""
    return difflib.get_close_matches(name, valid, n=3, cutoff=cutoff)


def did_you_mean(names: Sequence[str]) -> str:
    """Returns `, did you mean a or b?`; an empty string for no names."""
    return f", did you mean {' or '.join(names)}?" if names else ""


def expand_home(path: str) -> str:
    """Replaces a leading `~/` of `path` by the home folder. A shell does so only at the start of a word."""
    return str(Path.home() / path[2:]) if (path + "/").startswith("~/") else path
