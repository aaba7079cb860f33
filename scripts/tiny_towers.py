"""Holds the fields that multimodal types of transformers need in `tiny_configs.py`, for their towers and decoders."""

from typing import Any

VOCAB = 128

_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
"""Rotary parameters of positions with three axes, for heads of 16 components."""

_WITH_AXES = "cosmos3_edge_text glm4v_text glm_ocr_text paddleocr_vl_text qwen2_5_omni_text "
_WITH_AXES += "qwen2_5_vl_text qwen2_vl_text"

_CODEBOOK = {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": VOCAB}

TOWERS: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": _AXES} for name in _WITH_AXES.split()},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "chameleon_vqgan": _CODEBOOK,
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"] * 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": _AXES | {"mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [24, 24],
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glm4v_moe_text": {"rope_parameters": _AXES | {"mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"index_kpool": 4, "num_key_value_heads": 4, "head_dim": 0, "qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1, 2], "downsample_rate": "4/8"},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": _AXES | {"mrope_section": [2, 2, 2, 2]}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "janus_vqgan": _CODEBOOK | {"image_token_embed_dim": 64, "projection_dim": 64},
    "mimi": {"upsample_groups": 16},
    "mistral_large4_text": {"num_key_value_heads": 4},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark_audio": {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen2_5_omni_bigvgan": {"upsample_initial_channel": 64},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    **{
        name: {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
        for name in ("vibevoice_acoustic_tokenizer", "vibevoice_acoustic_tokenizer_encoder")
    },
}
