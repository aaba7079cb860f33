"""Tiny random models, one case a family. Every test of the tap and of capture runs over the whole list."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Case:
    """One family: its config, and what is known of its attention from that config alone."""

    name: str
    config_class: str
    options: dict[str, Any]
    head_dim: int
    sliding_windows: tuple[int | None, ...] = (None, None, None)
    normed: str | None = None
    """How q_norm and k_norm scale, where the family has them: `w` or `1+w`; `flat w`: over all heads at once."""
    pairs: str = "halves"
    """Which components RoPE turns together: i and i + d/2 (`halves`), or 2i and 2i + 1 (`neighbours`)."""
    rotary_dim: int | None = None
    """How many of a head's first components are turned; None: all."""
    unrotated: tuple[int, ...] = ()
    """Layers without RoPE."""
    kernels: tuple[str, ...] = ("eager", "sdpa")
    softmax_scale: float | None = None
    """None: head_dim ** -0.5."""
    softcap: float | None = None
    sinks: bool = False
    hooked: bool = True
    """Whether the family's projections can be hooked for the proof."""
    local_theta: float | None = None
    """Rotary base of the sliding layers, where it is another one."""

    def config(self) -> PretrainedConfig:
        made: PretrainedConfig = getattr(transformers, self.config_class)(**_SIZES | self.options)
        return made

    def model(self, *, dtype: torch.dtype = torch.float32, kernel: str | None = None) -> PreTrainedModel:
        """The causal language model with random weights, norms included, from a fixed seed; the last kernel if none."""
        torch.manual_seed(0)
        kernel = kernel or self.kernels[-1]
        model = AutoModelForCausalLM.from_config(self.config(), attn_implementation=kernel)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mistake
                    weight.add_(torch.randn_like(weight) * 0.3)
                elif "embed" not in name:
                    weight.mul_(4)  # attention far from uniform
            for weight in model.parameters():
                weight.data = weight.to(dtype)  # weights alone: a loaded model's rotary frequencies stay in float32
        made: PreTrainedModel = model.eval()
        return made


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_D16 = {"head_dim": 16}
_PAD = {"pad_token_id": 0}
_SLIDING: dict[str, Any] = {
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CASES = [
    Case("llama", "LlamaConfig", {}, head_dim=8),
    Case("llama3_rope", "LlamaConfig", {"rope_parameters": LLAMA3_ROPE}, head_dim=8),
    Case("mistral", "MistralConfig", {"sliding_window": 12, "head_dim": 16}, 16, sliding_windows=(12, 12, 12)),
    Case("mistral_full", "MistralConfig", {"sliding_window": None, "head_dim": 16}, 16),
    Case("qwen2", "Qwen2Config", {}, head_dim=8),
    Case("qwen3", "Qwen3Config", {"head_dim": 16}, head_dim=16, normed="w"),
    Case(
        "qwen3_sliding",
        "Qwen3Config",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        head_dim=16,
        sliding_windows=(12, None, 12),
        normed="w",
    ),
    Case(
        "gemma3",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "pad_token_id": 0,
        },
        head_dim=16,
        sliding_windows=(12, 12, None),
        normed="1+w",
        softmax_scale=24**-0.5,
        local_theta=10000.0,
    ),
    Case("glm", "GlmConfig", _D16 | _PAD, 16, pairs="neighbours", rotary_dim=8),
    Case("glm4", "Glm4Config", _D16 | _PAD, 16, pairs="neighbours", rotary_dim=8),
    Case("ministral", "MinistralConfig", _D16 | _SLIDING, 16, sliding_windows=(12, None, 12)),
    Case("smollm3", "SmolLM3Config", _PAD | {"no_rope_layers": [1, 1, 0]}, 8, unrotated=(2,)),
    Case(
        "gemma2",
        "Gemma2Config",
        _D16 | _SLIDING | _PAD | {"query_pre_attn_scalar": 24},
        16,
        sliding_windows=(12, None, 12),
        softmax_scale=24**-0.5,
        softcap=50.0,
        kernels=("eager",),
    ),
    Case("olmo2", "Olmo2Config", _PAD, 8, normed="flat w"),
    Case("phi3", "Phi3Config", _PAD, 8, hooked=False),
    Case("granite", "GraniteConfig", {"attention_multiplier": 0.2}, 8, softmax_scale=0.2),
    Case(
        "gpt_oss",
        "GptOssConfig",
        _D16 | _SLIDING | _EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        16,
        sliding_windows=(12, None, 12),
        kernels=("eager",),
        sinks=True,
    ),
    Case("qwen3_moe", "Qwen3MoeConfig", _D16 | _EXPERTS, 16, normed="w"),
    Case(
        "cohere2",
        "Cohere2Config",
        _SLIDING | _PAD,
        8,
        sliding_windows=(12, None, 12),
        pairs="neighbours",
        unrotated=(1,),
    ),
    Case("gpt_neox", "GPTNeoXConfig", {"num_key_value_heads": 4}, 8, rotary_dim=2, hooked=False),
]

CASES_AND_KERNELS = [(case, kernel) for case in CASES for kernel in case.kernels]


def ids(*, batch: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length), never 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
