"""Defines the table of attention summaries of a query head: its columns, and their form in the journal.

A row summarizes the attention of one captured query over all keys that it sees. In the journal, the rows of a layer are
a block of the kind `ATTENTION`, whose "vectors" are records of W float32. A record holds the columns in order; integers
are stored by their bits. The rows are those of the layer's queries, in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.config import Config
from qk_sniffer.store.layout import KEY_COLUMNS

INTEGERS = ("num_keys", "top_position")
"""The columns of int32; the others are float32."""

NO_KEY = -1
"""The `top_position` where a query sees fewer keys than `top_k`."""


@dataclass(frozen=True)
class AttentionTable:
    """The columns of a dataset's attention summaries; `widths` are their numbers by name, 1 for a plain column."""

    widths: Mapping[str, int]

    @classmethod
    def of(cls, config: Config) -> "AttentionTable | None":
        """Returns the table of the datasets of `config`; None if they have none."""
        settings = config.capture.attention
        if not settings.enabled:
            return None
        plain = ("num_keys", "logsumexp", "max_logit", "entropy", "effective_keys", "sink_weight", "first_mass")
        lists = {
            "distance_mass": num_bins(config.model.tokenizer.max_length),
            "top_position": settings.top_k,
            "top_weight": settings.top_k,
        }
        return cls(dict.fromkeys(plain, 1) | lists)

    @property
    def width(self) -> int:
        """W, the numbers of a record."""
        return sum(self.widths.values())

    @property
    def places(self) -> dict[str, slice]:
        """The place of each column in a record."""
        ends = np.cumsum(list(self.widths.values())).tolist()
        return {name: slice(end - width, end) for (name, width), end in zip(self.widths.items(), ends, strict=True)}

    def is_list(self, name: str) -> bool:
        """Whether a column has a list of numbers in each row."""
        return name in ("distance_mass", "top_position", "top_weight")

    @property
    def schema(self) -> pa.Schema:
        """The columns of a head's file: those that name its rows, then those of the table."""
        keys = [pa.field(name, pa.int32(), nullable=False) for name in KEY_COLUMNS]
        return pa.schema(keys + [pa.field(name, self._type(name), nullable=False) for name in self.widths])

    def _type(self, name: str) -> pa.DataType:
        number = pa.int32() if name in INTEGERS else pa.float32()
        return pa.list_(number, self.widths[name]) if self.is_list(name) else number

    def columns(self, records: npt.NDArray[np.float32]) -> dict[str, pa.Array]:
        """Returns the columns of `records` (num_rows, W) as they are in Parquet."""
        found = {}
        for name, place in self.places.items():
            values: npt.NDArray[Any] = np.ascontiguousarray(records[:, place])
            numbers = pa.array(values.view(np.int32).ravel() if name in INTEGERS else values.ravel())
            found[name] = (
                pa.FixedSizeListArray.from_arrays(numbers, self.widths[name]) if self.is_list(name) else numbers
            )
        return found

    def num_nonfinite(self, records: npt.NDArray[np.float32]) -> int:
        """Returns the number of `records` (num_rows, W) in which a number of float32 is NaN or Inf."""
        places = [place for name, place in self.places.items() if name not in INTEGERS]
        return int((~np.all([np.isfinite(records[:, place]).all(axis=1) for place in places], axis=0)).sum())


def num_bins(max_length: int) -> int:
    """Returns the number of bins of distances in texts of at most `max_length` tokens.

    Bin b has the distances d of which floor(log2(d + 1)) is b: 0, 1 to 2, 3 to 6, and so on.
    """
    return max_length.bit_length()
