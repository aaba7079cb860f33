"""Captures the text decoder of one multimodal type of transformers, and compares it with the whole model.

The whole model is built tiny and random with all its towers. It is saved twice: with the names and forms of published
checkpoints, to which transformers converts its weights, and with those of its own modules. The vectors that a job
captures from either must be those of the whole model's forward pass over a text.
"""

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from examine import Entry, captured, check_cut, reason_of, without_name
from examine_proof import WrongError
from recording import KernelCall, recorded
from safetensors.torch import load_file, save_file
from tiny_configs import randomized, tiny_config
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig
from transformers.models.auto import modeling_auto

from qk_sniffer.backbone import wrapper
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import QkSnifferError

_TASKS = "MULTIMODAL_LM RETRIEVAL SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ TEXT_TO_WAVEFORM"
_TOKENS = 24

_CLASSES = {"shieldgemma2": "ShieldGemma2ForImageClassification"}
"""Classes of published models that no auto class for text names."""

_TRANSPOSED = {"qwen3_vl_moe": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}
"""Weights whose last two dimensions are exchanged in published checkpoints, which transformers does not save."""


def whole_types() -> list[str]:
    """Returns the model types that generate text from other input, and those with a text decoder in their config."""
    found = set(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    for task in _TASKS.split():
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            if "text_config" in (getattr(CONFIG_MAPPING[model_type], "sub_configs", None) or {}):
                found.add(model_type)
    return sorted(found & set(CONFIG_MAPPING))


def class_of(config: PretrainedConfig) -> Any:
    """Returns the class of transformers that loads a whole model of `config`; None without one."""
    if (name := _CLASSES.get(config.model_type)) is not None:
        return getattr(transformers, name)
    return wrapper.model_class(config)


def examine_whole(model_type: str) -> Entry:
    """Builds, saves, loads and captures a model of that type.

    Raises:
        WrongError: the vectors are not those of the whole model.
    """
    config = tiny_config(model_type)
    cls = class_of(config)
    entry = Entry(model_type, getattr(cls, "__name__", ""), whole=True)
    ids = torch.randint(5, 100, (2, _TOKENS), generator=torch.Generator().manual_seed(1))
    model = _built(cls, config)
    calls, notes = _recorded(model, config, ids)
    for published in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            _save(model, config, folder, published)
            settings = ModelConfig(name=folder, dtype="float32", device_map="cpu")
            try:
                backbone = load_backbone(settings)
                facts = backbone.probe()
                seen = captured(backbone, ids)
                cut = load_backbone(settings, layers=[facts[0].heads.layer])
            except QkSnifferError as error:
                return replace(entry, note=reason_of(without_name(error, folder)))
        _compare(calls, seen, published)
        check_cut(cut, seen, ids)
    return replace(entry, post="yes", decoder_type=backbone.config.model_type, note="; ".join(notes))


def _save(model: Any, config: PretrainedConfig, folder: str, published: bool) -> None:
    """Saves the model; if it cannot be built, its config alone, so that the error of the loader gives the reason."""
    if isinstance(model, _DecoderAlone):
        config.save_pretrained(folder)
        weights = {
            f"model.language_model.{name}": weight.clone() for name, weight in model.decoder.state_dict().items()
        }
        save_file(weights, Path(folder) / "model.safetensors")
    elif model is not None:
        model.save_pretrained(folder, save_original_format=published)
        if published and (names := _TRANSPOSED.get(config.model_type)) is not None:
            file = Path(folder) / "model.safetensors"
            weights = {
                name: weight.transpose(1, 2).contiguous() if name.endswith(names) else weight
                for name, weight in load_file(file).items()
            }
            save_file(weights, file, metadata={"format": "pt"})
    else:
        config.save_pretrained(folder)
        save_file({"nothing": torch.zeros(1)}, Path(folder) / "model.safetensors")


@dataclass(frozen=True, eq=False)
class _DecoderAlone:
    """The decoder of a model that needs a library."""

    decoder: Any
    library: str


def _built(cls: Any, config: PretrainedConfig) -> Any:
    """Returns the random model; None if it cannot be built."""
    torch.manual_seed(0)
    with wrapper.towers_without_libraries() as lacking:
        try:
            return randomized(cls(config)).eval()
        except (AttributeError, TypeError, ValueError):
            if not lacking:
                return None
    decoder = randomized(AutoModel.from_config(config.get_text_config())).eval()
    return _DecoderAlone(decoder, re.findall(r"requires the (\w+) library", lacking[0])[0])


def _recorded(model: Any, config: PretrainedConfig, ids: torch.Tensor) -> tuple[list[KernelCall], list[str]]:
    """Returns the attention calls of the model over `ids`, and notes; no calls if it does not run on text alone."""
    if isinstance(model, _DecoderAlone):
        note = f"its decoder alone, because its tower needs the library {model.library}"
        return recorded(model.decoder, ids)[0], [note]
    text = config.get_text_config(decoder=True)
    with torch.inference_mode():
        try:
            return recorded(model, ids)[0], []
        except Exception:  # any error of the model's code
            try:
                decoder, _ = wrapper.decoder_of(model, text.model_type, find_family(text.model_type))
                return recorded(decoder, ids)[0], [
                    "compared with its decoder, because it needs other input next to text"
                ]
            except Exception:
                return [], []


def _compare(calls: list[KernelCall], seen: list[Any], published: bool) -> None:
    names = "published" if published else "its own"
    if not calls:
        raise WrongError("captured, but the whole model does not run")
    if len(calls) != len(seen):
        raise WrongError(f"{len(calls)} calls of attention in the whole model, {len(seen)} captured")
    for call, own in zip(calls, seen, strict=True):
        for one, other in ((call.query, own.query), (call.key, own.key)):
            if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-5, atol=1e-6):
                raise WrongError(
                    f"layer {own.layer}: with weights of {names} names, other vectors than the whole model"
                )
