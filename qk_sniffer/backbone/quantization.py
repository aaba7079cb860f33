"""Tells how the weights of a checkpoint are quantized, and refuses what transformers cannot read."""

from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from qk_sniffer.errors import SourceError

UNREADABLE = (
    "if it is in a format that transformers cannot read, load the original model or one that was quantized in another "
    "format (models/SUPPORTED.md lists them)"
)
"""The way out for quantized weights without a quantizer."""


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
