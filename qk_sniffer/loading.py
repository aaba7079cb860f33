"""Loading: the decoder of a checkpoint as the config says, whole or with an error that names what is missing."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GgufConfig, PretrainedConfig, PreTrainedModel

from qk_sniffer.backbone import Backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import QkSnifferError, SourceError
from qk_sniffer.families import Family, find_family, imported_family
from qk_sniffer.gguf import check_gguf, gguf_source, refuse_lost_rotary
from qk_sniffer.model_config import with_overrides

T = TypeVar("T")


def load_backbone(
    config: ModelConfig,
    *,
    commit: str | None = None,
    pre_rope: bool = False,
    banded_attention: bool = True,
) -> Backbone:
    """Loads the decoder of `config.name` without its head, in eval mode.

    `commit` pins a Hub model to the one of an earlier start.

    Raises:
        SourceError: the model cannot be found or loaded, or weights of the decoder are missing in its checkpoint.
    """
    with _loading(config):
        model, family, info = _cached_first(config, commit, lambda source: _loaded(config, source))
    decoder = family.decoder(model.eval())
    _refuse_missing(str(config.name), model, decoder, family, info)
    return Backbone(decoder, family, pre_rope=pre_rope, banded_attention=banded_attention)


def check_model(config: ModelConfig, *, commit: str | None = None) -> None:
    """Reads the model's config alone: cheap, and the first to know that something is no model.

    Raises:
        SourceError: there is none, or it does not go with `config`.
    """
    with _loading(config):
        _cached_first(config, commit, lambda source: _read_config(config, source))


def _cached_first(config: ModelConfig, commit: str | None, load: Callable[[dict[str, Any]], T]) -> T:
    """What `load` makes of the keyword arguments that say where the model is."""
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(config.name),
        "trust_remote_code": config.trust_remote_code,
    }
    if config.gguf_file is not None:
        check_gguf(config)
    if Path(str(config.name)).is_dir():
        return load(source)
    source["revision"] = commit or config.revision
    try:
        # The cache first: where there is no network, the library asks for a minute before it looks there.
        return load(source | {"local_files_only": True})
    except OSError:
        return load(source)


def _read_config(config: ModelConfig, source: dict[str, Any]) -> tuple[PretrainedConfig, Family, dict[str, Any]]:
    """The decoder's config with its overrides, its family, and the arguments to load it with."""
    named = None if config.family is None else imported_family(config.family)  # it may register the model first
    if config.gguf_file is not None:
        source = gguf_source(config.gguf_file, source)
    whole = AutoConfig.from_pretrained(**source)
    text = whole.get_text_config()
    family = named or find_family(text.model_type)
    if text is not whole:
        # A multimodal checkpoint: its decoder alone is built and read, under the names that it has inside the whole.
        source = source | {"key_mapping": family.inside}
        if (quantization := getattr(whole, "quantization_config", None)) is not None:
            text.quantization_config = quantization
    if config.gguf_file is not None:
        refuse_lost_rotary(text, config, source["gguf_file"])
    return with_overrides(text, config.config_overrides), family, source


def _loaded(config: ModelConfig, source: dict[str, Any]) -> tuple[PreTrainedModel, Family, dict[str, Any]]:
    model_config, family, source = _read_config(config, source)
    if config.gguf_file is not None:
        # Else a quantised file may stay packed, and run on kernels of its own, attention's included.
        source = source | {"quantization_config": GgufConfig(dequantize=True)}
    model, info = getattr(transformers, family.auto_class).from_pretrained(
        config=model_config,
        dtype=getattr(torch, config.dtype),
        device_map=config.device_map,
        attn_implementation=config.attn_implementation,
        use_safetensors=None if config.allow_pickle or config.gguf_file else True,
        ignore_mismatched_sizes=True,  # to be named by us, with every other weight that is not as it should be
        output_loading_info=True,
        **source,
    )
    return model, family, info


@contextmanager
def _loading(config: ModelConfig) -> Iterator[None]:
    """Turns what transformers raises while it loads into errors that name the model and the way out."""
    where = f"model {config.name}" + (f" at revision {config.revision}" if config.revision != "main" else "")
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)  # its load report lists the head, which is left out on purpose
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        text = str(error)
        if "safetensors" in text and not config.allow_pickle:
            raise SourceError(
                f"{where} has no safetensors weights. A pickle checkpoint can run any code when it is loaded: if you "
                f"trust its author, set model.allow_pickle=true. ({_first_line(text)})"
            ) from error
        file = "config.json" if config.gguf_file is None else "the file of model.gguf_file"
        raise SourceError(
            f"{where} cannot be loaded: {_first_line(text)} Give model.name a Hub id (org/name) or a local folder "
            f"with {file}; private and gated models need HF_TOKEN, an offline machine a cached copy"
        ) from error
    except QkSnifferError:
        raise
    except Exception as error:  # whatever a checkpoint, or code that comes with it, makes the library stumble over
        hint = "; set model.trust_remote_code=true if you trust its code" if "trust_remote_code" in str(error) else ""
        raise SourceError(f"{where} cannot be loaded: {type(error).__name__}: {error}{hint}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _refuse_missing(name: str, model: nn.Module, decoder: nn.Module, family: Family, info: dict[str, Any]) -> None:
    prefixes = [prefix for prefix, module in model.named_modules() if module is decoder]
    prefix = f"{prefixes[0]}." if prefixes and prefixes[0] else ""
    unused = tuple(prefix + name for name in family.unused)
    faults = {key: key for key in info["missing_keys"]}
    for key, there, here in info["mismatched_keys"]:
        faults[key] = f"{key} ({list(there)} in the checkpoint, {list(here)} by the config)"
    bad = [faults[key] for key in sorted(faults) if key.startswith(prefix) and not key.startswith(unused)]
    if not bad:
        return
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    way_out = "check that the checkpoint is whole and that model.config_overrides does not change its shapes"
    if len(info["missing_keys"]) >= len(model.state_dict()) and info["unexpected_keys"]:
        way_out = (
            f"it has weights of other names, such as {min(info['unexpected_keys'])}: a family can say how they map to "
            "the decoder's (model.family=package.module:Class, Family.inside)"
        )
    raise SourceError(
        f"model {name}: its checkpoint lacks, or has in another shape, {len(bad)} weights of the decoder: {shown}. "
        f"They would be random, so nothing is captured; {way_out}"
    )


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].rstrip(".") + "."
