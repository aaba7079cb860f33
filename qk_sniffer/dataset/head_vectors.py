"""The vectors of one head, as `vectors` of a dataset or a capture returns them."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.dataset.array_facts import row_facts
from qk_sniffer.dataset.frames import column_of, pandas_frame, polars_frame

if TYPE_CHECKING:
    import pandas
    import polars


class HeadVectors(NamedTuple):
    """The rows of a head, by the order of the examples and then by position. The arrays are writable."""

    vectors: npt.NDArray[np.float32]
    """(rows, d): d is head_dim for queries and keys; values and outputs may have another width."""
    positions: npt.NDArray[np.int32]
    """(rows,): the position of the token in its example, from 0."""
    example_ids: npt.NDArray[np.int32]
    """(rows,): the example of the token; `Dataset.examples` describes it."""

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns the rows as a data frame of pandas with the columns example_id, position and vector.

        Raises:
            QkSnifferError: pandas is not installed.
        """
        return pandas_frame(self._table())

    def to_polars(self) -> "polars.DataFrame":
        """Returns the rows as a data frame of polars with the columns example_id, position and vector.

        Raises:
            QkSnifferError: polars is not installed.
        """
        return polars_frame(self._table())

    def _table(self) -> pa.Table:
        vector = column_of(self.vectors)
        return pa.table({"example_id": self.example_ids, "position": self.positions, "vector": vector})

    def __repr__(self) -> str:
        return f"<HeadVectors: {row_facts(self.example_ids, self.positions)}, {self.vectors.shape[1]} numbers in each>"
