"""Builds tiny random checkpoints of every causal language model of transformers, from its config class.

A config is shrunk from its own defaults. A field that many families have gets one small value (`SIZES`). Nested configs
are shrunk in the same way. Every kind of layer remains, and sliding windows are enabled wherever a config has them.
Multipliers, caps, biases and norms that have no effect by default get one, as in published checkpoints. `NEEDS` holds
the further requirements of a type.
"""

import re
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from tiny_towers import TOWERS
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

VOCAB = 128
LAYERS = 4
WINDOW = 8
"""The number of tokens that a query sees in a layer with a window, with chunks or with an indexer."""

_SIZES: list[tuple[int, str]] = [
    (VOCAB, "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (1, "encoder_layers num_encoder_layers"),
    (64, "hidden_size d_model n_embd emb_dim"),
    (32, "intermediate_size ffn_dim ffn_hidden_size dim_ff dff encoder_ffn_dim decoder_ffn_dim"),
    (32, "expert_ffn_hidden_size dense_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len"),
    # Attention.
    (4, "num_attention_heads n_head n_heads num_heads swa_num_attention_heads index_n_heads"),
    (4, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (16, "head_dim swa_head_dim kv_channels dim_head qk_nope_head_dim v_head_dim index_head_dim"),
    (8, "rotary_dim qk_rope_head_dim"),
    (24, "qk_head_dim"),
    (12, "kv_lora_rank"),
    (20, "q_lora_rank"),
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size index_topk"),
    (WINDOW // 2, "keep_window_size index_block_size"),
    (1, "index_topk_blocks"),
    (WINDOW, "floor_scale log_scaling_n_floor"),  # queries are scaled beyond these positions
    # Experts.
    (24, "moe_intermediate_size"),  # no fused projection is square: a transposed one would not be noticed
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k zero_expert_num"),
    (1, "num_shared_experts n_shared_experts n_group topk_group num_expert_group"),
    # State-space and linear layers.
    (4, "mamba_n_heads mamba_num_heads n_mamba_heads linear_num_value_heads linear_num_heads"),
    (32, "mamba_d_head mamba_head_dim"),
    (16, "mamba_d_state linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (8, "chunk_size mamba_chunk_size"),
    (2, "linear_num_key_heads"),
    (1, "n_groups"),
    (128, "mamba_d_ssm"),
    # Towers of multimodal models, and their decoders.
    (LAYERS, "layers depth"),
    (4, "attention_heads"),
    (64, "embed_dim out_hidden_size output_dim projection_dim projector_hidden_size hidden_dim embedding_size"),
    # Embeddings by layer and by n-gram.
    (16, "hidden_size_per_layer_input"),
    (50, "ngram_vocab_size_base"),
]
SIZES = {name: size for size, names in _SIZES for name in names.split()}

_ENCODERS = "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
_ENCODERS += "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl"
_LATENT = "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear "
_LATENT += "longcat_flash minicpm3 mistral4 youtu"
_NO_HEAD_DIM = "hunyuan_v1_dense hunyuan_v1_moe minimax ministral mixtral"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED = {"num_hidden_layers": LAYERS, "num_kv_shared_layers": LAYERS}

NEEDS: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _ENCODERS.split()},
    # As many key heads as query heads; head_dim is the part that is rotated.
    **{name: {"num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2} for name in _LATENT.split()},
    **{name: {"num_key_value_heads": 2, "head_dim": 16} for name in _NO_HEAD_DIM.split()},
    **{name: {"layers_block_type": ["linear_attention", "hybrid"] * 2} for name in ("zamba", "zamba2")},
    "bamba": {"attn_layer_indices": [1, 2]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 12,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": 64, "adapter_out_dim": 64},
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": VOCAB},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_assistant": {"text_config": _SHARED | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    **TOWERS,
}
"""Fields by the model type of a model or of a nested config. An encoder is a language model if it is a decoder."""

_FACTOR = 1.3
"""A factor that changes every digit of what it scales."""

_SHAKEN = re.compile(
    r"multiplier|scal(e|ing)|factor|soft_?cap|clip|bias|qk_?norm|qk_layernorm|alpha|mup|k_eq_v|mem_rope"
)
"""Names of fields that can change attention."""

_NOT_SHAKEN = re.compile(
    r"init|dropout|std|rescale|time_step|loss|mtp|position_bias|in_fp32|dim_|_norm_std|max_|bidirect"
)

_ABSENT = {"floor": float(WINDOW), "cap": 20.0, "clip": 4.0, "scal": 0.7, "mult": _FACTOR}
"""Part of a field's name -> its value, where None means that there is none."""

_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}

_WINDOWED = {"full_attention": "sliding_attention", "hybrid": "hybrid_sliding"}
"""Layer type -> the type of such a layer with a sliding window."""

_BARE = {"deepseek_v4"}
"""Saved without their head, because transformers renames their last norm wrongly in a model with a head."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """Returns a small config of that type."""
    return _shrunk(CONFIG_MAPPING[model_type], NEEDS.get(model_type, {}))


def save_tiny(model_type: str, folder: Path) -> None:
    """Saves a checkpoint of that type with random weights, norms and biases included, from a fixed seed.

    If the whole model needs a library that is not installed, the decoder's weights are saved with the names that they
    have in the whole model.
    """
    config = tiny_config(model_type)
    config.save_pretrained(folder)
    text_config = config.get_text_config()
    torch.manual_seed(0)
    try:
        model = whole_model(config)
    except ImportError:
        model = randomized(AutoModel.from_config(text_config))
        weights = {f"model.language_model.{name}": weight.clone() for name, weight in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
    else:
        randomized(model).save_pretrained(folder)


def whole_model(config: PretrainedConfig) -> PreTrainedModel:
    """Returns the model of `config`, with its language-model head and all other parts."""
    model: PreTrainedModel
    if config.model_type in _BARE:
        model = AutoModel.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
        if model.config.model_type != config.model_type:  # the decoder alone
            model = AutoModelForImageTextToText.from_config(config)
    return model


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.min() == weight.max():  # norms, biases and gates, whose ones and zeros would hide mistakes
                weight.add_(torch.randn_like(weight) * 0.3)
            elif weight.dim() == 2 and "embed" not in name:
                weight.mul_(4)  # attention far from uniform
    return model


def _shrunk(config_class: type[PretrainedConfig], needs: dict[str, Any]) -> PretrainedConfig:
    try:
        default = config_class()
    except StrictDataclassError:
        default = config_class(**needs)
    small: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            small[name] = _shrunk(type(value), NEEDS.get(value.model_type, {}) | needs.get(name, {}))
        elif name in needs:
            small[name] = needs[name]
        elif name in SIZES and not isinstance(value, list | tuple) and (value is not None or name == "sliding_window"):
            small[name] = SIZES[name]
        elif name == "use_sliding_window":
            small[name] = True
        elif name.endswith("token_id") and value is not None:
            small[name] = min(value[0] if isinstance(value, list | tuple) else value, VOCAB - 1)
        elif name == "layer_types" and value:
            kinds = list(dict.fromkeys(value))
            if "sliding_window" in vars(default) and len(kinds) == 1 and kinds[0] in _WINDOWED:
                kinds.append(_WINDOWED[kinds[0]])
            small[name] = list(islice(cycle(kinds), max(LAYERS, len(kinds))))
            small["num_hidden_layers"] = len(small[name])
    config = config_class(**needs | small)
    is_tower = re.search("Vision|Audio|VQ", config_class.__name__)
    return config if is_tower else _shaken(config, needs | small, needs)


def _shaken(config: PretrainedConfig, given: dict[str, Any], needs: dict[str, Any]) -> PretrainedConfig:
    """Returns a config in which every scalar that can change attention does, if the class of `config` accepts it."""
    for name, value in vars(config).items():
        if name in needs or not _SHAKEN.search(name) or _NOT_SHAKEN.search(name):
            continue
        candidates: list[Any] = []
        if value is False:
            candidates = [True]
        elif value is None:
            candidates = [other for part, other in _ABSENT.items() if part in name]
        elif value in (0, 1) and value is not True:
            candidates = [_FACTOR, 2]
        for candidate in candidates:
            try:
                config = type(config)(**given | {name: candidate})
            except (StrictDataclassError, ValueError):
                continue
            given = given | {name: candidate}
            break
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "default" and "rope_parameters" not in needs:
        with suppress(StrictDataclassError, AttributeError, KeyError):  # some types have no YaRN
            config = type(config)(**given | {"rope_parameters": rope | _YARN})
    elif "llama_4_scaling_beta" in rope:
        config = type(config)(**given | {"rope_parameters": rope | {"original_max_position_embeddings": WINDOW}})
    return config
