"""Loads the text decoder of a multimodal checkpoint through the class of the whole model.

transformers keeps the conversions of a checkpoint's weights with that class: their names, and the form of experts and
fused projections. The class is built without memory, all parts except for the decoder are removed, and only then are
the decoder's weights read.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import transformers
from torch import nn
from transformers import AutoBackbone, AutoModel, PretrainedConfig, PreTrainedModel

from qk_sniffer.backbone.family import Family
from qk_sniffer.errors import SourceError

_AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTextToWaveform",
    "AutoModelForCausalLM",
    "AutoModelForPreTraining",
    "AutoModel",
)
"""The first one that knows a config names its class, if the config does not. Published weights have a head."""


_LOADER: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]


def is_wrapper(whole: PretrainedConfig, text: PretrainedConfig, family: Family) -> bool:
    """Whether the class of `whole` loads the decoder of `text`.

    It does not if the model is its own decoder, if transformers has no such class, or if `family` maps the names of the
    weights to those of the decoder alone.
    """
    own_names = family.key_mapping is not Family.key_mapping
    return text is not whole and not own_names and model_class(whole) is not None


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Returns the class of transformers that loads a model of `config`; None without one, as for own code."""
    for name in config.architectures or ():
        saved = getattr(transformers, name, None)
        if isinstance(saved, type) and getattr(saved, "config_class", None) is type(config):
            return saved
    for name in _AUTO_CLASSES:
        known = getattr(transformers, name)._model_mapping
        if type(config) in known:
            found = known[type(config)]
            cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return cls
    return None


def with_text_config(whole: PretrainedConfig, text: PretrainedConfig, new: PretrainedConfig) -> PretrainedConfig:
    """Returns a copy of `whole` with `new` in the place of `text`, which it contains at any depth.

    If the class of `whole` has a loader of its own, which reads more than its weights, this is a copy of the part of
    `whole` that contains `text`.
    """
    for key, value in vars(whole).items():
        if not isinstance(value, PretrainedConfig) or value.get_text_config() is not text:
            continue
        inner = new if value is text else with_text_config(value, text, new)
        cls = model_class(whole)
        if value is not text and (cls is None or cls.from_pretrained.__func__ is not _LOADER):  # type: ignore[attr-defined]
            return inner
        changed = deepcopy(whole)
        setattr(changed, key, inner)
        return changed
    raise SourceError(f"the config of {whole.model_type} does not contain that of its text decoder")


def load_decoder(
    config: PretrainedConfig, text: PretrainedConfig, family: Family, **arguments: Any
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """Loads the decoder of `text` inside of `config`, with the arguments of `from_pretrained`.

    Returns the decoder and transformers' loading info. The names of its weights are those of the decoder, and all other
    weights of the checkpoint are unexpected. None if the class of `config` needs a library that is not installed.

    Raises:
        SourceError: the class has no such decoder, or the decoder's weights are those of another part.
    """
    cls = model_class(config)
    assert cls is not None
    with towers_without_libraries() as lacking, _reduced(cls, text.model_type, family):
        try:
            loaded: Any = cls.from_pretrained(config=config, **arguments)
        except (AttributeError, TypeError):
            if lacking:
                return None
            raise
    model, info = loaded
    decoder, path = decoder_of(model, text.model_type, family)
    return decoder, _relative(info, f"{path}.")


@contextmanager
def _reduced(cls: type[PreTrainedModel], text_type: str, family: Family) -> Iterator[None]:
    """Removes everything except for the decoder from models of `cls` that are built inside the context."""
    original = cls.__init__
    own = "__init__" in vars(cls)

    @functools.wraps(original)
    def init(self: PreTrainedModel, *args: Any, **arguments: Any) -> None:
        original(self, *args, **arguments)
        if type(self) is cls:
            _reduce(self, text_type, family)

    cls.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            cls.__init__ = original  # type: ignore[method-assign]
        else:
            del cls.__init__


def _reduce(model: PreTrainedModel, text_type: str, family: Family) -> None:
    _, path = decoder_of(model, text_type, family)
    module: Any = model
    for name in path.split("."):
        module._is_hf_initialized = True  # transformers does not initialize the removed parts
        for parts in (module._parameters, module._buffers, module._modules):
            for other in parts:
                if other != name:
                    parts[other] = None  # the attribute remains
        module = module.get_submodule(name)
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if name in left}
    if lost := [source for source in tied.values() if source not in left]:
        raise SourceError(
            f"{type(model).__name__} of transformers ties {len(lost)} weights of its decoder to those of another part, "
            f"such as {lost[0]}: the decoder cannot be loaded alone"
        )
    model.all_tied_weights_keys = tied


def decoder_of(model: PreTrainedModel, text_type: str, family: Family) -> tuple[PreTrainedModel, str]:
    """Returns the text decoder inside `model` and its path."""
    paths = {
        module: path
        for path, module in model.named_modules()
        if path and isinstance(module, PreTrainedModel) and module.config.model_type == text_type
    }
    decoder: Any = family.decoder(model)
    if decoder not in paths:
        if not paths:
            raise SourceError(f"{type(model).__name__} of transformers has no decoder of the type {text_type}")
        decoder = next(iter(paths))
    while (inner := family.decoder(decoder)) is not decoder and inner in paths:  # a decoder with a head
        decoder = inner
    return decoder, paths[decoder]


@contextmanager
def towers_without_libraries() -> Iterator[list[str]]:
    """Puts an empty module in the place of each tower whose library is not installed, and lists what was lacking."""
    lacking: list[str] = []

    def or_empty(from_config: Any) -> Any:
        def building(config: PretrainedConfig, *args: Any, **arguments: Any) -> nn.Module:
            try:
                built: nn.Module = from_config(config, *args, **arguments)
            except ImportError as error:
                lacking.append(" ".join(str(error).split()))
                built = nn.Module()
                built.config = config  # type: ignore[assignment]
            return built

        return staticmethod(building)

    with ExitStack() as stack:
        for auto in (AutoModel, AutoBackbone):
            original = auto.from_config
            own = vars(auto).get("from_config")
            auto.from_config = or_empty(original)  # type: ignore[method-assign]
            if own is None:
                stack.callback(delattr, auto, "from_config")
            else:
                stack.callback(setattr, auto, "from_config", own)
        yield lacking


def _relative(info: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the loading info with the names that weights have inside the decoder at `prefix`."""
    return info | {
        "missing_keys": {key.removeprefix(prefix) for key in info["missing_keys"]},
        "unexpected_keys": {key.removeprefix(prefix) for key in info["unexpected_keys"]},
        "mismatched_keys": {(key.removeprefix(prefix), *shapes) for key, *shapes in info["mismatched_keys"]},
    }
