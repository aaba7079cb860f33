"""Compares and converts the values of a source: ids, and the values that `dataset.filter` asks for.

A value has the type that its file gives it. The cells of a CSV file have no types: each is text.
"""

import math
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from qk_sniffer.text import shortened

_SHOWN_VALUES = 5
_SHOWN_CHARACTERS = 40
_CANONICAL = re.compile(r"0|-?[1-9][0-9]{0,9}")
_NUMERAL = re.compile(
    r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?\s*|[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE
)
"""A text that is a number. Python also takes `1_0` for 10, which may be a name in a file."""


def id_of(value: Any, *, typed: bool) -> Any:
    """Returns the id that a value of the id column is; None for no id.

    A float without a fraction is an integer: a column of integers with nulls becomes one of floats in many programs.

    Args:
        typed: whether the source has types. Without, a text is the integer that it is the usual form of: `12` is 12,
            and `007` stays a text.
    """
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float):
        if value != value:
            return None
        return int(value) if value.is_integer() else value
    if not typed and isinstance(value, str) and _CANONICAL.fullmatch(value):
        return int(value)
    return value


class Float16(float):
    """A number that a file holds as float16. Another file of the source may have the column in another type."""


class Float32(float):
    """A number that a file holds as float32."""


class Filter:
    """The rows that have the values of `dataset.filter`, each compared in the type of its column.

    Remembers some of the values that it has met, to explain why it accepts no row.
    """

    def __init__(self, wanted: Mapping[str, Any], kinds: Mapping[str, str], *, typed: bool) -> None:
        self._wanted = dict(wanted)
        self._kinds = kinds
        self._typed = typed
        self._same = {column: _same_as(value, kinds[column], typed=typed) for column, value in wanted.items()}
        self._met: dict[str, dict[str, None]] = {column: {} for column in wanted}
        self._matched: set[str] = set()

    def is_impossible(self, kinds: Mapping[str, str]) -> bool:
        """Whether a column is of a type of which no value can be equal to the value that is wanted there."""
        return any(not _is_possible(value, kinds.get(column, "unknown")) for column, value in self._wanted.items())

    def accepts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all values."""
        accepted = True
        for column, same in self._same.items():
            value = row[column]
            if same(value):
                self._matched.add(column)
            else:
                accepted = False
                met = self._met[column]
                if len(met) <= _SHOWN_VALUES:
                    met[_written(value)[:_SHOWN_CHARACTERS]] = None
        return accepted

    def explain(self) -> str:
        """Describes the columns of which no value so far was the wanted one: their types and some values."""
        lines = []
        for column, met in self._met.items():
            if column not in self._matched:
                kind = self._kinds[column] if self._typed else "text"
                if kind == "unknown" and met.keys() <= {_written(None)}:
                    lines.append(f"column {column!r} has no value in any example")
                    continue
                has = f"has {shortened([*met], _SHOWN_VALUES)}" if met else "has other values"
                lines.append(f"column {column!r} ({kind}) {has}")
        return "; ".join(lines) or "each value is there, but no example has all of them"


def _written(value: Any) -> str:
    """Returns a value as a filter is written, but with quotes around a text."""
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)


def _same_as(wanted: Any, kind: str, *, typed: bool) -> Callable[[Any], bool]:
    number = _number(wanted)
    # A float without a class of its own is of the column's first type, or a float64 of a later file.
    equal: dict[type, tuple[int | float | None, ...]] = {
        float: (number, _rounded(number, kind)),
        Float16: (_rounded(number, "float16"),),
        Float32: (_rounded(number, "float32"),),
    }

    def same(value: Any) -> bool:
        if value is None or wanted is None:
            return value is wanted or (not typed and wanted == "")
        if isinstance(value, str):
            return _is_text(value, wanted, typed=typed)
        if isinstance(value, bool):
            return value is _boolean(wanted)
        if isinstance(value, Decimal):
            return value == _decimal(wanted)
        if isinstance(value, float):
            return value in equal.get(type(value), equal[float])
        if isinstance(value, int):
            return value == number
        if isinstance(value, date):
            return value == _time(wanted, type_of=datetime if isinstance(value, datetime) else date)
        return str(id_of(value, typed=typed)) == str(wanted)

    return same


def _is_text(value: str, wanted: Any, *, typed: bool) -> bool:
    if isinstance(wanted, bool):
        return value.lower() == str(wanted).lower()
    if value == str(wanted):
        return True
    return not typed and isinstance(wanted, int | float) and _number(value) == wanted


def _is_possible(wanted: Any, kind: str) -> bool:
    if wanted is None:
        return True
    if kind == "bool":
        return _boolean(wanted) is not None
    if kind.startswith(("int", "uint")):
        number = _number(wanted)
        return number is not None and number == number // 1
    if kind.startswith(("float", "decimal")):
        return _number(wanted) is not None
    return True


def _boolean(wanted: Any) -> bool | None:
    return {"true": True, "false": False}.get(str(wanted).lower())


def _number(wanted: Any) -> int | float | None:
    if isinstance(wanted, bool):
        return None
    if isinstance(wanted, int | float):
        return wanted
    if not _NUMERAL.fullmatch(str(wanted)):
        return None
    for kind in (int, float):
        try:
            return kind(str(wanted))
        except ValueError:
            continue
    return None


def _rounded(number: int | float | None, kind: str) -> int | float | None:
    """Returns the number as a column of this type holds it, or the number itself if it has no place there."""
    if number is None or kind not in ("float16", "float32"):
        return number
    try:
        with np.errstate(over="ignore"):
            rounded: float = getattr(np, kind)(number).item()
    except OverflowError:
        return number
    return rounded if math.isfinite(rounded) else number


def _decimal(wanted: Any) -> Decimal | None:
    try:
        return None if isinstance(wanted, bool) else Decimal(str(wanted))
    except InvalidOperation:
        return None


def _time(wanted: Any, type_of: type[date]) -> date | None:
    try:
        return type_of.fromisoformat(str(wanted))
    except ValueError:
        return None
