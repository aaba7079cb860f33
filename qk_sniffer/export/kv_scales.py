"""Encodes the ranges of keys after RoPE, for KV-cache quantization.

`kv_scales.safetensors` has a scale for each layer under the name and in the shape that vLLM reads from a checkpoint:
float32 `model.layers.<layer>.self_attn.k_scale` (1,), the largest absolute value divided by 448, the largest number of
the type FP8 E4M3.

`key_ranges.safetensors` has finer ranges: float32 `layers.<layer>.k_scale` (key heads,), the same for each key head,
and `layers.<layer>.minimum`, `maximum` and `absmax` (key heads, d) by channel. With statistics before RoPE too, it has
`layers.<layer>.pre.minimum`, `pre.maximum` and `pre.absmax`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from qk_sniffer.export.source import Source

LARGEST = 448.0
"""The largest number of the type FP8 E4M3."""


def problems(source: Source) -> Iterator[str]:
    """Yields the reasons why the dataset cannot be exported."""
    yield from source.needs("post", "k")
    yield from source.needs_all_attention_layers()
    yield from source.needs_all_heads("k")
    if source.settings.enabled and source.settings.skip_tokens:
        yield (
            f"its statistics leave out the first {source.settings.skip_tokens} tokens of each text, whose keys are "
            "quantized too: capture with capture.statistics.skip_tokens=0"
        )


def encode(source: Source) -> Mapping[str, bytes]:
    """Returns the files of the folder."""
    scales: dict[str, npt.NDArray[np.float32]] = {}
    ranges: dict[str, npt.NDArray[Any]] = {}
    for layer in source.layers:
        number = layer["layer"]
        for stage in source.settings.stages:
            found = source.statistics(layer, "k", stage)
            start = f"layers.{number}." if stage == "post" else f"layers.{number}.{stage}."
            ranges |= {start + name: getattr(found, name) for name in ("minimum", "maximum", "absmax")}
            if stage == "post":
                by_head = found.absmax.max(axis=1) / np.float32(LARGEST)
                ranges[f"{start}k_scale"] = by_head
                scales[f"model.layers.{number}.self_attn.k_scale"] = by_head.max(keepdims=True)
    return {
        "kv_scales.safetensors": save(scales, metadata={"format": "pt"}),
        "key_ranges.safetensors": save(ranges, metadata={"format": "pt"}),
    }
