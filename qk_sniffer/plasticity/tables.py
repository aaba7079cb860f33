"""Writes and reads the tables, as CSV and as Parquet, from the results of the heads.

Numbers that could not be computed are empty in CSV and NaN in Parquet.
"""

import csv
import io
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.config import MOST_HEAD_DIM
from qk_sniffer.plasticity.intervals import mean_rows
from qk_sniffer.plasticity.uncertainty import Estimate, Uncertainty
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.form_types import MOST_BUCKETS, MOST_HEADS, MOST_LAYERS
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.own_files import MADE_BY, IsOwn, is_marked_table, starts_with
from qk_sniffer.store.parquet_tables import read_table
from qk_sniffer.store.stored import UnreadableError

QUERY_METRICS = (
    "q_R2_pos",
    "q_beta_norm",
    "q_R2_scalar",
    "q_mae_baseline",
    "q_mae_proj",
    "q_mae_ratio",
    "q_resid0_skew",
    "q_resid0_kurt",
    "q_resid0_ks_p",
    "q_noise_med_abs_skew",
    "q_noise_med_abs_kurt",
    "q_noise_med_ks_p",
    "q_noise_frac_ks_p_lt_alpha",
)

_HEAD = {"layer": pa.int32(), "q_head": pa.int32(), "k_head": pa.int32()}
_COUNTS = {"n_q_tokens": pa.int64(), "n_k_tokens": pa.int64(), "d_model": pa.int32()}

_ESTIMATE = dict.fromkeys(Estimate._fields, pa.float64())
_MEAN = {"attention": pa.string(), "n_heads": pa.int32(), "quantity": pa.string()}

TABLES: dict[str, pa.Schema] = {
    "head_metrics": pa.schema(_HEAD | _COUNTS | dict.fromkeys((*QUERY_METRICS, "ap_overall"), pa.float64())),
    "head_bucket_plasticity": pa.schema(
        _HEAD | {"q_bucket": pa.int32(), "k_bucket": pa.int32(), "ap_bucket": pa.float64()}
    ),
    "head_component_weights": pa.schema(
        _HEAD | {"component": pa.int32(), "component_r2": pa.float64(), "component_weight": pa.float64()}
    ),
    "head_intervals": pa.schema(_HEAD | {"n_texts": pa.int32(), "quantity": pa.string()} | _ESTIMATE),
    "head_bucket_intervals": pa.schema(
        _HEAD
        | {"q_bucket": pa.int32(), "k_bucket": pa.int32()}
        | dict.fromkeys(("n_q_rows", "n_q_texts", "n_pairs", "n_pair_texts"), pa.int64())
        | _ESTIMATE
        | {"null": pa.float64()}
    ),
    "head_component_intervals": pa.schema(
        _HEAD
        | {"component": pa.int32()}
        | _ESTIMATE
        | dict.fromkeys((f"weight_{name}" for name in Estimate._fields), pa.float64())
    ),
    "mean_intervals": pa.schema(_MEAN | _ESTIMATE),
    "mean_bucket_intervals": pa.schema(_MEAN | {"q_bucket": pa.int32()} | _ESTIMATE),
}
"""The columns of each table, in their order. `d_model` is the length of a head's vectors; readers of the tables rely on
the name. The tables of intervals are empty if there are no replicates."""


_MOST = {
    "layer": MOST_LAYERS,
    "q_head": MOST_HEADS,
    "k_head": MOST_HEADS,
    "q_bucket": MOST_BUCKETS,
    "k_bucket": MOST_BUCKETS,
    "component": MOST_HEAD_DIM,
}
"""For each column of numbers of things: a number that is larger than all of them."""

_LARGEST = 1e100
"""More than any number that follows from vectors of float32. Pictures of numbers near the largest float fail."""

_OF_EVERY_HEAD = ("head_metrics", "head_component_weights")
"""The tables with rows of every head, of which there is one at least."""

IS_OWN: dict[str, IsOwn] = {f"{name}.parquet": is_marked_table for name in TABLES} | {
    f"{name}.csv": starts_with(f"{','.join(schema.names)}\n".encode()) for name, schema in TABLES.items()
}
"""By the name of each file: whether a file of this name is a table of results."""

WAY_OUT = "remove plasticity.json in its folder and rerun the measurement"


@dataclass(frozen=True)
class HeadResult:
    """The results of one query head: its part of the tables, and notes for the report."""

    layer: int
    q_head: int
    k_head: int
    metrics: dict[str, float | int]
    buckets: list[tuple[int, int, float]]
    """(query bucket, key bucket, plasticity)."""
    r2: list[float]
    """Of each component."""
    notes: list[str] = field(default_factory=list)
    uncertainty: Uncertainty | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def rows(name: str, result: HeadResult) -> Iterator[dict[str, Any]]:
    """Yields the rows of one head in the table `name`."""
    head = {"layer": result.layer, "q_head": result.q_head, "k_head": result.k_head}
    if name == "head_metrics":
        yield head | result.metrics
    elif name == "head_bucket_plasticity":
        for query, key, value in result.buckets:
            yield head | {"q_bucket": query, "k_bucket": key, "ap_bucket": value}
    elif name == "head_component_weights":
        for component, (r2, weight) in enumerate(zip(result.r2, weights(result.r2), strict=True)):
            yield head | {"component": component, "component_r2": r2, "component_weight": weight}
    elif (found := result.uncertainty) is not None:
        if name == "head_intervals":
            for quantity, each in found.of_head.items():
                yield head | {"n_texts": found.texts, "quantity": quantity} | each._asdict()
        elif name == "head_bucket_intervals":
            for bucket in found.buckets:
                yield head | bucket._asdict() | bucket.ap._asdict() | {"null": bucket.ap_null}
        elif name == "head_component_intervals":
            for component, (each, of_weight) in enumerate(zip(found.components, found.weights, strict=True)):
                columns = {f"weight_{name}": value for name, value in of_weight._asdict().items()}
                yield head | {"component": component} | each._asdict() | columns


def weights(r2: list[float]) -> list[float]:
    """The R2 of a head's components, floored at 0, as shares of their sum; equal shares if all are 0."""
    floored = np.maximum(r2, 0.0)
    total = floored.sum()
    shares: list[float] = (np.full(len(r2), 1 / len(r2)) if total == 0 else floored / total).tolist()
    return shares


def write(
    folder: Path, results: Iterable[HeadResult], limited_layers: Container[int] = (), *, access: Access = PLAIN
) -> list[Path]:
    """Writes the tables of `results`, in their order, and returns the files. Each is written whole, or left as it was.

    Args:
        limited_layers: the layers with a sliding window or chunks.

    Raises:
        StoreError: the folder cannot be written, or a file of someone else has the name of a table.
    """
    results = list(results)
    files = []
    for name, schema in TABLES.items():
        if name.startswith("mean_"):
            of_layers = [(result.layer, result.uncertainty) for result in results if result.uncertainty is not None]
            found = list(mean_rows(name, of_layers, limited_layers))
        else:
            found = [row for result in results for row in rows(name, result)]
        columns = [[row[column] for row in found] for column in schema.names]
        arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)]
        table = pa.table(arrays, schema.with_metadata(MADE_BY))
        parquet = io.BytesIO()
        pq.write_table(table, parquet, compression="zstd")
        for ending, data in (("csv", _csv(table)), ("parquet", parquet.getvalue())):
            files.append(folder / f"{name}.{ending}")
            write_atomic(files[-1], data, access=access, is_own=IS_OWN[files[-1].name])
    return files


def read(folder: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """The columns of the table `name` in the results at `folder`.

    Raises:
        StoreError: the table is missing or damaged, has no head, or has numbers that no dataset has.
    """
    path = folder / f"{name}.parquet"
    table = read_table(path, TABLES[name], way_out=WAY_OUT)
    for column in table.column_names:
        if table[column].null_count:
            raise UnreadableError(path, f"has nulls in the column {column}", WAY_OUT)
    columns = {column: table[column].to_numpy() for column in table.column_names}
    for column, most in _MOST.items():
        values = columns.get(column, ())
        if len(values) and not 0 <= values.min() <= values.max() < most:
            raise UnreadableError(path, f"has numbers in the column {column} that are not 0 to {most - 1:,}", WAY_OUT)
    for column, values in columns.items():
        if values.dtype == np.float64 and (np.abs(values[np.isfinite(values)]) >= _LARGEST).any():
            raise UnreadableError(path, f"has numbers in the column {column} that are {_LARGEST} or more", WAY_OUT)
    if name in _OF_EVERY_HEAD and not table.num_rows:
        raise UnreadableError(path, "has no heads", WAY_OUT)
    return columns


def _csv(table: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    columns = [[_cell(value) for value in column.to_pylist()] for column in table.columns]
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue().encode()


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "" if value != value else repr(value)
