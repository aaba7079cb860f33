"""Tells how the weights of a checkpoint are quantized, and refuses what transformers cannot read."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from qk_sniffer.config import DTYPES
from qk_sniffer.errors import SourceError

COMPUTED_IN = tuple(getattr(torch, name) for name in DTYPES)
"""The dtypes in which models compute."""

UNREADABLE = (
    "if it is in a format that transformers cannot read, load the original model or one that was quantized in another "
    "format (models/SUPPORTED.md lists them)"
)
"""The way out for quantized weights without a quantizer."""


@dataclass(frozen=True)
class StoredWeights:
    """Describes the weights of a checkpoint as they are stored."""

    dtype: str | None = None
    """The checkpoint's own dtype, such as bfloat16; None if it names none."""
    quantization: dict[str, Any] | None = None
    """The `method`, whether the weights were `dequantized` when they were loaded, and the `config` of the checkpoint;
    None if they are not quantized."""


def describe_quantization(model: Any, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns `StoredWeights.quantization` of a loaded model, whose `quantization_config` is `config`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    config = config or {"quant_method": method(quantizer.quantization_config.to_dict())}
    packed = any(
        type(tensor.data) is not torch.Tensor or (tensor.dim() > 1 and tensor.dtype not in COMPUTED_IN)
        for tensor in (*model.parameters(), *model.state_dict().values())
    )
    return {"method": method(config), "dequantized": not packed, "config": config}


def quantization_config(config: PretrainedConfig) -> dict[str, Any] | None:
    """Returns the `quantization_config` of a model's config; None for a model that is not quantized."""
    given = getattr(config, "quantization_config", None)
    return None if given is None else dict(given) if isinstance(given, dict) else given.to_dict()


def method(quantization: dict[str, Any]) -> str:
    """Returns the name of the method of a `quantization_config`, such as fp8."""
    for bits in ("4bit", "8bit"):
        if quantization.get(f"load_in_{bits}"):
            return f"bitsandbytes_{bits}"
    return str(getattr(quantization.get("quant_method"), "value", quantization.get("quant_method")))


def refuse_unknown_quantizer(name: str, config: PretrainedConfig) -> None:
    """Refuses a model whose config names a method of quantization that transformers ignores.

    Raises:
        SourceError: transformers would read the quantized numbers as if they were the weights.
    """
    quantization = quantization_config(config)
    if quantization is not None and method(quantization) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise SourceError(
            f"model {name} is quantized with {method(quantization)!r} (quant_method of its quantization_config), which "
            f"transformers cannot read: load the original model, or one that was quantized in another format ({known})"
        )
