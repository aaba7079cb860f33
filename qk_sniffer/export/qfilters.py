"""Encodes the folder that `QFilters.from_pretrained` of kvpress loads.

`model.safetensors` has float32 `q_filters` (layers, key heads, d), `config.json` the arguments of the class. A filter
is the mean, over the query heads of a key head, of a unit vector that points against most of the head's queries after
RoPE: minus s v, where v is their leading right singular vector, without centering, and s its sign, 1 if more than half
of the queries have a positive product with v, else -1.

v follows from the statistics: it is the leading eigenvector of mean mean' + covariance (count - 1) / count. The sign
follows from those rows of the head that its statistics count, or from the product of v with the mean if there are none.
The provenance says which, as `sign_from`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from qk_sniffer.export.source import Source
from qk_sniffer.store.statistics import Statistics

Floats = npt.NDArray[np.float64]


def problems(source: Source) -> Iterator[str]:
    """Yields the reasons why the dataset cannot be exported."""
    yield from source.needs("post", "q", covariance=True)
    yield from source.needs_one_shape("num_k_heads", "head_dim")
    yield from source.needs_all_layers()
    yield from source.needs_all_heads("q")
    yield from source.needs_no_bias()


def encode(source: Source) -> Mapping[str, bytes]:
    """Returns the files of the folder."""
    shape = source.shape
    filters = np.zeros((source.num_layers, shape["num_k_heads"], shape["head_dim"]))
    by_origin: dict[str, int] = {"rows": 0, "mean": 0}
    for layer in source.layers:
        number = layer["layer"]
        found = source.statistics(layer, "q", "post", covariance=True)
        sums = np.zeros((shape["num_k_heads"], 1))
        for row, head in enumerate(found.heads.tolist()):
            direction = leading_direction(found, row)
            sign, origin = _sign(source, number, head, direction, found.mean[row])
            by_origin[origin] += 1
            key_head = source.dataset.key_head(number, head)
            filters[number, key_head] -= sign * direction
            sums[key_head] += 1
        filters[number] /= np.maximum(sums, 1)
    source.notes["sign_from"] = {origin: count for origin, count in by_origin.items() if count}
    arguments = {
        "num_layers": source.num_layers,
        "num_kv_heads": shape["num_k_heads"],
        "kv_head_dim": shape["head_dim"],
    }
    return {
        "model.safetensors": save({"q_filters": filters.astype(np.float32)}, metadata={"format": "pt"}),
        "config.json": (json.dumps(arguments, indent=2) + "\n").encode(),
    }


def leading_direction(statistics: Statistics, row: int) -> Floats:
    """Returns the leading right singular vector (d,) of the vectors of a head, without centering, of either sign."""
    assert statistics.covariance is not None
    mean, count = statistics.mean[row].astype(np.float64), int(statistics.count[row])
    second = np.outer(mean, mean) + statistics.covariance[row].astype(np.float64) * ((count - 1) / count)
    vectors: Floats = np.linalg.eigh(second)[1]
    return vectors[:, -1]


def _sign(source: Source, layer: int, head: int, direction: Floats, mean: npt.NDArray[Any]) -> tuple[int, str]:
    """Returns the sign of the head's queries along a direction, and what it follows from."""
    if source.model["rope_stage"] == "post":
        found = source.dataset.vectors(layer, head, "q", intact=True)
        counted = (found.positions >= source.settings.skip_tokens) & np.isfinite(found.vectors).all(axis=1)
        if len(rows := found.vectors[counted]):
            return (1 if np.count_nonzero(rows @ direction > 0) > len(rows) / 2 else -1), "rows"
    return (1 if float(mean @ direction) > 0 else -1), "mean"
