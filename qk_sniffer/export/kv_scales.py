"""Encodes the ranges of keys after RoPE, and of values where they were captured, for KV-cache quantization.

`kv_scales.safetensors` has the scales of a layer in the form of compressed-tensors' checkpoints, which vLLM reads:
float32 (1,) `<module>.k_scale` and `<module>.v_scale`, where `<module>` is the layer's attention module in the
checkpoint. A scale is the largest absolute value divided by 448, the largest number of the type FP8 E4M3; 1 for zeros.
`kv_scales_by_head.safetensors` has them for each key head, (key heads, 1, 1). `quantization_config.json` is the entry
of that name for the model's config.json: its `kv_cache_scheme` has the strategy `tensor`, of the first file. That of
the second one is `attn_head`.

`key_ranges.safetensors` has finer ranges: float32 `layers.<layer>.k_scale` (key heads,), the same for each key head,
and `layers.<layer>.minimum`, `maximum` and `absmax` (key heads, d) by channel. With statistics before RoPE too, it has
`layers.<layer>.pre.minimum`, `pre.maximum` and `pre.absmax`. `value_ranges.safetensors` has those of values.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from qk_sniffer.export.source import Source
from qk_sniffer.store.layout import KEY_HEAD_KINDS, KIND_NAMES
from qk_sniffer.text import compact_ranges, counted

LARGEST = 448.0
"""The largest number of the type FP8 E4M3."""

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""The `kv_cache_scheme` of scales for each tensor, in the words of compressed-tensors."""


def problems(source: Source) -> Iterator[str]:
    """Yields the reasons why the dataset cannot be exported."""
    yield from source.needs("post", "k")
    yield from source.needs_all_attention_layers()
    for kind in _kinds(source):
        yield from source.needs_all_heads(kind)
    if unnamed := [layer["layer"] for layer in source.layers if layer.get("module") is None]:
        yield (
            f"the attention modules of layers {compact_ranges(unnamed)} have no known names in the checkpoint, by "
            "which vLLM finds their scales: it is a GGUF file, it names weights otherwise than transformers, or a "
            "module serves several layers; or an earlier version captured the dataset"
        )
    modules = Counter(layer["module"] for layer in source.layers if layer.get("module") is not None)
    if shared := [layer["layer"] for layer in source.layers if modules[layer.get("module")] > 1]:
        yield (
            f"layers {compact_ranges(shared)} have the same attention module in manifest.json, and a module has one "
            "scale: fetch the dataset again, or recreate it with output.overwrite=true"
        )
    if source.settings.enabled and source.settings.skip_tokens:
        yield (
            f"its statistics leave out the first {counted(source.settings.skip_tokens, 'token')} of each text, whose "
            "keys are quantized too: capture with capture.statistics.skip_tokens=0"
        )
    if (segments := source.config.sampler.segments) is not None:
        yield (
            f"its statistics are of the segments {', '.join(segments)} alone, and the keys of the others are quantized "
            "too: capture with sampler.segments=null"
        )


def _kinds(source: Source) -> list[str]:
    """Returns the kinds that a KV cache stores and the dataset has, and the kind of keys."""
    return [
        kind for kind in KEY_HEAD_KINDS if kind == "k" or any(layer["captured"].get(kind) for layer in source.layers)
    ]


def encode(source: Source) -> Mapping[str, bytes]:
    """Returns the files of the folder."""
    scales: dict[str, npt.NDArray[np.float32]] = {}
    by_head: dict[str, npt.NDArray[np.float32]] = {}
    ranges: dict[str, dict[str, npt.NDArray[Any]]] = {kind: {} for kind in _kinds(source)}
    for layer in source.layers:
        number, module = layer["layer"], layer["module"]
        for kind, of_kind in ranges.items():
            for stage in source.settings.stages if kind == "k" else ["post"]:
                found = source.statistics(layer, kind, stage)
                start = f"layers.{number}." if stage == "post" else f"layers.{number}.{stage}."
                of_kind |= {start + name: getattr(found, name) for name in ("minimum", "maximum", "absmax")}
                if stage == "post":
                    largest = found.absmax.max(axis=1) / np.float32(LARGEST)
                    of_heads = np.where(largest > 0, largest, np.float32(1))
                    of_kind[f"{start}{kind}_scale"] = of_heads
                    scales[f"{module}.{kind}_scale"] = of_heads.max(keepdims=True)
                    by_head[f"{module}.{kind}_scale"] = of_heads.reshape(-1, 1, 1)
    missing = [KIND_NAMES[kind] for kind in KEY_HEAD_KINDS if kind not in ranges]
    source.notes["scales"] = {
        "of": [KIND_NAMES[kind] for kind in ranges],
        "scale": f"largest absolute value / {LARGEST:g}, for FP8 E4M3",
    } | ({"missing": missing} if missing else {})
    metadata = {"format": "pt", "scales_of": ", ".join(KIND_NAMES[kind] for kind in ranges)}
    return {
        "kv_scales.safetensors": _saved(scales, metadata),
        "kv_scales_by_head.safetensors": _saved(by_head, metadata),
        "quantization_config.json": (json.dumps({"quantization_config": _config()}, indent=2) + "\n").encode(),
        **{
            f"{KIND_NAMES[kind]}_ranges.safetensors": save(of_kind, metadata={"format": "pt"})
            for kind, of_kind in ranges.items()
        },
    }


def _saved(tensors: Mapping[str, npt.NDArray[np.float32]], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file whose bytes follow from its content: the library writes metadata in any order."""
    data: bytes = save(dict(tensors), metadata=dict(metadata))
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + encoded.ljust(stop - 8) + data[stop:]


def _config() -> dict[str, Any]:
    """Returns the `quantization_config` of a model with a quantized KV cache and plain weights."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": SCHEME,
    }
