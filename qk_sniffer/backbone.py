"""The backbone: the model without its language-model head, its attention layout, one forward at a time."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from qk_sniffer.attention import AttentionCall, ForwardDone, tap
from qk_sniffer.banded import banded
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import CaptureError, ConfigError, QkSnifferError, SourceError
from qk_sniffer.families import Family, find_family
from qk_sniffer.heads import LayerHeads

PROBE_TOKENS = 2

T = TypeVar("T")


@dataclass(frozen=True)
class LayerFacts:
    """One self-attention layer, as its attention kernel was seen to be called."""

    heads: LayerHeads
    softmax_scale: float
    softcap: float | None
    sinks: list[float] | None
    """One learned logit for each query head, where the model has them."""

    def to_dict(self) -> dict[str, Any]:
        """Flat, as the manifest holds it."""
        return asdict(self.heads) | {
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }


class Backbone:
    """A loaded decoder. `forward` runs it and shows every attention call to a callback."""

    def __init__(
        self, decoder: nn.Module, family: Family, *, pre_rope: bool = False, banded_attention: bool = True
    ) -> None:
        self.decoder = decoder
        self.family = family
        self.pre_rope = pre_rope
        self.banded_attention = banded_attention
        self.attention_layers = family.attention_layers(decoder)
        weight = next(decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        _refuse_shared_indices(self.attention_layers)

    @property
    def config(self) -> PretrainedConfig:
        """The text config that the decoder was built from."""
        config: PretrainedConfig = self.decoder.config  # type: ignore[assignment]
        return config

    def forward(self, ids: torch.Tensor, on_call: Callable[[AttentionCall], None]) -> None:
        """Runs the decoder on token ids (B, n), padded on the right; `on_call` may raise `ForwardDone`.

        No attention mask is given: under a causal mask no valid position sees the padding behind it.
        """
        attention = banded() if self.banded_attention else nullcontext()
        with torch.inference_mode(), attention, self.tapped(on_call), suppress(ForwardDone):
            self.decoder(input_ids=ids.to(self.device), use_cache=False)

    @contextmanager
    def tapped(self, on_call: Callable[[AttentionCall], None]) -> Iterator[None]:
        """Opens the tap for forwards that the caller runs."""
        with tap(self.attention_layers, on_call, family=self.family, pre_rope=self.pre_rope):
            yield

    def probe(self) -> list[LayerFacts]:
        """Every layer as the model itself calls it, seen in a forward over two tokens; sorted by layer.

        Raises:
            CaptureError: no attention call was seen, or a layer makes several.
        """
        facts: dict[int, LayerFacts] = {}

        def look(call: AttentionCall) -> None:
            if call.layer in facts:
                raise CaptureError(
                    f"{_model_type(self.decoder)}: layer {call.layer} calls attention more than once a forward, so "
                    "that its query and key are not one vector a head and position; this is not supported"
                )
            facts[call.layer] = _layer_facts(call)

        self.forward(torch.arange(1, PROBE_TOKENS + 1)[None], look)
        if not facts:
            raise CaptureError(
                f"nothing can be captured from {_model_type(self.decoder)} ({type(self.decoder).__name__}): no "
                "self-attention layer called transformers' attention interface. Its attention is its own, it has no "
                "softmax attention, or the model was compiled. A family can serve it: model.family=package.module:Class"
            )
        return [facts[layer] for layer in sorted(facts)]

    def rotary_parameters(self) -> dict[str, Any]:
        """What the rotary embedding is made of: inverse frequencies, attention scaling, the config's parameters."""
        embeddings = {}
        for name, module in self.decoder.named_modules():
            if "Rotary" not in type(module).__name__:
                continue
            values: dict[str, Any] = {
                key: buffer.double().tolist()
                for key, buffer in module.named_buffers(recurse=False)
                if key.endswith("inv_freq") and "original" not in key
            }
            values |= {key: value for key, value in vars(module).items() if key.endswith("attention_scaling")}
            embeddings[name] = values
        return {"rope_parameters": getattr(self.config, "rope_parameters", None), "embeddings": embeddings}


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
    _refuse_missing(str(config.name), model, decoder, info)
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
    source: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.gguf_file is not None:
        source["gguf_file"] = config.gguf_file
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
    whole = AutoConfig.from_pretrained(str(config.name), **source)
    text = whole.get_text_config()
    family = find_family(text.model_type, config.family)
    if text is not whole:
        # A multimodal checkpoint: its decoder alone is built and read, under the names that it has inside the whole.
        source = source | {"key_mapping": family.inside}
        if (quantization := getattr(whole, "quantization_config", None)) is not None:
            text.quantization_config = quantization
    return with_overrides(text, config.config_overrides), family, source


def _loaded(config: ModelConfig, source: dict[str, Any]) -> tuple[PreTrainedModel, Family, dict[str, Any]]:
    model_config, family, source = _read_config(config, source)
    model, info = getattr(transformers, family.auto_class).from_pretrained(
        config.name,
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


def with_overrides(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """`config` with `overrides` merged into it, dict by dict.

    A `rope_scaling`, the older spelling, is merged into `rope_parameters`: given to transformers beside a
    `rope_theta` it would drop the latter.

    Raises:
        ConfigError: a top-level key that the model's config does not have.
    """
    if not overrides:
        return config
    overrides = dict(overrides)
    scaling = overrides.pop("rope_scaling", None)
    if scaling is not None:
        scaling = dict(scaling)
        if "type" in scaling:
            scaling["rope_type"] = scaling.pop("type")
        overrides["rope_parameters"] = _merge(scaling, overrides.get("rope_parameters") or {})
    values = config.to_dict()
    unknown = sorted(set(overrides) - set(values))
    if unknown:
        raise ConfigError(
            [
                f"model.config_overrides.{key}: the {config.model_type} config has no such key; it has "
                f"{', '.join(sorted(values))}"
                for key in unknown
            ]
        )
    merged: PretrainedConfig = type(config).from_dict(_merge(values, overrides))
    return merged


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
        raise SourceError(
            f"{where} cannot be loaded: {_first_line(text)} Give model.name a Hub id (org/name) or a local folder "
            "with config.json; private and gated models need HF_TOKEN, an offline machine a cached copy"
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


def _refuse_missing(name: str, model: nn.Module, decoder: nn.Module, info: dict[str, Any]) -> None:
    prefixes = [prefix for prefix, module in model.named_modules() if module is decoder]
    prefix = f"{prefixes[0]}." if prefixes and prefixes[0] else ""
    bad = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    bad += sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise SourceError(
            f"model {name}: its checkpoint lacks, or has in another shape, {len(bad)} weights of the decoder: {shown}. "
            "They would be random, so nothing is captured; check that the checkpoint is whole and that "
            "model.config_overrides does not change its shapes"
        )


def _refuse_shared_indices(layers: dict[nn.Module, int]) -> None:
    indices = sorted(layers.values())
    repeated = sorted({index for index in indices if indices.count(index) > 1})
    if repeated or (indices and indices[0] < 0):
        raise CaptureError(
            f"several attention modules say that they are layer {repeated or indices[0]}: which is which cannot be "
            "told; a family can tell them apart: model.family=package.module:Class"
        )


def _layer_facts(call: AttentionCall) -> LayerFacts:
    head_dim = call.query.shape[-1]
    return LayerFacts(
        LayerHeads(
            layer=call.layer,
            num_q_heads=call.query.shape[1],
            num_k_heads=call.key.shape[1],
            head_dim=head_dim,
            sliding_window=call.sliding_window,
        ),
        softmax_scale=head_dim**-0.5 if call.softmax_scale is None else float(call.softmax_scale),
        softcap=call.softcap,
        sinks=None if call.sinks is None else call.sinks.double().tolist(),
    )


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _model_type(decoder: nn.Module) -> str:
    return str(getattr(getattr(decoder, "config", None), "model_type", type(decoder).__name__))


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].rstrip(".") + "."
