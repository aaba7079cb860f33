"""Writes tiny GGUF files of models of the zoo, in the layout of llama.cpp's converters."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import PreTrainedModel

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES_OF_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm"}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    architecture: str | None = None,
    leave_out: str = "",
    tensors: dict[str, Any] | None = None,
    types: dict[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Writes `model` without a tokenizer and without the weight `leave_out`; adds `tensors`.

    The tensors are in float32, except for those with another of numpy's or GGUF's types in `types`.

    `metadata` holds further keys of its architecture, with `__` for a dot.
    """
    config = model.config.get_text_config()
    architecture = architecture or config.model_type
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(metadata.pop("rope__freq_base", config.rope_parameters["rope_theta"]))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(metadata.pop("rope__dimension_count", head_dim))
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        kinds[type(value)](f"{architecture}.{key.replace('__', '.')}", value)
    for name, weight in model.get_decoder().state_dict().items():
        if name == leave_out:
            continue
        module, _, part = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module[-6:])
        if architecture == "llama" and heads:
            weight = _as_neighbours(weight, heads)
        if architecture.startswith("gemma") and "norm" in module:
            weight = weight + 1
        if module.startswith("layers."):
            _, layer, inside = module.split(".", 2)
            names = _NAMES | (_NAMES_OF_GEMMA if architecture.startswith("gemma") else {})
            stored = f"blk.{layer}.{names[inside]}"
        else:
            stored = _OUTSIDE[module]
        _add(writer, f"{stored}.{part}", weight.float().numpy(), (types or {}).get(f"{stored}.{part}", np.float32))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, weight: Any, kind: Any) -> None:
    if isinstance(kind, GGMLQuantizationType):
        writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, weight.astype(kind))


def _as_neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns the rows of a projection (heads * d, in) in the order of llama.cpp: RoPE rotates 2i and 2i + 1."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
