"""Reads and writes the file of a layer's statistics in a dataset: `statistics/layer-00.safetensors`.

Its tensors have names such as `q.post.mean`: the kind, the stage and a field of `Statistics`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qk_sniffer.config import MOST_HEAD_DIM
from qk_sniffer.machine import available_memory
from qk_sniffer.store.disk import open_regular
from qk_sniffer.store.files import compared_file
from qk_sniffer.store.statistics import Statistics
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import in_mb

FIELDS = tuple(each.name for each in fields(Statistics))
"""The names of the arrays of a kind and stage."""

_OPTIONAL = ("covariance", "frequency_pairs", "frequency_modulus")
_WHOLE = ("heads", "count", "nonfinite", "frequency_pairs")
_ITEMSIZE = {"I64": 8, "F32": 4}


class Array(NamedTuple):
    """The type of an array, in the words of safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Heads(NamedTuple):
    """The heads of a kind and stage in a file, and what it has of them."""

    numbers: list[int]
    head_dim: int
    has_covariance: bool


def encode(statistics: Mapping[tuple[str, str], Statistics]) -> bytes:
    """Returns the file of a layer's statistics, by kind and stage."""
    tensors = {
        f"{kind}.{stage}.{name}": np.ascontiguousarray(values)
        for (kind, stage), one in sorted(statistics.items())
        for name in FIELDS
        if (values := getattr(one, name)) is not None
    }
    data: bytes = save(tensors, metadata={"format": "qk-sniffer-statistics/1"})
    return data


def arrays_in(path: Path, *, way_out: str) -> dict[str, Array]:
    """Returns the arrays in a file by name, from its header alone.

    Raises:
        UnreadableError: the file cannot be read, or is not one of statistics.
    """
    with _opened(path, way_out) as file:
        return _arrays(file)


def heads_in(path: Path, kind: str, stage: str, *, way_out: str) -> Heads | None:
    """Returns the heads of a kind and stage in the file of a layer; None if it has none.

    Raises:
        UnreadableError: the file cannot be read, or is not one of statistics.
    """
    with _opened(path, way_out) as file:
        listed = _listed(file, path, kind, stage, way_out)
        if not listed:
            return None
        numbers = file.get_tensor(f"{kind}.{stage}.heads").tolist()
    return Heads(numbers, listed["mean"].shape[1], "covariance" in listed)


def read_statistics(
    path: Path, kind: str, stage: str, *, way_out: str, row: int | None = None, covariance: bool = True
) -> Statistics | None:
    """Returns the statistics of a kind and stage in the file of a layer; None if it has none.

    With `row`, only the head at this place in the arrays is read, and H is 1. Without `covariance`, covariances are not
    read: they are most of the file.

    Raises:
        UnreadableError: the file cannot be read, is not one of statistics, or does not fit in memory.
    """
    start = f"{kind}.{stage}."
    with _opened(path, way_out) as file:
        listed = _listed(file, path, kind, stage, way_out)
        if not listed:
            return None
        if not covariance:
            listed.pop("covariance", None)
        size = sum(_ITEMSIZE[each.dtype] * int(np.prod(each.shape, dtype=object)) for each in listed.values())
        if row is not None:
            size //= listed["mean"].shape[0]
        if size > available_memory():
            raise UnreadableError(path, f"does not fit in memory ({in_mb(size)})", way_out)
        found = {
            name: file.get_tensor(start + name)
            if row is None or name == "frequency_pairs"
            else file.get_slice(start + name)[row : row + 1]
            for name in listed
        }
    missing: dict[str, Any] = dict.fromkeys(_OPTIONAL)
    statistics = Statistics(**(missing | found))
    pairs, d = statistics.frequency_pairs, statistics.mean.shape[1]
    if pairs is not None and ((pairs < 0) | (pairs >= d)).any():
        raise UnreadableError(
            path, f"contradicts itself ({start}frequency_pairs are not components of a head)", way_out
        )
    return statistics


@contextmanager
def _opened(path: Path, way_out: str) -> Iterator[Any]:
    """Opens a file of statistics. An error of safetensors, now or in the block, is an `UnreadableError`."""
    try:
        open_regular(path).close()  # opening a pipe would wait for its writer
        with compared_file(path, way_out=way_out) as source, safe_open(source, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, MemoryError) as error:
        raise UnreadableError(path, f"is not a file of statistics ({error})", way_out) from error


def _listed(file: Any, path: Path, kind: str, stage: str, way_out: str) -> dict[str, Array]:
    """Returns the arrays of a kind and stage by field, which have one another's shapes; empty if there are none."""
    start = f"{kind}.{stage}."
    listed = {name.removeprefix(start): each for name, each in _arrays(file).items() if name.startswith(start)}
    if listed and not {*FIELDS} - {*_OPTIONAL} <= listed.keys() <= {*FIELDS}:
        raise UnreadableError(path, f"lacks arrays of the kind {kind!r} and stage {stage!r}", way_out)
    if listed and (problem := _shape_problem(listed)):
        raise UnreadableError(path, f"contradicts itself ({start}{problem})", way_out)
    return listed


def _arrays(file: Any) -> dict[str, Array]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {name: Array(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


def _shape_problem(listed: Mapping[str, Array]) -> str | None:
    """Returns how the arrays of a kind and stage contradict each other; None if they do not."""
    if len(listed["mean"].shape) != 2:
        return "mean has another shape"
    heads, d = listed["mean"].shape
    if min(heads, d) < 1:  # arrays without numbers may claim any size
        return "mean is empty"
    if d > MOST_HEAD_DIM:
        return f"mean has vectors of {d:,} numbers, more than {MOST_HEAD_DIM:,}"
    if ("frequency_pairs" in listed) != ("frequency_modulus" in listed):
        return "frequency_pairs and frequency_modulus belong together"
    f = listed["frequency_pairs"].shape[0] if "frequency_pairs" in listed and listed["frequency_pairs"].shape else 0
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "variance", "minimum", "maximum"), (heads, d))
    shapes |= dict.fromkeys(("heads", "count", "nonfinite", "norm_mean", "norm_variance"), (heads,))
    shapes |= {"covariance": (heads, d, d), "frequency_pairs": (f, 2), "frequency_modulus": (heads, f)}
    for name, array in listed.items():
        if array.shape != shapes[name]:
            return f"{name} has another shape"
        if array.dtype != ("I64" if name in _WHOLE else "F32"):
            return f"{name} has another type"
    return None
