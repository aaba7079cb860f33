"""Loads the decoder of a checkpoint; an incomplete one is an error that names the missing weights."""

import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoConfig, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils.hub import cached_file

from qk_sniffer.backbone.adapter import base_alone, check_adapter, load_adapter
from qk_sniffer.backbone.adapter_files import adapter_of
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.checkpoint_weights import (
    check_dtype,
    check_folder,
    config_problem,
    damaged_file,
    first_float,
    own_dtype,
    pickles_refused,
    stored_dtypes,
    weight_files,
    weights_problem,
)
from qk_sniffer.backbone.config_overrides import with_overrides
from qk_sniffer.backbone.devices import check_devices
from qk_sniffer.backbone.family import Family, find_family, imported_family
from qk_sniffer.backbone.gguf import check_gguf, gguf_source, refuse_damaged, refuse_lost, stored_in_gguf
from qk_sniffer.backbone.implementations import without_implementations
from qk_sniffer.backbone.loaded_weights import (
    UnconvertedError,
    decoder_float,
    ignored_layers_reported,
    refuse_incomplete,
    stored_modules,
    unconverted_named,
)
from qk_sniffer.backbone.quantization import (
    StoredWeights,
    check_quantizer,
    method,
    quantization_config,
)
from qk_sniffer.backbone.spellings import refuse_contradictions, spellings_recorded
from qk_sniffer.backbone.trailing_layers import cut_after
from qk_sniffer.backbone.unloaded import modules_limited, nothing_asked
from qk_sniffer.backbone.wrapper import is_wrapper, load_decoder, model_class, with_text_config
from qk_sniffer.config import AUTO, ModelConfig
from qk_sniffer.errors import QkSnifferError, SourceError
from qk_sniffer.hub.checkpoint_links import own_files
from qk_sniffer.hub.config_limits import refuse_large_config, refuse_other_configs, refuse_too_many_layers
from qk_sniffer.hub.endpoint import announce
from qk_sniffer.hub.lfs import refuse_pointers_of_model
from qk_sniffer.hub.revisions import is_hub_id, refuse_gated, repository_files

T = TypeVar("T")


def load_backbone(
    config: ModelConfig,
    *,
    commit: str | None = None,
    adapter_commit: str | None = None,
    pre_rope: bool = False,
    banded_attention: bool = True,
    layers: Collection[int] | None = None,
) -> Backbone:
    """Loads the decoder of `config.name` without its head, in eval mode, with the adapter of `config.adapter` on it.

    `commit` and `adapter_commit` pin a model and an adapter on the Hub to the commits of an earlier start. With
    `layers`, the decoder ends with the last of them, if the model allows it and there is no adapter.

    Raises:
        ConfigError: `config` does not fit the model, the adapter or this machine.
        SourceError: the model or the adapter cannot be found or loaded, the model attends to an encoder, or its
            checkpoint and its decoder do not have the same weights.
    """
    check_devices(config.device_map)
    with _loading(config, commit, adapter_commit):
        adapter = adapter_of(config, commit, adapter_commit)
        kept = layers if adapter is None else None  # the adapter may have weights of every layer
        model, family, stored = _cached_first(config, commit, lambda source: _loaded(config, source, kept))
    decoder, facts = family.decoder(model.eval()), None
    if adapter is not None:
        load_adapter(adapter, decoder, merge=config.merge_adapter)
        facts = adapter.facts()
    return Backbone(decoder, family, pre_rope=pre_rope, banded_attention=banded_attention, stored=stored, adapter=facts)


def check_model(
    config: ModelConfig, *, commit: str | None = None, adapter_commit: str | None = None
) -> PretrainedConfig:
    """Checks `config` against the model's own config and the adapter's, without loading weights.

    Returns the decoder's config.

    Raises:
        ConfigError: `config` does not fit the model, the adapter or this machine.
        SourceError: the model or the adapter cannot be found, they do not fit, or the model attends to an encoder.
    """
    check_devices(config.device_map)
    with _loading(config, commit, adapter_commit):
        adapter = adapter_of(config, commit, adapter_commit)
        found = _cached_first(config, commit, lambda source: _read_config(config, source))
        if adapter is not None:
            check_adapter(adapter, str(config.name), found.text)
    return found.text


def _cached_first(config: ModelConfig, commit: str | None, load: Callable[[dict[str, Any]], T]) -> T:
    """Calls `load` with the keyword arguments that locate the model, and returns its result."""
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(config.name),
        "trust_remote_code": config.trust_remote_code,
    }
    folder = Path(str(config.name))
    if config.gguf_file is not None:
        check_gguf(config)
    if folder.is_dir():
        refuse_pointers_of_model(folder, config.gguf_file)
        return load(source)
    source["revision"] = commit or config.revision
    try:
        # The cache comes first: without a network, the library retries for a minute before it reads the cache.
        return load(source | {"local_files_only": True})
    except OSError:
        announce()
        return load(source)


@dataclass(frozen=True)
class _Model:
    """A model whose config is read."""

    text: PretrainedConfig
    """The decoder's config, with its overrides."""
    wrapper: PretrainedConfig | None
    """The config of the larger model whose class loads the decoder; None if the decoder's own class loads it."""
    family: Family
    source: dict[str, Any]
    """The arguments that locate the weights and name them."""

    @property
    def explicit(self) -> str | None:
        """The file of weights that the config names; None for the usual ones."""
        return getattr(self.wrapper or self.text, "transformers_weights", None)


def _read_config(config: ModelConfig, source: dict[str, Any]) -> _Model:
    # The import comes first, because it may register the model with transformers.
    named = None if config.family is None else imported_family(config.family)
    if config.gguf_file is not None:
        source = gguf_source(config.gguf_file, source)
        refuse_damaged(config, source["gguf_file"])
        saved: dict[str, Any] = {}
        refuse_too_many_layers(f"{config.gguf_file} of {config.name}", read_gguf_metadata(source["gguf_file"])[0])
    else:
        where = {key: source[key] for key in ("revision", "local_files_only") if key in source}
        if (file := cached_file(str(config.name), "config.json", **where)) is not None:
            refuse_large_config(Path(file))
            refuse_other_configs(Path(file))
        saved = PretrainedConfig.get_config_dict(**source)[0]
        refuse_too_many_layers(f"the config.json of {config.name}", saved)
    whole = without_implementations(AutoConfig.from_pretrained(**source))
    if config.gguf_file is None and Path(str(config.name)).is_dir():
        explicit = getattr(whole, "transformers_weights", None)
        check_folder(Path(str(config.name)), explicit, allow_pickle=config.allow_pickle)
    text = _text_config(whole)
    text.dtype = text.dtype or whole.dtype
    if config.dtype == AUTO:
        check_dtype(own_dtype(text))
    family = named or find_family(text.model_type)
    if text is not whole and (quantization := getattr(whole, "quantization_config", None)) is not None:
        text.quantization_config = quantization
    check_quantizer(str(config.name), text)
    overridden = with_overrides(text, config.config_overrides, _of_decoder(saved, whole, text))
    attends_to_encoder = whole.is_encoder_decoder and "is_encoder_decoder" not in config.config_overrides
    if overridden.is_encoder_decoder or attends_to_encoder:
        raise SourceError(
            f"model {config.name} is an encoder-decoder: its decoder attends to an encoder, and a job has no input for "
            "it. For the decoder without its encoder set model.config_overrides.is_encoder_decoder=false"
        )
    if config.gguf_file is not None:
        refuse_lost(overridden, config, source["gguf_file"])
    if config.gguf_file is None and not whole.is_encoder_decoder and is_wrapper(whole, text, family):
        return _Model(overridden, with_text_config(whole, text, overridden), family, source)
    return _Model(overridden, None, family, source if text is whole else source | {"key_mapping": family.key_mapping})


def _text_config(whole: PretrainedConfig) -> PretrainedConfig:
    try:
        return whole.get_text_config()
    except ValueError:  # an encoder of texts next to a decoder
        return whole.get_text_config(decoder=True)


def _of_decoder(saved: dict[str, Any], whole: PretrainedConfig, text: PretrainedConfig) -> dict[str, Any]:
    """Returns the decoder's part of config.json as `saved`, before the config's class changes it; may be empty."""
    if text is whole:
        return saved
    parts = [part for part in saved.values() if isinstance(part, dict)]
    return next((part for part in parts if part.get("model_type") == text.model_type), {})


def _auto_class(config: ModelConfig, model_config: PretrainedConfig, family: Family) -> Any:
    """Returns the class of transformers that loads this checkpoint."""
    with_head = "AutoModelForCausalLM"
    offered = (getattr(model_config, "auto_map", None) or {}) if config.trust_remote_code else {}
    own_code_has_head_only = family.auto_class not in offered and with_head in offered
    # These name their tensors as the model with its head does. Without it, some types find no tensor.
    quantization = quantization_config(model_config)
    needs_head = config.gguf_file is not None or (quantization is not None and method(quantization) == "torchao")
    if own_code_has_head_only or (needs_head and family.auto_class == "AutoModel"):
        return getattr(transformers, with_head)
    named = getattr(transformers, family.auto_class)
    if offered or not hasattr(named, "_model_mapping") or type(model_config) in named._model_mapping:
        return named
    if (found := model_class(model_config)) is None:
        raise SourceError(
            f"model {config.name}: transformers {transformers.__version__} has no class that loads a decoder of the "
            f"type {model_config.model_type}. A family can name one (model.family=package.module:Class, "
            "Family.auto_class)"
        )
    return found


def _loaded(
    config: ModelConfig, source: dict[str, Any], layers: Collection[int] | None
) -> tuple[PreTrainedModel, Family, StoredWeights]:
    found = _read_config(config, source)
    stored = _stored(config, found)
    arguments = found.source | {
        "dtype": _dtype(config, stored),
        "device_map": config.device_map,
        "use_safetensors": None if config.allow_pickle or config.gguf_file else True,
        "ignore_mismatched_sizes": True,  # reported below, with all other wrong weights
        "output_loading_info": True,
    }
    if config.gguf_file is not None:
        # Without this, a quantized file may stay packed and run on its own kernels, those of attention included.
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with spellings_recorded() as spellings:
            model, info = _from_pretrained(config, found, layers, arguments)
    except UnconvertedError as error:
        by_file = _dtypes_by_file(config, found)
        refuse_contradictions(str(config.name), spellings, by_file)
        raise error.explained(str(config.name), {key for one in by_file.values() for key in one}) from error
    by_file = _dtypes_by_file(config, found)  # those of a repository are known only now
    dtypes = {key: dtype for one in by_file.values() for key, dtype in one.items()}
    multimodal = found.wrapper is not None or "key_mapping" in found.source
    refuse_contradictions(str(config.name), spellings, by_file)
    refuse_incomplete(
        str(config.name),
        model,
        found.family,
        info,
        by_file,
        multimodal=multimodal,
        quantized=stored.quantization is not None,
    )
    own = decoder_float(model, found.family, info, dtypes, multimodal=multimodal)
    if own is not None and (stored.quantization is None or stored.dtype is None):
        stored = replace(stored, dtype=own)  # config.json may name another
    stored = replace(stored, modules=stored_modules(model, found.family, info, dtypes, multimodal=multimodal))
    return model, found.family, stored


def _from_pretrained(
    config: ModelConfig, found: _Model, layers: Collection[int] | None, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads a model with the `arguments` of from_pretrained; returns it and transformers' loading info."""
    cut = nullcontext() if layers is None else cut_after(layers, found.family)
    safe = nullcontext() if config.allow_pickle else pickles_refused(str(config.name))
    with base_alone(), ignored_layers_reported(), unconverted_named(), cut, modules_limited(), safe:
        loaded: Any = None
        if found.wrapper is not None:
            if config.attn_implementation is not None:
                found.text._attn_implementation = config.attn_implementation  # its towers may not support it
            loaded = load_decoder(found.wrapper, found.text, found.family, **arguments)
            arguments["key_mapping"] = found.family.key_mapping  # for the decoder's own class
        if loaded is None:
            loaded = _auto_class(config, found.text, found.family).from_pretrained(
                config=found.text, attn_implementation=config.attn_implementation, **arguments
            )
        model, info = loaded
    return model, info


def _dtypes_by_file(config: ModelConfig, found: _Model) -> dict[Path, dict[str, str]]:
    """Returns the stored dtypes in each file of weights, by the stored names."""
    files = [] if config.gguf_file is not None else weight_files(found.source, found.explicit)
    return {path: stored_dtypes([path]) for path in files}


def _stored(config: ModelConfig, found: _Model) -> StoredWeights:
    """Returns what is known of the stored weights before they are read."""
    if config.gguf_file is not None:
        return stored_in_gguf(found.source["gguf_file"])
    own = own_dtype(found.text) or first_float(stored_dtypes(weight_files(found.source, found.explicit)))
    return StoredWeights(own, quantization_config(found.text))


def _dtype(config: ModelConfig, stored: StoredWeights) -> Any:
    """Returns the dtype to load: that of `config`, or the checkpoint's own, which may be known to transformers alone.

    Raises:
        ConfigError: no model computes in the checkpoint's own dtype.
    """
    if config.dtype != AUTO:
        return getattr(torch, config.dtype)
    check_dtype(stored.dtype)
    return AUTO if stored.dtype is None else getattr(torch, stored.dtype)


@contextmanager
def _loading(config: ModelConfig, commit: str | None, adapter_commit: str | None) -> Iterator[None]:
    """Turns the errors of transformers into errors that name the model and the way out.

    Checks before the block and after it that no link of the model and of its adapter leads to a file that is not
    theirs.
    """
    of_adapter = nullcontext() if config.adapter is None else own_files(config.adapter, adapter_commit)
    with own_files(str(config.name), commit), of_adapter, _explained(config, commit):
        yield


@contextmanager
def _explained(config: ModelConfig, commit: str | None) -> Iterator[None]:
    """Turns the errors of transformers into errors that name the model and the way out."""
    where = f"model {config.name}" + (f" at revision {config.revision}" if config.revision != "main" else "")
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)  # its report lists the head, which is omitted on purpose
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        with nullcontext() if config.trust_remote_code else nothing_asked():
            yield
    except OSError as error:
        refuse_gated("model", str(config.name), error)
        if problem := _files_problem(config, commit) or _local_problem(config, commit):
            raise SourceError(f"{where} {problem}") from error
        file = "config.json" if config.gguf_file is None else "the file of model.gguf_file"
        raise SourceError(
            f"{where} cannot be loaded: {_first_line(str(error))} Give model.name a Hub id (org/name) or a local "
            f"folder with {file}; a private model needs HF_TOKEN, an offline machine a cached copy"
        ) from error
    except QkSnifferError:
        raise
    except ImportError as error:  # of a quantizer, which names its package
        text = " ".join(str(error).split())
        raise SourceError(f"{where} needs a package that is not installed: {text}") from error
    except Exception as error:  # any error of the checkpoint or of the code in it
        if problem := _local_problem(config, commit):
            raise SourceError(f"{where} {problem}") from error
        hint = "; set model.trust_remote_code=true if you trust its code" if "trust_remote_code" in str(error) else ""
        text = re.sub(r"\W*(Model type should be|Should contain) one of .*", "", " ".join(str(error).split()))
        raise SourceError(f"{where} cannot be loaded: {type(error).__name__}: {text}{hint}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _local_problem(config: ModelConfig, commit: str | None) -> str | None:
    """Returns what is wrong with the files on this machine of a model that could not be loaded; None if nothing is."""
    name = str(config.name)
    if config.gguf_file is not None:
        return None
    if Path(name).is_dir():
        return config_problem(Path(name))
    if not is_hub_id(name):
        return None
    try:
        return damaged_file({"pretrained_model_name_or_path": name, "revision": commit or config.revision})
    except OSError:
        return None


def _files_problem(config: ModelConfig, commit: str | None) -> str | None:
    """Returns what a repository that could not be loaded lacks; None if it is not known."""
    name, revision = str(config.name), commit or config.revision
    if config.gguf_file is not None or Path(name).exists() or not is_hub_id(name):
        return None
    names = repository_files(name, revision)
    if "config.json" not in names:
        return None

    def read(file: str) -> bytes:
        path = cached_file(name, file, revision=revision)
        assert path is not None
        return Path(path).read_bytes()

    try:
        return weights_problem(names, read, allow_pickle=config.allow_pickle)
    except OSError:  # the index cannot be read either
        return None


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].rstrip(".") + "."
