"""Chooses rows by the columns that name them, and the row groups of a Parquet file that may have such rows."""

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qk_sniffer.errors import StoreError
from qk_sniffer.text import closest, did_you_mean

Numbers = int | range | Collection[int] | npt.NDArray[np.integer[Any]]
"""A number; those of a range, such as `range(128, 256)`; or several numbers."""


class RowValues(TypedDict, total=False):
    """Names rows: those that have one of the values in every column that is given.

    `dataset.vectors(0, 0, "q", example_id=[3, 7], position=range(1024))` has the first 1,024 positions of two examples.
    """

    bucket: Numbers
    example_id: Numbers
    position: Numbers
    segment: str | Collection[str]
    """Of datasets with `capture.capture_segments=true`."""


@dataclass(frozen=True)
class RowFilter:
    """The wanted values by column: each a range that ascends, or a sorted list."""

    wanted: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RowFilter":
        """Returns the filter of `RowValues`.

        Raises:
            TypeError: a column has another name.
            StoreError: a value is not of the column's type.
        """
        known = (*RowValues.__annotations__,)
        for name in values:
            if name not in known:
                raise TypeError(
                    f"rows cannot be chosen by {name!r}{did_you_mean(closest(name, known))}; use {', '.join(known)}"
                )
        return cls(
            {name: _names(value) if name == "segment" else _numbers(name, value) for name, value in values.items()}
        )

    @property
    def columns(self) -> list[str]:
        """The columns that the filter looks at; none if it keeps every row."""
        return [*self.wanted]

    def may_match(self, group: Any) -> bool:
        """Whether a row group, given by its metadata, may have wanted rows, by the statistics of its columns."""
        columns = [group.column(number) for number in range(group.num_columns)]
        bounds = {
            column.path_in_schema: (column.statistics.min, column.statistics.max)
            for column in columns
            if column.path_in_schema in self.wanted and column.is_stats_set and column.statistics.has_min_max
        }
        return all(_meets(self.wanted[name], *ends) for name, ends in bounds.items())

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Returns whether each row of a table with the columns of the filter is wanted: (rows,)."""
        kept = np.ones(len(table), np.bool_)
        for name, values in self.wanted.items():
            kept &= _is_among(table[name], values)
        return kept


def _meets(values: Sequence[Any], lowest: Any, highest: Any) -> bool:
    place = bisect_left(values, lowest)
    return place < len(values) and bool(values[place] <= highest)


def _is_among(column: pa.ChunkedArray, values: Sequence[Any]) -> npt.NDArray[np.bool_]:
    if isinstance(values, range):  # it may be too long for a list
        numbers = column.to_numpy().astype(np.int64)
        found: npt.NDArray[np.bool_] = (numbers >= values.start) & (numbers < values.stop)
        found &= (numbers - values.start) % values.step == 0
        return found
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    inside: npt.NDArray[np.bool_] = pc.is_in(column, pa.array(values, column.type)).to_numpy()
    return inside


def _numbers(name: str, value: Any) -> Sequence[int]:
    try:
        if isinstance(value, range):
            return _within_limits(value if value.step > 0 else value[::-1])
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
        return _within_limits(sorted({_integer(each) for each in (value if several else [value])}))
    except (TypeError, OverflowError):
        raise StoreError(
            f"rows are chosen by {name}={value!r}; give an integer, several, or a range such as range(128, 256)"
        ) from None


def _within_limits(values: Sequence[int]) -> Sequence[int]:
    """Returns the values that a column of int32 may have, a range only if it has several."""
    limits = np.iinfo(np.int32)
    inside = values[bisect_left(values, limits.min) : bisect_right(values, limits.max)]
    return inside if len(inside) > 1 else [*inside]


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_):  # a mask is no list of numbers
        raise TypeError
    return operator.index(value)


def _names(value: Any) -> Sequence[str]:
    found = {value} if isinstance(value, str) else {*value} if isinstance(value, Iterable) else {None}
    if not all(isinstance(each, str) for each in found):
        raise StoreError(f"rows are chosen by segment={value!r}; give a name, or several")
    return sorted(found)
