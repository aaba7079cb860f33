"""Encodes version 2 of the TRIA file, which ports of TriAttention to ggml and MLX read.

All numbers are little-endian. A header of 64 bytes: u32 magic, version, num_layers, num_heads, num_kv_heads, head_dim,
and frequencies f = head_dim / 2; f32 rope_theta and attention scaling of the rotary embedding; zeros. Then f32
(num_layers,) budget scales, and by layer and query head f32 (f,) of each of `q_mean_real`, `q_mean_imag`, `q_abs_mean`
(as in `triattention.py`) and `mrl`, the modulus of the mean divided by the mean modulus. Heads that were not captured
are zeros.
"""

import struct
from collections.abc import Iterator, Mapping

import numpy as np

from qk_sniffer.export.source import Floats, Source
from qk_sniffer.machine import available_memory
from qk_sniffer.store.form_types import MOST_NUMBER
from qk_sniffer.text import in_mb

_HEADER = struct.Struct("<7I2f28x")
_MAGIC = 0x54524941
_VERSION = 2
_LEAST_MODULUS = 1e-12
"""The floor of the divisor of `mrl`."""
_CLOSE = 1e-5
"""The largest relative difference of a frequency from that of the rope_theta."""
_SMALLEST = 1e-30
"""The smallest rope_theta whose powers are numbers."""


def problems(source: Source) -> Iterator[str]:
    """Yields the reasons why the dataset cannot be exported. Layers and heads may be missing."""
    yield from source.needs("pre", "q")
    yield from source.needs_one_shape("num_q_heads", "num_k_heads", "head_dim")
    yield from source.needs_no_bias()
    found = [*source.needs_whole_rotation()]
    yield from found
    if not found and _theta(source) is None:
        yield (
            "the frequencies of its layers are not the powers of one rope_theta that its config names, and the format "
            "has this number alone"
        )
    if not found and len(_scalings(source)) > 1:
        yield "its layers have several attention scalings, and the format has one"
    shape = source.shape
    size = 2 * 4 * source.num_layers * shape["num_q_heads"] * shape["head_dim"]
    if size > available_memory():
        yield f"the file does not fit in memory ({in_mb(size)})"


def encode(source: Source) -> Mapping[str, bytes]:
    """Returns the file."""
    shape, num_layers = source.shape, source.num_layers
    f = shape["head_dim"] // 2
    (scaling,) = _scalings(source)
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        num_layers,
        shape["num_q_heads"],
        shape["num_k_heads"],
        shape["head_dim"],
        f,
        _theta(source),
        scaling,
    )
    heads = np.zeros((num_layers, shape["num_q_heads"], 4, f), "<f4")
    for layer in source.layers:
        found = source.statistics(layer, "q", "pre")
        mean, modulus = found.frequency_mean, found.frequency_modulus
        assert mean is not None and modulus is not None
        length = np.abs(mean) / np.maximum(modulus, _LEAST_MODULUS)
        heads[layer["layer"], found.heads] = np.stack([mean.real, mean.imag, modulus, length], axis=1)
    budgets = np.ones(num_layers, "<f4")  # every layer keeps the same share of its keys
    return {"": header + budgets.tobytes() + heads.tobytes()}


def _theta(source: Source) -> float | None:
    """Returns the base of the frequencies of all layers; None if there is no such number among those of the config."""
    size = source.shape["head_dim"]
    for theta in [one.get("rope_theta") for one in source.rope_parameters()]:
        if not isinstance(theta, int | float) or not _SMALLEST <= theta <= MOST_NUMBER:
            continue
        powers = theta ** -(np.arange(size // 2) * 2 / size)
        if all(_are_close(source.frequencies(layer)[0], powers) for layer in source.layers):
            return float(theta)
    return None


def _are_close(frequencies: Floats, powers: Floats) -> bool:
    return len(frequencies) == len(powers) and np.allclose(frequencies, powers, rtol=_CLOSE, atol=0)


def _scalings(source: Source) -> set[float]:
    return {source.frequencies(layer)[1] for layer in source.layers}
