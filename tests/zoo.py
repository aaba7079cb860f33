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
    """How q_norm and k_norm scale, where the family has them: `w` or `1+w`."""
    local_theta: float | None = None
    """Rotary base of the sliding layers, where it is another one."""

    def config(self) -> PretrainedConfig:
        made: PretrainedConfig = getattr(transformers, self.config_class)(**_SIZES | self.options)
        return made

    def model(self, *, dtype: torch.dtype = torch.float32, kernel: str = "sdpa") -> PreTrainedModel:
        """The causal language model with random weights, norms included, from a fixed seed."""
        torch.manual_seed(0)
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
        local_theta=10000.0,
    ),
]


def ids(*, batch: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length), never 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
