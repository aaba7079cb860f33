"""Reads the attention summaries of a query head into arrays."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.store.parquet_tables import read_matrix

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
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
        names = {"positions": "position", "example_ids": "example_id"}
        columns = {field.name: table[names.get(field.name, field.name)] for field in fields(cls)}
        return cls(
            **{
                name: read_matrix(column) if pa.types.is_fixed_size_list(column.type) else column.to_numpy()
                for name, column in columns.items()
            }
        )

    @property
    def bin_edges(self) -> npt.NDArray[np.int64]:
        """(D + 1,): the first distance of each bin, and the end of the last: bin b has edges[b] <= d < edges[b + 1]."""
        return 2 ** np.arange(self.distance_mass.shape[1] + 1, dtype=np.int64) - 1
