"""Tells how the weights of a checkpoint are quantized, and refuses what transformers cannot read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from qk_sniffer.backbone.patterns import refuse_runaway_patterns
from qk_sniffer.backbone.unloaded import unloaded
from qk_sniffer.config import DTYPES
from qk_sniffer.errors import SourceError

COMPUTED_IN = tuple(getattr(torch, name) for name in DTYPES)
"""The dtypes in which models compute."""

_PACKAGES = {
    "aqlm": {"aqlm": "aqlm"},
    "auto-round": {"auto_round": "auto-round"},
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes_4bit": {"bitsandbytes": "bitsandbytes"},
    "bitsandbytes_8bit": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "hqq": {"hqq": "hqq"},
    "quark": {"quark": "amd-quark"},
    "torchao": {"torchao": "torchao"},
    "vptq": {"vptq": "vptq"},
}
"""Method of quantization -> the modules that read it -> the packages that contain them."""

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
    """The `quantization_config` of the checkpoint; None if it is not quantized."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """The names of attention modules in the checkpoint, by their names in the decoder, where they are known."""

    @property
    def quantizers(self) -> list[str]:
        """The packages that read the quantized weights."""
        packages = {} if self.quantization is None else _PACKAGES.get(method(self.quantization), {})
        return sorted(packages.values())

    def describe_quantization(self, decoder: nn.Module) -> dict[str, Any] | None:
        """Returns the `method`, the `config`, and whether the loaded `decoder` computes with `dequantized` weights.

        Some methods dequantize the weights in the first forward pass. None if the checkpoint is not quantized.
        """
        if self.quantization is None:
            return None
        packed = any(
            type(tensor.data) is not torch.Tensor or (tensor.dim() > 1 and tensor.dtype not in COMPUTED_IN)
            for tensor in _stored(decoder)
        )
        return {"method": method(self.quantization), "dequantized": not packed, "config": self.quantization}


def _stored(decoder: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the weights and the buffers of a checkpoint. `state_dict` changes the weights of bitsandbytes."""
    for module in decoder.modules():
        yield from (weight for weight in module._parameters.values() if weight is not None)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


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


def check_quantizer(name: str, config: PretrainedConfig) -> None:
    """Checks that transformers can read the quantized weights of a model, if they are quantized.

    Raises:
        SourceError: transformers would read the quantized numbers as if they were the weights, or a package that reads
            them is not installed; or a pattern of names of modules does not end.
    """
    quantization = quantization_config(config)
    if quantization is None:
        return
    packages = _PACKAGES.get(method(quantization), {})
    if missing := [package for module, package in packages.items() if find_spec(module) is None]:
        raise SourceError(
            f"model {name} is quantized with {method(quantization)}, and the package that reads it is not installed: "
            f"run pip install {' '.join(missing)}"
        )
    if method(quantization) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise SourceError(
            f"model {name} is quantized with {method(quantization)!r} (quant_method of its quantization_config), which "
            f"transformers cannot read: load the original model, or one that was quantized in another format ({known})"
        )
    decoder = unloaded(config)
    names = [] if decoder is None else [name for name, _ in decoder.named_modules()]
    refuse_runaway_patterns(f"the quantization_config of {name}", quantization, names)
