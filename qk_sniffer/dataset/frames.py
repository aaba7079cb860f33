"""Turns tables of pyarrow into data frames of pandas and polars, if these are installed."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.errors import QkSnifferError

if TYPE_CHECKING:
    import pandas
    import polars


def pandas_frame(table: pa.Table) -> "pandas.DataFrame":
    """Returns a table as a data frame of pandas. A list of numbers, such as a vector, is an array in its cell.

    Raises:
        QkSnifferError: pandas is not installed.
    """
    try:
        import pandas  # noqa: F401  # pyarrow imports it
    except ImportError:
        raise _missing("pandas") from None
    return table.to_pandas()


def polars_frame(table: pa.Table) -> "polars.DataFrame":
    """Returns a table as a data frame of polars. A list of numbers, such as a vector, is of the type Array.

    Raises:
        QkSnifferError: polars is not installed.
    """
    try:
        import polars
    except ImportError:
        raise _missing("polars") from None
    frame = polars.from_arrow(table)
    assert isinstance(frame, polars.DataFrame)
    return frame


def column_of(array: npt.NDArray[Any]) -> pa.Array:
    """Returns an array (rows,) as a column, and one of (rows, n) as a column of lists of n numbers."""
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).ravel()), array.shape[1])


def _missing(package: str) -> QkSnifferError:
    return QkSnifferError(f"the data frame needs {package}, which is not installed: pip install {package}")
