"""Finds experts that a checkpoint stores one by one and that it lacks or numbers otherwise."""

import re
from collections.abc import Iterable

_EXPERT = r"(.*\bexperts)\.(\d+)\.(.*)"


def renumbered(stored: Iterable[str]) -> list[str]:
    """Returns what is wrong with the numbers of the experts among the `stored` names, which count from 0.

    transformers stacks the experts of a layer in the order of their numbers. After a gap, each would be read as
    another one.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, (re.fullmatch(_EXPERT, key) for key in stored)):
        numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return sorted(
        f"{path}.{min(set(range(len(found))) - found)}.{leaf} is missing, {path}.{max(found)}.{leaf} is there"
        for (path, leaf), found in numbers.items()
        if found != set(range(len(found)))
    )


def missing(stored: Iterable[str]) -> list[str]:
    """Returns the names of weights that some experts have and that others of the same or another layer lack."""
    matches = [match for key in stored if (match := re.fullmatch(_EXPERT, key))]
    there = {match[0] for match in matches}
    paths: dict[str, set[str]] = {}
    parts: dict[str, tuple[set[int], set[str]]] = {}
    for match in matches:
        kind = re.sub(r"\d+", "*", match[1])
        paths.setdefault(kind, set()).add(match[1])
        numbers, leaves = parts.setdefault(kind, (set(), set()))
        numbers.add(int(match[2]))
        leaves.add(match[3])
    return sorted(
        name
        for kind, (numbers, leaves) in parts.items()
        for path in paths[kind]
        for number in numbers
        for leaf in leaves
        if (name := f"{path}.{number}.{leaf}") not in there
    )
