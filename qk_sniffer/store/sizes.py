"""Predicts the bytes of the files of a job, before there are any: segments of the journal, Parquet files, statistics.

The bytes of a segment follow from its rows. Those of a Parquet file follow from what its numbers compress to, and so
some of its rows are written to memory with the encodings of `parquet_writer.py`: the places of real rows, and random
vectors. Mantissas hardly compress, and take most of the bytes. Exponents take the rest, which differs little from model
to model.
"""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.config import CaptureConfig
from qk_sniffer.store.compact import ROW_GROUP_BYTES
from qk_sniffer.store.journal import ExampleRecord, values_of
from qk_sniffer.store.layout import ATTENTION, OFFSET_COLUMNS, schema
from qk_sniffer.store.parquet_writer import options
from qk_sniffer.store.rows import RUN_COLUMNS, token_columns
from qk_sniffer.store.segment import ITEM_SIZES

SPREAD = 0.3
"""The standard deviation of the logarithm of a component's scale, in the random vectors: components of a head differ in
size, by a factor of about two."""

_HEADER_BYTES = 80
"""Of a tensor in the header of a segment."""

_METADATA_BYTES = 450
"""Of the text in the footer of a head's file."""

_CARD_BYTES, _ENTRY_BYTES, _LAYER_BYTES = 18_000, 260, 800
"""Of the card and the manifest: what each has, and what a file and a layer add."""

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of a head, and what its vectors are: `width` numbers of `itemsize` bytes, 8 bits of them exponent.

    `example_id`, `position` and `bucket` are (rows,). `mantissa` is the number of bits of a mantissa. `token_id`
    (rows,) is given for vectors that follow from the token alone, which repeat: those of the first layer before RoPE.
    """

    kind: str
    width: int
    mantissa: int
    example_id: Int32
    position: Int32
    bucket: Int32
    sliding_window: int | None
    capture: CaptureConfig
    token_id: Int32 | None = None

    @property
    def rows_per_group(self) -> int:
        """The rows of a row group of the file."""
        return rows_per_group(self.width)

    def file_bytes(self, rows: int) -> int:
        """Returns the bytes of a file of `rows` rows like these."""
        known = len(self.position)
        if rows <= known:
            return self._written(rows)
        if known < 2 * self.rows_per_group:
            return self._all + (self._all - self._none) * (rows - known) // max(1, known)
        one = self._written(self.rows_per_group)
        per_group = self._written(2 * self.rows_per_group) - one
        return one + per_group * (rows - self.rows_per_group) // self.rows_per_group

    @cached_property
    def _all(self) -> int:
        return self._written(len(self.position))

    @cached_property
    def _none(self) -> int:
        return self._written(0)

    def _written(self, rows: int) -> int:
        """Returns the bytes of a file of the first `rows` rows, as it is written to memory."""
        described = schema(self.width, self.capture)
        file = io.BytesIO()
        with pq.ParquetWriter(file, described, **options(described)) as writer:
            for start in range(0, rows, self.rows_per_group):
                table = self._table(start, min(rows, start + self.rows_per_group), described)
                writer.write_table(table, row_group_size=table.num_rows)
        return file.tell() + _METADATA_BYTES

    def _vectors(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Returns random vectors (rows, width)."""
        if self.token_id is None:
            return _random_vectors(stop - start, self.width, self.mantissa)
        tokens, of_row = np.unique(self.token_id[start:stop], return_inverse=True)
        return _random_vectors(len(tokens), self.width, self.mantissa)[of_row]

    def summary_bytes(self, rows: int, top_k: int) -> int:
        """Returns the bytes of a file of attention summaries with `rows` rows at positions like these.

        A record has numbers of float32 whose mantissas are full, for each bin of distances and each of the `top_k`
        keys. Bins beyond the keys that a query sees are 0, and take no space. The bytes of each number are measured.
        """
        seen = self.position.astype(np.int64) + 1
        if self.sliding_window is not None:
            seen = np.minimum(seen, self.sliding_window)
        bins = float((np.floor(np.log2(seen)) + 1).mean()) if len(seen) else 0.0
        plain = 21.7 if self.sliding_window is None else 16.4
        return 4200 + round(rows * (plain + 3.72 * bins + 4.95 * top_k))

    def _table(self, start: int, stop: int, described: pa.Schema) -> pa.Table:
        rows = stop - start
        window = None if self.sliding_window is None else np.full(rows, self.sliding_window, np.int32)
        values: dict[str, Any] = {
            "bucket": self.bucket[start:stop],
            "example_id": self.example_id[start:stop],
            "position": self.position[start:stop],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(self._vectors(start, stop).ravel()), self.width),
            "sliding_window": pa.nulls(rows, pa.int32()) if window is None else window,
        }
        # Tokens are hardly rarer than in any text: a few hundred common ones, and a tail.
        tokens = (np.random.default_rng(start).pareto(0.7, rows) * 50).clip(0, 50_000).astype(np.int32)
        spelled = pa.array(np.char.add("token", tokens.astype(str)), pa.string())
        values |= {"token_id": tokens, "token_str": spelled}
        values |= dict.fromkeys(OFFSET_COLUMNS, 5 * self.position[start:stop])
        if self.capture.capture_segments:
            names = pa.array(["user"], pa.string())
            values["segment"] = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), names)
        arrays = [pa.array(values[name], type=described.field(name).type) for name in described.names]
        return pa.Table.from_arrays(arrays, schema=described)


def rows_per_group(width: int) -> int:
    """Returns the rows of a row group, for vectors of `width` numbers."""
    return max(1, ROW_GROUP_BYTES // (4 * width))


def _random_vectors(rows: int, width: int, mantissa: int) -> npt.NDArray[np.float32]:
    """Returns random vectors (rows, width) whose mantissas have `mantissa` bits."""
    random = np.random.default_rng(width)
    scales = np.exp(SPREAD * random.standard_normal(width, np.float32))
    vectors: npt.NDArray[np.float32] = random.standard_normal((rows, width), np.float32) * scales
    bits = vectors.view(np.uint32)
    bits &= np.uint32(0xFFFFFFFF << (23 - mantissa) & 0xFFFFFFFF)
    return vectors


MANTISSAS = {"bfloat16": 7, "float16": 10, "float32": 23}
"""The bits of a mantissa, by dtype."""


def block_bytes(rows: int, runs: int, heads: int, width: int, itemsize: int, capture: CaptureConfig, kind: str) -> int:
    """Returns the bytes of the rows of a (layer, kind) in the journal, in all segments."""
    columns = 1 + (0 if kind == ATTENTION else len(token_columns(capture)))
    per_row = heads * width * itemsize + columns * ITEM_SIZES["I32"]
    return rows * per_row + runs * len(RUN_COLUMNS) * ITEM_SIZES["I64"]


def headers_bytes(records_bytes: int, num_blocks: int, tensors: int, segments: int) -> int:
    """Returns the bytes of the headers of `segments` segments, each with `num_blocks` blocks of so many tensors.

    `records_bytes` are those of the records of all examples, as `record_bytes` counts them.
    """
    return records_bytes + segments * (num_blocks * tensors * _HEADER_BYTES + 200)


def record_bytes(record: ExampleRecord) -> int:
    """Returns the bytes of an example's record in a segment, in which quotes are escaped."""
    return len(json.dumps(json.dumps(values_of(record)))) + 2


def others_bytes(num_examples: int, num_files: int, num_layers: int) -> int:
    """Returns the bytes of the card, the manifest and the list of the examples."""
    return _CARD_BYTES + num_files * _ENTRY_BYTES + num_layers * _LAYER_BYTES + 2500 + 50 * num_examples


def statistics_bytes(num_heads: int, width: int, *, covariance: bool, pairs: int) -> tuple[int, int]:
    """Returns the bytes of the statistics of the heads of a (layer, kind, stage): in the dataset, and of a group of
    batches in the journal. `pairs` is the number of rotary frequencies."""
    matrix = width**2 if covariance else 0
    dataset = num_heads * (4 * (matrix + 4 * width + 2 + pairs) + 3 * 8) + 16 * pairs + 12 * _HEADER_BYTES
    journal = num_heads * (4 * ((matrix or width) + 3 * width + 2 + pairs) + 2 * 8) + 8 * _HEADER_BYTES
    return dataset, journal
