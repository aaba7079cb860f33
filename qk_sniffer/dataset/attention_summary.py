"""Reads the attention summaries of a query head into arrays."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.dataset.array_facts import row_facts
from qk_sniffer.dataset.frames import column_of, pandas_frame, polars_frame
from qk_sniffer.store.parquet_tables import read_matrix, read_numbers
from qk_sniffer.text import counted

if TYPE_CHECKING:
    import pandas
    import polars

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_COLUMNS = {"positions": "position", "example_ids": "example_id"}
"""The columns of a file whose arrays have other names."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionSummary:
    """The attention of the captured queries of a head over all keys that each sees, row for row as their vectors.

    A weight w is that of the model's own softmax. Where a learned sink takes a share, the weights of the keys sum to
    less than 1, and all columns are of these weights as they are.
    """

    positions: Int32
    """(rows,): the position of the query in its example, from 0."""
    example_ids: Int32
    """(rows,): the example of the query; `Dataset.examples` describes it."""
    num_keys: Int32
    """(rows,): the keys that the query sees, its own included."""
    logsumexp: Float32
    """(rows,): the natural logarithm of the sum of exp(logit), with that of a learned sink. A key with logit x has the
    weight exp(x - logsumexp)."""
    max_logit: Float32
    """(rows,): the largest logit of a key."""
    entropy: Float32
    """(rows,): the sum of -w ln w, in nats."""
    effective_keys: Float32
    """(rows,): 1 divided by the sum of the squared weights. n for n equal weights that sum to 1."""
    sink_weight: Float32
    """(rows,): the weight of the learned sink; 0 without one."""
    first_mass: Float32
    """(rows,): the weight of the keys at positions below `capture.attention.sink_tokens`."""
    distance_mass: Float32
    """(rows, D): the weight of the keys by their distance d, the position of the query less that of the key. Bin b has
    the distances of which floor(log2(d + 1)) is b: see `bin_edges`."""
    top_position: Int32
    """(rows, top_k): the positions of the keys with the largest weights, largest first; -1 where there are fewer."""
    top_weight: Float32
    """(rows, top_k): their weights; 0 where there are fewer."""

    @classmethod
    def of(cls, table: pa.Table) -> "AttentionSummary":
        """Returns the arrays of the columns of a file of attention summaries."""
        columns = {field.name: table[_COLUMNS.get(field.name, field.name)] for field in fields(cls)}
        return cls(
            **{
                name: read_matrix(column) if pa.types.is_fixed_size_list(column.type) else read_numbers(column)
                for name, column in columns.items()
            }
        )

    @property
    def bin_edges(self) -> npt.NDArray[np.int64]:
        """(D + 1,): the first distance of each bin, and the end of the last: bin b has edges[b] <= d < edges[b + 1]."""
        return 2 ** np.arange(self.distance_mass.shape[1] + 1, dtype=np.int64) - 1

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns the rows as a data frame of pandas, with the columns of the file. A list is an array in its cell.

        Raises:
            QkSnifferError: pandas is not installed.
        """
        return pandas_frame(self._table())

    def to_polars(self) -> "polars.DataFrame":
        """Returns the rows as a data frame of polars, with the columns of the file. A list is of the type Array.

        Raises:
            QkSnifferError: polars is not installed.
        """
        return polars_frame(self._table())

    def _table(self) -> pa.Table:
        arrays = {_COLUMNS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        return pa.table({name: column_of(array) for name, array in arrays.items()})

    def __repr__(self) -> str:
        rows = row_facts(self.example_ids, self.positions)
        bins, top_k = self.distance_mass.shape[1], self.top_position.shape[1]
        return f"<AttentionSummary: {rows}, {bins} bins of distances, {counted(top_k, 'top key')}>"
