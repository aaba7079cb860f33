"""Encodes the calibration file that TriAttention and TensorRT-LLM read with `torch.load`.

{"metadata": {"sampled_heads": [[layer, head], ...], ...}, "stats": {"layer00_head00": {...}, ...}}, where a head has
float32 tensors (head_dim / 2,) of its queries before RoPE, by rotary frequency: `q_mean_real` and `q_mean_imag` of the
mean of a + ib, and `q_abs_mean`, the mean of sqrt(a^2 + b^2). Component j turns with component j + head_dim / 2.
"""

from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

from qk_sniffer.export.source import Source


def problems(source: Source) -> Iterator[str]:
    """Yields the reasons why the dataset cannot be exported. Layers and heads may be missing."""
    yield from source.needs("pre", "q")
    yield from source.needs_one_shape("head_dim")
    yield from source.needs_whole_rotation()
    yield from source.needs_no_bias()


def encode(source: Source) -> Mapping[str, bytes]:
    """Returns the file."""
    # torch is slow to import, and only this format needs it.
    import torch

    stats: dict[str, dict[str, torch.Tensor]] = {}
    sampled = []
    for layer in source.layers:
        number = layer["layer"]
        found = source.statistics(layer, "q", "pre")
        assert found.frequency_mean is not None and found.frequency_modulus is not None
        for row, head in enumerate(found.heads.tolist()):
            sampled.append([number, head])
            stats[f"layer{number:02d}_head{head:02d}"] = {
                "q_mean_real": torch.from_numpy(found.frequency_mean[row].real.copy()),
                "q_mean_imag": torch.from_numpy(found.frequency_mean[row].imag.copy()),
                "q_abs_mean": torch.from_numpy(found.frequency_modulus[row].copy()),
            }
    file = BytesIO()
    torch.save({"metadata": _metadata(source, sampled), "stats": stats}, file)
    return {"": file.getvalue()}


def _metadata(source: Source, sampled: list[list[int]]) -> dict[str, Any]:
    rope_types = {str(one.get("rope_type", "default")) for one in source.rope_parameters()}
    return {
        "num_traces": source.dataset.manifest["examples"],
        "head_dim": source.shape["head_dim"],
        "dtype": source.model["dtype"],
        "use_chat_template": source.config.dataset.messages_column is not None,
        "system_prompt": "",
        "attn_implementation": source.model["attn_implementation"],
        "rope_style": "half",
        "rope_type": ", ".join(sorted(rope_types)) or "default",
        "sampled_heads": sampled,
        "provenance": source.provenance(),
    }
