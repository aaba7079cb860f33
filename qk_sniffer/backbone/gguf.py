"""Locates GGUF files and refuses those whose attention parameters transformers would lose.

A GGUF file, the format of llama.cpp, holds a model with its config and tokenizer. Reading it needs the package `gguf`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.utils.hub import cached_file

from qk_sniffer.backbone.damaged_files import damage
from qk_sniffer.backbone.quantization import StoredWeights
from qk_sniffer.backbone.unloaded import unloaded
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError, SourceError
from qk_sniffer.hub.gguf_header import refuse_large_header
from qk_sniffer.text import shortened

_ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_AS_IN_CONFIG = {
    ".attention.sliding_window": "sliding_window",
    ".attn_logit_softcapping": "attn_logit_softcapping",
}
"""Endings of keys in a file -> the key of transformers' configs with the same meaning."""

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""The layers by which llama.cpp knows a model of 27 billion parameters, by the architecture of the file."""


def check_gguf(config: ModelConfig) -> None:
    """Checks `model.gguf_file` as far as possible without the Hub.

    Raises:
        ConfigError: the package `gguf` is not installed, the name is not that of a GGUF file, or the folder
            `model.name` does not contain the file itself.
    """
    file, name = str(config.gguf_file), Path(str(config.name))
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError([f"model.gguf_file={file} needs the package gguf: run pip install gguf"]) from None
    if not file.endswith(".gguf"):
        raise ConfigError([f"model.gguf_file is {file!r}; it must be the name of a .gguf file"])
    if not name.is_dir():
        return
    if Path(file).name != file:
        raise ConfigError(
            [f"model.gguf_file is {file!r}; it must be the name of a file in the folder model.name itself"]
        )
    if not (name / file).is_file():
        present = ", ".join(sorted(path.name for path in name.glob("*.gguf")))
        raise ConfigError([f"model.gguf_file is {file!r}, which is not in {name}; it has {present or 'no .gguf file'}"])


def gguf_source(file: str, source: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments for transformers that load the GGUF `file` of the folder or repository of `source`.

    They hold the whole path, because transformers looks for a bare name in the current directory first.

    Raises:
        OSError: the repository cannot be read, or has no such file.
    """
    name = source["pretrained_model_name_or_path"]
    where = {key: source[key] for key in ("revision", "local_files_only") if key in source}
    path = cached_file(name, file, **where)
    assert path is not None
    return {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": str(Path(path).absolute())}


def refuse_damaged(config: ModelConfig, path: str) -> None:
    """Refuses the file at `path` if it is damaged, as one is whose download broke off, or its header is too large.

    Raises:
        SourceError: it is.
    """
    refuse_large_header(Path(path))
    if how := damage(Path(path)):
        raise SourceError(
            f"model.gguf_file={config.gguf_file} of {config.name} is damaged: {how}. Restore it, or download it again "
            "(hf download)"
        )


def stored_in_gguf(path: str) -> StoredWeights:
    """Returns the dtype of the floats in a file, or its types of quantized tensors with their numbers."""
    from gguf import GGMLQuantizationType

    header = GgufHeader.from_file(path)
    if header.dtype is not None:
        return StoredWeights(str(header.dtype).removeprefix("torch."))
    types = Counter(GGMLQuantizationType(number).name for number in header.ggml_types.values())
    return StoredWeights(quantization={"quant_method": "gguf", "types": dict(sorted(types.items()))})


def refuse_lost(text: PretrainedConfig, config: ModelConfig, path: str) -> None:
    """Refuses a file with attention parameters that transformers does not read, which would change the vectors.

    `text` is the config with the overrides in it, and `path` that of the file.

    Raises:
        ConfigError: `model.config_overrides` does not give these parameters.
        SourceError: the file has tensors that transformers does not read.
    """
    metadata, tensors = read_gguf_metadata(path)
    decoder = unloaded(text)
    given = set(_keys(config.config_overrides))
    lost = _lost_rotary(text, given, metadata, tensors)
    if decoder is not None:
        lost |= _lost_by_decoder(decoder, given, metadata)
        lost |= _lost_biases(text, decoder, tensors)
    longest = metadata.get(f"{metadata['general.architecture']}.context_length", math.inf)
    for key, value in metadata.items():
        name = next((name for ending, name in _AS_IN_CONFIG.items() if key.endswith(ending)), None)
        if name is None or name in given or not value or getattr(text, name, None) == value:
            continue
        if name != "sliding_window" or value < longest:
            lost[f"{key}={value}"] = name
    lost |= _lost_scale(text, given, metadata)
    if lost:
        ways = " and ".join(f"model.config_overrides.{name}" for name in dict.fromkeys(lost.values()))
        raise ConfigError(
            [
                f"model.gguf_file={config.gguf_file} has parameters that transformers does not read from it "
                f"({', '.join(lost)}): give {ways} as in the config.json of the original model, or load that model "
                "itself if its config has no such key"
            ]
        )
    if unread := _unread(text, metadata, tensors):
        raise SourceError(
            f"model.gguf_file={config.gguf_file} has {len(unread)} tensors that transformers does not read from it: "
            f"{shortened(unread, 3)}. Without them the vectors would differ: load the original model instead"
        )


def _keys(overrides: Mapping[str, Any]) -> Iterator[str]:
    for key, value in overrides.items():
        yield key
        if isinstance(value, dict):
            yield from _keys(value)


def _lost_rotary(
    text: PretrainedConfig, given: set[str], metadata: Mapping[str, Any], tensors: Iterable[str]
) -> dict[str, str]:
    """Returns the rotary parameters of the file that the config lacks -> the override that gives them."""
    rope = getattr(text, "rope_parameters", None) or {}
    each = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    bases = [] if "rope_theta" in given else [one["rope_theta"] for one in each if one.get("rope_theta") is not None]
    is_given = bool({"rope_type", "type", "rope_scaling"} & given)
    is_plain = not is_given and all(one.get("rope_type", "default") == "default" for one in each)
    lost = {name: "rope_parameters" for name in tensors if is_plain and name in _ROTARY_TENSORS}
    for key, value in metadata.items():
        is_lost_factor = key.endswith(".rope.scaling.attn_factor") and not is_given and value not in (0, 1)
        if (
            (key.endswith(".rope.scaling.type") and is_plain and value != "none")
            or (key.endswith((".rope.scaling.factor", ".rope.scale_linear")) and is_plain and value not in (0, 1))
            or (is_lost_factor and not any(_is_close(value, [*one.values()]) for one in each))
            or (key.endswith(".rope.freq_base") and bases and not _is_close(value, bases))
        ):
            lost[f"{key}={value}"] = "rope_parameters"
    return lost


def _lost_by_decoder(decoder: nn.Module, given: set[str], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the parameters of heads that differ between the file and the decoder -> the override that gives them."""
    widths = [2 * buffer.shape[-1] for name, buffer in decoder.named_buffers() if name.endswith("inv_freq")]
    scales = [value for module in decoder.modules() if isinstance(value := getattr(module, "scaling", None), float)]
    lost = {}
    for key, value in metadata.items():
        if key.endswith(".rope.dimension_count") and widths and value not in widths:
            if "partial_rotary_factor" not in given:
                lost[f"{key}={value}"] = "rope_parameters.partial_rotary_factor"
        elif key.endswith(".attention.scale") and value and scales and not _is_close(value, scales):
            is_gemma = hasattr(decoder.config, "query_pre_attn_scalar")
            lost[f"{key}={value}"] = "query_pre_attn_scalar" if is_gemma else "attention_multiplier"
    return lost


def _lost_scale(text: PretrainedConfig, given: set[str], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the attention scale of a Gemma file, if it is not that of the config -> the override that gives it.

    No key stores the scale. llama.cpp knows it by the number of layers, and the config has that of the smaller models.
    """
    architecture = metadata["general.architecture"]
    if architecture not in _LAYERS_OF_27B or "query_pre_attn_scalar" in given:
        return {}
    if metadata.get(f"{architecture}.attention.scale"):
        return {}
    layers = metadata[f"{architecture}.block_count"]
    scalar = metadata.get(f"{architecture}.attention.key_length", getattr(text, "head_dim", None))
    if layers == _LAYERS_OF_27B[architecture]:
        scalar = metadata[f"{architecture}.embedding_length"] / metadata[f"{architecture}.attention.head_count"]
    if getattr(text, "query_pre_attn_scalar", scalar) == scalar:
        return {}
    return {f"an attention scale of {scalar:g} ** -0.5 for its {layers} layers": f"query_pre_attn_scalar={scalar:g}"}


def _unread(text: PretrainedConfig, metadata: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Returns the tensors of the file that determine vectors and that transformers does not load.

    Empty for an architecture whose tensors transformers reports after loading, as it does for safetensors.
    """
    architecture = metadata["general.architecture"]
    model = None if is_gguf_arch_supported(architecture) else unloaded(text, AutoModelForCausalLM)
    if model is None:
        return []
    processors: Any = TENSOR_PROCESSORS
    processor = processors.get(architecture, TensorProcessor)(config=text.to_dict())
    weights, base = model.state_dict(), f"{model.base_model_prefix}."
    read: set[str] = set()
    for names in (weights, [name.removeprefix(base) for name in weights]):
        # A stand-in without children: transformers maps those of each submodule again, which takes long.
        stand_in = SimpleNamespace(config=text, state_dict=lambda names=names: names, named_children=tuple)
        read |= set(get_gguf_hf_weights_map(stand_in, processor))
    read |= {f"{name}.weight" for name in read}  # experts, which are mapped by their module
    return [name for name in tensors if name not in read and not _is_left_out(name, text)]


def _is_left_out(tensor: str, text: PretrainedConfig) -> bool:
    """Whether the tensor of a file belongs to no layer of the decoder, or is checked elsewhere."""
    if layer := re.match(r"blk\.(\d+)\.", tensor):
        return int(layer[1]) >= int(text.num_hidden_layers)
    return tensor.startswith(("output.", "rope_"))


def _lost_biases(text: PretrainedConfig, decoder: nn.Module, tensors: Iterable[str]) -> dict[str, str]:
    if any("att" in name and name.endswith(".bias") for name, _ in decoder.named_parameters()):
        return {}
    unset = (key for key, value in text.to_dict().items() if "bias" in key and value is False)
    way_out = next(unset, "attention_bias")
    return {name: way_out for name in tensors if re.fullmatch(r"blk\.0\.attn_(q|k|v|qkv)\.bias", name)}


def _is_close(value: float, to: Iterable[Any]) -> bool:
    # The file stores 32-bit numbers.
    return any(isinstance(one, float | int) and math.isclose(value, one, rel_tol=1e-6) for one in to)
