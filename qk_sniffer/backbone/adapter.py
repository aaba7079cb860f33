"""Loads an adapter of the package peft onto a decoder; one that does not fit it whole is an error that names why.

peft wraps the modules that an adapter changes. The adapter was trained on a whole model, with a head and perhaps other
towers. Its names and patterns are of that model. So peft sees the decoder inside an empty shell that gives its modules
the same names. Weights of a head or of other towers are left out, because no query or key depends on them.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from qk_sniffer.backbone.adapter_files import SETTINGS, Adapter
from qk_sniffer.backbone.patterns import refuse_runaway_patterns
from qk_sniffer.backbone.quantization import COMPUTED_IN
from qk_sniffer.backbone.unloaded import unloaded
from qk_sniffer.errors import ConfigError, QkSnifferError, SourceError
from qk_sniffer.hub.revisions import is_hub_id
from qk_sniffer.logs import logger
from qk_sniffer.text import shortened

log = logger(__name__)

_SAVED = "base_model.model."
"""The prefix that peft gives the names of the model's modules in a file."""

_HEADS = {"lm_head", "score", "classifier", "qa_outputs", "embed_out"}
"""Names of heads."""

_TOWERS = ("vision", "visual", "image", "audio", "speech", "projector", "connector", "aligner")
"""Parts of the names of other towers, and of the modules between them and the decoder."""

_ABOUT_TRAINING = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "runtime_config")
"""Keys of a config that do not matter for a loaded decoder. peft would import or load what the first three name."""

_REFUSED = {
    "alora_invocation_tokens": "acts only after some tokens of a text",
    "layer_replication": "repeats layers of its model",
    "megatron_config": "is of another library, which would be imported",
    "arrow_config": "selects among other adapters",
}
"""Keys of a config that no decoder alone can obey -> the reason."""

_CHANGES_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")
"""How the names of initializations begin that change the weights of the model by chance or by the training texts."""


def check_adapter(adapter: Adapter, name: str, config: PretrainedConfig) -> None:
    """Checks an adapter against the decoder of the model `name` with `config`, without loading the weights of either.

    Warns if the adapter was trained on a model of another name: one of the same shapes may be another model.

    Raises:
        ConfigError: the adapter is of a kind that cannot be captured.
        SourceError: the adapter does not fit the decoder.
    """
    if adapter.base and is_hub_id(adapter.base) and not Path(name).exists() and adapter.base.lower() != name.lower():
        log.warning("the adapter %s was trained on %s, and model.name is %s", adapter.name, adapter.base, name)
    settings = _peft_config(adapter)
    decoder, weights = unloaded(config), adapter.shapes()
    if decoder is None:
        return
    path, mine = _of_decoder(adapter, decoder, weights)
    _refuse_patterns(adapter, decoder, path)
    with torch.device("meta"), _quiet():
        try:
            model = _injected(decoder, path, settings)
        except Exception:  # some initializations need weights; loading raises any other error again
            return
    _refuse_others(adapter, model, mine)


def load_adapter(adapter: Adapter, decoder: nn.Module, *, merge: bool) -> None:
    """Loads an adapter onto a loaded decoder, in place. With `merge`, its weights are added to those of the decoder.

    Raises:
        ConfigError: the adapter is of a kind that cannot be captured, or cannot be merged.
        SourceError: the adapter and the decoder do not have the same modules, or not of the same shapes.
    """
    if any(weight.device.type == "meta" for weight in decoder.parameters()):
        raise ConfigError(
            [
                f"model.adapter={adapter.name} cannot be loaded onto weights that are kept on disk or in the host's "
                "memory until a forward pass needs them: set model.device_map to devices that hold the whole model"
            ]
        )
    settings = _peft_config(adapter)
    path, mine = _of_decoder(adapter, decoder, adapter.tensors())
    _refuse_patterns(adapter, decoder, path)
    with _quiet():
        try:
            model = _injected(decoder, path, settings)
            _refuse_others(adapter, model, mine)
            _load_weights(adapter, model, mine)
        except QkSnifferError:
            raise
        except Exception as error:  # any error of peft
            raise SourceError(f"the adapter {adapter.name} does not fit this model: {_in_a_line(error)}") from error
        if merge:
            try:
                model.merge_and_unload(safe_merge=True)
            except Exception as error:
                raise ConfigError(
                    [
                        f"model.merge_adapter is true, but {adapter.name} ({adapter.kind}) cannot be merged into this "
                        f"model: {_in_a_line(error)}; set model.merge_adapter=false"
                    ]
                ) from error
    decoder.eval().requires_grad_(False)


@contextmanager
def base_alone() -> Iterator[None]:
    """Keeps transformers from loading an adapter that a checkpoint holds, which it does where peft is installed.

    It would then report the adapter's missing weights instead of the checkpoint's own, which would be random.
    """
    modeling: Any = transformers.modeling_utils
    automatic: Any = transformers.models.auto.auto_factory
    with ExitStack() as changed:
        changed.callback(setattr, modeling, "maybe_load_adapters", modeling.maybe_load_adapters)
        changed.callback(setattr, automatic, "is_peft_available", automatic.is_peft_available)
        modeling.maybe_load_adapters = lambda name, _, **arguments: (None, name, arguments)
        automatic.is_peft_available = lambda: False
        yield


def _peft_config(adapter: Adapter) -> Any:
    """Returns the adapter's config as an object of peft, made from its values alone.

    Raises:
        ConfigError: it is of a kind that cannot be captured.
        SourceError: the installed peft does not know this kind, or one of its settings.
    """
    import peft
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = next((kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value == adapter.kind), None)
    if kind is None:
        raise SourceError(
            f"the adapter {adapter.name} is of the kind {adapter.kind}, which the installed peft {peft.__version__} "
            "does not know: run pip install --upgrade peft"
        )
    form = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if issubclass(form, PromptLearningConfig):
        why = "it puts virtual tokens before the text, so that positions and keys are no longer those of the text"
        raise ConfigError([_uncapturable(adapter, why)])
    known = {field.name for field in fields(form) if field.init}
    values = {key: value for key, value in adapter.settings.items() if key not in _ABOUT_TRAINING}
    if unknown := sorted(key for key, value in values.items() if key not in known and value):
        raise SourceError(
            f"the adapter {adapter.name} has settings that the installed peft {peft.__version__} does not know: "
            f"{shortened(unknown, 5)}. Run pip install --upgrade peft; if it is the newest one, remove them from "
            "adapter_config.json if they have no effect"
        )
    refused = [f"{key}: it {reason}" for key, reason in _REFUSED.items() if values.get(key)]
    initialized = str(values.get("init_lora_weights"))
    if initialized.startswith(_CHANGES_BASE):
        refused.append(
            f"init_lora_weights={initialized}: it has changed the weights of its model, and loading cannot repeat that "
            "exactly. Convert it to plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    try:
        with _quiet():
            config = form(**{key: value for key, value in values.items() if key in known} | {"inference_mode": True})
    except Exception as error:  # the values are of any type
        raise SourceError(
            f"the adapter_config.json of {adapter.name} is not understood: {_in_a_line(error)}"
        ) from error
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if config.is_adaption_prompt:
        refused.append("it adds a prompt inside attention, next to the keys of the text")
    elif tuner is None or (tuner.forward is not BaseTuner.forward and adapter.kind != "ADALORA"):
        refused.append("it changes the forward pass around the decoder")
    if refused:
        raise ConfigError([_uncapturable(adapter, why) for why in refused])
    return config


def _uncapturable(adapter: Adapter, why: str) -> str:
    return f"model.adapter={adapter.name} ({adapter.kind}) cannot be captured: {why}"


class _Shell(nn.Module):
    """Holds a decoder at a path of names, as a model with a head does."""

    is_gradient_checkpointing = False

    def __init__(self, decoder: Any, path: str) -> None:
        super().__init__()
        *outer, last = path.split(".")
        place: nn.Module = self
        for name in outer:
            place.add_module(name, nn.Module())
            place = getattr(place, name)
        place.add_module(last, decoder)
        self.config = decoder.config
        self.base_model_prefix = path
        self._embeddings = decoder.get_input_embeddings

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self._embeddings()
        return embeddings


def _injected(decoder: nn.Module, path: str, settings: Any) -> Any:
    """Returns peft's model of the decoder, whose modules it has wrapped in place."""
    from peft import PeftModel

    return PeftModel(_Shell(decoder, path) if path else decoder, settings)


def _refuse_patterns(adapter: Adapter, decoder: nn.Module, path: str) -> None:
    """Checks the patterns that peft compares with the names of modules.

    Raises:
        SourceError: one does not end.
    """
    settings = {key: value for key, value in adapter.settings.items() if key not in _ABOUT_TRAINING}
    names = (f"{path}.{name}".strip(".") for name, _ in decoder.named_modules())
    refuse_runaway_patterns(f"the {SETTINGS} of {adapter.name}", settings, names)


def _of_decoder(
    adapter: Adapter, decoder: nn.Module, weights: Mapping[str, torch.Tensor]
) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns the path that the names in the file give the decoder, and the weights that are not of other parts.

    Raises:
        SourceError: there is no such path, or several; or the adapter asks for larger weights than the file has.
    """
    largest = max((size for weight in weights.values() for size in weight.shape), default=0)
    for rank in _ranks(adapter.settings):  # peft would allocate weights of this rank before it reads the file
        if rank > largest:
            raise SourceError(
                f"the {SETTINGS} of {adapter.name} asks for the rank {rank:,}, and the largest dimension of its "
                f"weights is {largest:,}: check that its files belong together"
            )
    by_path: dict[str, list[str]] = {}
    mine, unplaced = {}, []
    for name, weight in weights.items():
        parts = name.removeprefix(_SAVED).split(".")
        if not name.startswith(_SAVED) and name.startswith("base_model."):
            mine[name] = weight  # shared by all modules
            continue
        place = next((number for number in range(len(parts)) if _is_inside(decoder, parts[number:])), None)
        outside = parts if place is None else parts[:place]
        if _HEADS & set(outside) or any(mark in part for part in outside for mark in _TOWERS):
            continue
        if place is None:
            unplaced.append(name)
            continue
        mine[name] = weight
        by_path.setdefault(".".join(outside), []).append(name)
    if mine and not by_path:
        by_path[str(getattr(decoder, "base_model_prefix", ""))] = []
    if not by_path:
        example = f", such as {min(unplaced)}" if unplaced else ": all of them are of a head or of other towers"
        raise SourceError(
            f"the adapter {adapter.name} has no weights of the modules of this decoder{example}. It was trained on "
            f"{adapter.base or 'another model'}"
        )
    if len(by_path) > 1:
        names = " and ".join(names[0] for names in by_path.values())
        raise SourceError(f"the adapter {adapter.name} has weights of several decoders: {names}")
    if unplaced:
        raise SourceError(_unmatched(adapter, unplaced))
    return next(iter(by_path)), mine


def _ranks(settings: Mapping[str, Any]) -> Iterator[int]:
    pattern = settings.get("rank_pattern")
    given = [settings.get("r"), settings.get("init_r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return (rank for rank in given if isinstance(rank, int))


def _is_inside(decoder: nn.Module, parts: list[str]) -> bool:
    """Whether a name in parts begins with that of a module of the decoder, down to a layer of a list."""
    child = dict(decoder.named_children()).get(parts[0])
    if child is None or len(parts) == 1:
        return False
    return not isinstance(child, nn.ModuleList) or parts[1].isdigit()


def _load_weights(adapter: Adapter, model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Loads the weights of the file.

    Raises:
        SourceError: the file lacks some, or has others.
    """
    from peft import set_peft_model_state_dict

    expected = _expected(model)
    # Names change on the way for some models, so that values tell what was loaded.
    for weight in expected.values():
        weight.fill_(torch.nan)
    try:
        result = set_peft_model_state_dict(model, dict(weights), ignore_mismatched_sizes=True)
    except KeyError as error:
        raise SourceError(_missing(adapter, [str(error.args[0])])) from error
    lacking = [
        name
        for name, weight in expected.items()
        if weight.isnan().any() and not (name in weights and weights[name].isnan().any())
    ]
    if lacking:
        raise SourceError(_missing(adapter, lacking))
    if result.unexpected_keys:
        raise SourceError(_unmatched(adapter, result.unexpected_keys))


def _expected(model: Any) -> dict[str, torch.Tensor]:
    """Returns the weights of the adapter in the model, by their names in a file."""
    from peft import get_peft_model_state_dict

    held = {weight.data_ptr() for weight in model.state_dict().values()}
    saved: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight for name, weight in saved.items() if weight.is_floating_point() and weight.data_ptr() in held}


def _refuse_others(adapter: Adapter, model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuses weights that have another shape than in the model, or that are not stored in floats.

    Raises:
        SourceError: the file has some.
    """
    from peft import get_peft_model_state_dict

    here = model.state_dict() | get_peft_model_state_dict(model, save_embedding_layers=False)
    quantized = [
        f"{_short(name)} ({str(weight.dtype).removeprefix('torch.')})"
        for name, weight in sorted(weights.items())
        if name in here and here[name].is_floating_point() and weight.dtype not in (*COMPUTED_IN, torch.float64)
    ]
    if quantized:
        raise SourceError(
            f"the adapter {adapter.name} has {len(quantized)} weights that are not stored in floats: "
            f"{shortened(quantized, 5)}. Their numbers are not the weights, so nothing is captured; give model.adapter "
            "the adapter as its training has saved it"
        )
    bad = [
        f"{_short(name)} ({list(weight.shape)} in the adapter, {list(here[name].shape)} by the model)"
        for name, weight in sorted(weights.items())
        if name in here and here[name].shape != weight.shape
    ]
    if bad:
        hint = ""
        if all("embed" in name for name in bad):
            hint = ". If its training has added tokens, merge it with peft and give model.name the merged model"
        raise SourceError(
            f"the adapter {adapter.name} has {len(bad)} weights of another shape than this model: {shortened(bad, 5)}. "
            f"It was trained on {adapter.base or 'another model'}{hint}"
        )


def _missing(adapter: Adapter, names: list[str]) -> str:
    return (
        f"the adapter {adapter.name} lacks {len(names)} weights that its adapter_config.json asks for: "
        f"{shortened([*map(_short, names)], 5)}. They would be random, so nothing is captured; check that its files "
        "belong together"
    )


def _unmatched(adapter: Adapter, names: list[str]) -> str:
    return (
        f"the adapter {adapter.name} has {len(names)} weights that match no module of this model: "
        f"{shortened([*map(_short, names)], 5)}. Without them the vectors would differ, so nothing is captured; it was "
        f"trained on {adapter.base or 'another model'}"
    )


def _short(name: str) -> str:
    return name.removeprefix(_SAVED).replace(".default", "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings of peft: what matters in them is an error here."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
