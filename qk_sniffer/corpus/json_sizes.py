"""Refuses JSON whose values would fill the memory: a text of two bytes a value becomes some fifty times as large."""

import re

MOST_VALUES = 1 << 21
"""The most values, nearly, in the lists and objects of one text."""

_SIGNS = ",:[{"
"""Each value in a list or an object is next to one of its own."""

_MARKS = re.compile(r'\\.|["\[\]{},:]', re.DOTALL)


def refuse_many_values(text: str) -> None:
    """Checks that a text of JSON holds few enough values to be parsed.

    Raises:
        ValueError: its first value holds more. A text that is cut, or no JSON, may pass: the parser refuses it.
    """
    if may_hold_many(text):
        refuse_large_value(text, 0)


def may_hold_many(text: str) -> bool:
    """Whether a text has the signs of more values. Counts those in strings too, at the speed of a search."""
    return len(text) > MOST_VALUES and sum(map(text.count, _SIGNS)) > MOST_VALUES


def refuse_large_value(text: str, start: int) -> None:
    """Checks, as `refuse_many_values` does, the value that begins in `text` at `start`. Reads no further than its end.

    Raises:
        ValueError: it holds more values.
    """
    depth = count = 0
    in_string = False
    for match in _MARKS.finditer(text, start):
        mark = match[0]
        if mark == '"':
            in_string = not in_string
        elif in_string or mark[0] == "\\":
            continue
        elif mark in "]}":
            depth -= 1
        else:
            count += 1
            depth += mark in "[{"
        if count > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values in lists and objects: leave it out")
        if depth <= 0 and not in_string:
            return
