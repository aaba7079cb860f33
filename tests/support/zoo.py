"""Lists tiny random models, one case for each family. Tests of the tap, of jobs and of the proof run over the list."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

VOCAB = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True, eq=False)
class Case:
    """One family: its config, and the facts of its attention that follow from this config."""

    name: str
    config_class: str
    options: dict[str, Any]
    """Fields of the text decoder's config; with `model_type` in a multimodal case."""
    head_dim: int
    vision: dict[str, Any] | None = None
    """Fields of the vision tower's config in a multimodal case."""
    layers: tuple[int, ...] = (0, 1, 2)
    """The layers with self-attention."""
    sliding_windows: tuple[int | None, ...] = (None, None, None)
    """By layer."""
    normed: str | None = None
    """The norm of queries and keys: with weight `w` or `1+w`; with `flat w`, over all heads together; or
    without weights, `after RoPE`. None without a norm."""
    pairs: str = "halves"
    """The components that RoPE rotates together: i and i + d/2 (`halves`), or 2i and 2i + 1 (`neighbours`). With
    `neighbours to halves`, the latter are stored as halves after the rotation."""
    rotary_dim: int | None = None
    """The number of rotated components of a head; None if all are."""
    rotates_last: bool = False
    """Whether the rotated components are the last ones of a head, not the first."""
    unrotated: tuple[int, ...] = ()
    """Layers without RoPE."""
    kernels: tuple[str, ...] = ("eager", "sdpa")
    softmax_scale: float | None = None
    """None for head_dim ** -0.5."""
    softcap: float | None = None
    sinks: bool = False
    local_theta: float | None = None
    """Rotary base of the sliding layers, if it differs."""

    def config(self) -> PretrainedConfig:
        config_class = getattr(transformers, self.config_class)
        options = _SIZES | self.options
        made: PretrainedConfig
        if self.vision is None:
            made = config_class(**options)
        else:
            made = config_class(text_config=options, vision_config=_VISION_SIZES | self.vision)
        return made

    def model(self, *, dtype: torch.dtype = torch.float32, kernel: str | None = None) -> PreTrainedModel:
        """Returns the whole model with random weights, norms included, from a fixed seed; kernel None: the last one."""
        torch.manual_seed(0)
        model = self.auto_class.from_config(self.config(), attn_implementation=kernel or self.kernels[-1])
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Norms and biases start as ones and zeros, which would hide a mistake.
                if weight.dim() == 1 or "bias" in name:
                    weight.add_(torch.randn_like(weight) * 0.3)
                else:  # tokens that differ, and attention far from uniform
                    weight.mul_(25 if "embed" in name else 4)
            for weight in model.parameters():
                weight.data = weight.to(dtype)  # only weights: the rotary frequencies of a loaded model stay in float32
        made: PreTrainedModel = model.eval()
        return made

    def decoder(self, *, dtype: torch.dtype = torch.float32, kernel: str | None = None) -> nn.Module:
        """Returns the text decoder inside that model."""
        return decoder_of(self.model(dtype=dtype, kernel=kernel))

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads the whole model."""
        return AutoModelForCausalLM if self.vision is None else AutoModelForImageTextToText


_D16 = {"head_dim": 16}
_SLIDING: dict[str, Any] = {
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

_GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
_GEMMA3_ATTENTION: dict[str, Any] = {
    "head_dim": 16,
    "sliding_windows": (12, 12, None),
    "normed": "1+w",
    "softmax_scale": 24**-0.5,
    "local_theta": 10000.0,
}
# A context of 8 tokens, so that the scale of the queries differs by position.
_MINISTRAL3: dict[str, Any] = {
    "head_dim": 16,
    "rope_parameters": _YARN
    | {"original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
}
_LLAMA4: dict[str, Any] = {
    "head_dim": 16,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "moe_layers": [1],
    "no_rope_layers": [1, 0, 1],
    "attention_chunk_size": 12,
    "floor_scale": 8,
    "attn_scale": 0.5,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 10,
    "q_lora_rank": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "head_dim": 24,
    "pairs": "neighbours to halves",
    "rotary_dim": 8,
    "rotates_last": True,
}
_PIXTRAL = {"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 8}

CASES = [
    Case("llama", "LlamaConfig", {}, head_dim=8),
    Case("llama3_rope", "LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}, head_dim=8),
    Case("mistral", "MistralConfig", _D16 | {"sliding_window": 12}, 16, sliding_windows=(12, 12, 12)),
    Case("mistral_full", "MistralConfig", _D16 | {"sliding_window": None}, 16),
    Case("qwen2", "Qwen2Config", {}, head_dim=8),
    Case("qwen3", "Qwen3Config", _D16, 16, normed="w"),
    Case("qwen3_yarn", "Qwen3Config", _D16 | {"rope_parameters": _YARN}, 16, normed="w"),
    Case(
        "qwen3_sliding",
        "Qwen3Config",
        _D16 | _SLIDING | {"use_sliding_window": True},
        16,
        sliding_windows=(12, None, 12),
        normed="w",
    ),
    Case("gemma3", "Gemma3TextConfig", _GEMMA3, **_GEMMA3_ATTENTION),
    Case(
        "gemma3_multimodal",
        "Gemma3Config",
        _GEMMA3 | {"model_type": "gemma3_text"},
        vision={"model_type": "siglip_vision_model", "num_attention_heads": 2},
        **_GEMMA3_ATTENTION,
    ),
    Case("glm", "GlmConfig", _D16, 16, pairs="neighbours", rotary_dim=8),
    Case("glm4", "Glm4Config", _D16, 16, pairs="neighbours", rotary_dim=8),
    Case("ministral", "MinistralConfig", _D16 | _SLIDING, 16, sliding_windows=(12, None, 12)),
    Case("ministral3", "Ministral3Config", _MINISTRAL3, 16),
    Case("mistral3", "Mistral3Config", _D16 | {"model_type": "mistral", "sliding_window": None}, 16, vision=_PIXTRAL),
    Case("mistral3_ministral3", "Mistral3Config", _MINISTRAL3 | {"model_type": "ministral3"}, 16, vision=_PIXTRAL),
    Case(
        "mllama",
        "MllamaConfig",
        {"model_type": "mllama_text_model", "cross_attention_layers": [1], "rope_parameters": _LLAMA3_ROPE},
        head_dim=8,
        vision={
            "attention_heads": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
            "supported_aspect_ratios": [[1, 1]],
        },
        layers=(0, 2),
    ),
    Case("smollm3", "SmolLM3Config", {"no_rope_layers": [1, 1, 0]}, 8, unrotated=(2,)),
    Case(
        "gemma2",
        "Gemma2Config",
        _D16 | _SLIDING | {"query_pre_attn_scalar": 24},
        16,
        sliding_windows=(12, None, 12),
        softmax_scale=24**-0.5,
        softcap=50.0,
        kernels=("eager",),
    ),
    Case("olmo2", "Olmo2Config", {}, 8, normed="flat w"),
    Case(
        "phi3",
        "Phi3Config",
        {"sliding_window": 12}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        8,
        sliding_windows=(12, 12, 12),
        rotary_dim=4,
    ),
    Case("granite", "GraniteConfig", {"attention_multiplier": 0.2}, 8, softmax_scale=0.2),
    Case(
        "gpt_oss",
        "GptOssConfig",
        _D16 | _SLIDING | _EXPERTS | {"rope_parameters": _YARN | {"truncate": False}},
        16,
        sliding_windows=(12, None, 12),
        kernels=("eager",),
        sinks=True,
    ),
    Case("qwen3_moe", "Qwen3MoeConfig", _D16 | _EXPERTS, 16, normed="w"),
    Case("llama4", "Llama4TextConfig", _LLAMA4, 16, normed="after RoPE", pairs="neighbours", unrotated=(1,)),
    Case(
        "llama4_without_norm",
        "Llama4TextConfig",
        _LLAMA4 | {"use_qk_norm": False, "attn_temperature_tuning": False},
        16,
        pairs="neighbours",
        unrotated=(1,),
    ),
    Case("deepseek_v3", "DeepseekV3Config", _LATENT, **_LATENT_ATTENTION),
    Case(
        "deepseek_v3_yarn",
        "DeepseekV3Config",
        _LATENT
        | {"q_lora_rank": None, "rope_interleave": False}
        | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        **_LATENT_ATTENTION | {"pairs": "halves"},
        # The logits' share of YaRN's scaling: (0.1 * mscale_all_dim * ln(factor) + 1) ** 2.
        softmax_scale=24**-0.5 * 1.0693147**2,
    ),
    Case("cohere2", "Cohere2Config", _SLIDING, 8, sliding_windows=(12, None, 12), pairs="neighbours", unrotated=(1,)),
    Case("gpt_neox", "GPTNeoXConfig", {"num_key_value_heads": 4}, 8, rotary_dim=2),
]

CASES_AND_KERNELS = [(case, kernel) for case in CASES for kernel in case.kernels]


def decoder_of(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    return getattr(decoder, "model", decoder)  # Llama 4 names the whole model as its decoder


def ids(*, batch: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    """Returns random token ids (batch, length) without 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
