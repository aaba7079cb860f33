"""Compares the weights that transformers has read from a checkpoint with those of the decoder."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qk_sniffer.backbone import experts
from qk_sniffer.backbone.checkpoint_weights import FLOATS, stored_shape
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.quantization import UNREADABLE
from qk_sniffer.errors import SourceError
from qk_sniffer.text import shortened

_COMPUTED = (
    r"(^|\.)rotary[^.]*\.(?!.*(weight|bias)$)"
    r"|(inv_freq|cos_cached|sin_cached|position_ids|token_type_ids|_float_tensor|version)$"
)
"""Matches tensors of older checkpoints that a model computes itself."""

_MASKS = ("bias", "masked_bias", "causal_mask", "mask", "tril")
"""The names of causal masks that older checkpoints store directly in an attention module.

A mask is a matrix or one number. A bias of that name is a vector.
"""

_QUANTIZED = r"scales?(_inv|_2)?$|(packed|qweight|qzeros|g_idx|zero_point|absmax|quant_map|SCB|blocks)$|quant_state"
"""Matches the parts of quantized weights."""

_EMBEDDINGS = r"^(?!mtp|nextn).*(emb|wpe$|project_in$)|^(pre|input)_?(layer_?)?norm"
"""Matches the modules between the token ids and the first layer, and not those of multi-token prediction."""

_WHOLE_LAYER = r"layers\\?\.\d+(\\?\.)?(\.\*)?$"
"""Matches the patterns by which classes of transformers ignore a layer that has a certain number."""

_INTEGERS_OF_WEIGHTS = r"(weight|_proj|experts?)$"
"""Matches the names of weights, among those of integer tensors that have other names in the model, or none.

The others are masks, positions and tables.
"""

_SCALE = r"scale|absmax|SCB"
"""Matches the names of the scales of weights, and those of activations."""

_OTHER_SCALE = r"(input|output|act|activation|\b[qkv])_scale"
"""Matches the names of scales of activations, which are not those of weights."""


class UnconvertedError(Exception):
    """transformers could not make weights of a model from those of its checkpoint."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(f"conversion of {shortened(sorted(names), 3)}")
        self.names = sorted(names)

    def explained(self, name: str, stored: Collection[str]) -> SourceError:
        """Returns the error for the user of the checkpoint `name`, whose files have the `stored` names."""
        lacking = experts.missing(stored)
        reason = f"it lacks {shortened(lacking, 3)}" if lacking else "their parts are missing or of another shape"
        return SourceError(
            f"model {name}: transformers cannot make {len(self.names)} weights of the model from those of its "
            f"checkpoint ({shortened(self.names, 3)}): {reason}. Check that the checkpoint is complete and that "
            "model.config_overrides does not change its shapes"
        )


@contextmanager
def unconverted_named() -> Iterator[None]:
    """Names the weights that transformers cannot make, which its own errors do not.

    Quantized weights that a checkpoint lacks are among them: random numbers cannot take their place, as they do for
    other weights.

    Raises:
        UnconvertedError: transformers has weights that it cannot convert.
    """
    original: Callable[..., Any] = PreTrainedModel._finalize_model_loading

    def finalize(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
        try:
            return original(model, load_config, loading_info)
        except RuntimeError as error:
            if names := set(loading_info.conversion_errors) or loading_info.missing_and_mismatched():
                raise UnconvertedError(names) from error
            raise

    PreTrainedModel._finalize_model_loading = staticmethod(finalize)  # type: ignore
    try:
        yield
    finally:
        PreTrainedModel._finalize_model_loading = staticmethod(original)  # type: ignore


@contextmanager
def ignored_layers_reported() -> Iterator[None]:
    """Makes transformers report the weights of layers that its classes ignore by their number.

    Such a class ignores the layers for multi-token prediction, by the number that they have in the models of its
    authors. In a deeper model, that number may be one of a layer of the decoder.
    """
    original: Callable[[PreTrainedModel, Any], None] = PreTrainedModel._adjust_missing_and_unexpected_keys

    def adjust(self: PreTrainedModel, loading_info: Any) -> None:
        patterns = set(self._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = {each for each in patterns if not re.search(_WHOLE_LAYER, each)}
        try:
            original(self, loading_info)
        finally:
            self._keys_to_ignore_on_load_unexpected = patterns

    PreTrainedModel._adjust_missing_and_unexpected_keys = adjust  # type: ignore
    try:
        yield
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = original  # type: ignore


def refuse_incomplete(
    name: str,
    model: Any,
    family: Family,
    info: Mapping[str, Any],
    stored: Mapping[Path, Mapping[str, str]],
    *,
    multimodal: bool,
    quantized: bool,
) -> None:
    """Refuses a checkpoint whose weights are not those of its decoder.

    Args:
        name: of the checkpoint.
        model: the loaded model.
        family: that of the model.
        info: the loading info of transformers.
        stored: the stored dtypes by the stored names, as in the headers of safetensors files, by the file; empty if not
            known.
        multimodal: whether the checkpoint also has the weights of other towers.
        quantized: whether a quantizer has read the weights.

    Raises:
        SourceError: the decoder has weights that the checkpoint lacks, or the checkpoint has weights that determine
            the vectors and that the decoder lacks or has read as other numbers.
    """
    decoder = family.decoder(model)
    _refuse_missing(name, model, decoder, family, info)
    _refuse_dropped(name, model, decoder, family, info, stored, multimodal=multimodal)
    dtypes = {key: dtype for one in stored.values() for key, dtype in one.items()}
    names = _Names(model, family, info, multimodal=multimodal)
    _refuse_unscaled(name, names, dtypes, quantized=quantized)
    _refuse_renumbered(name, names, dtypes)


def _refuse_missing(name: str, model: nn.Module, decoder: nn.Module, family: Family, info: Mapping[str, Any]) -> None:
    prefix = _prefix(model, decoder)
    unused = tuple(prefix + name for name in family.unused)
    wrong = {key: key for key in info["missing_keys"]}
    for key, stored, expected in info["mismatched_keys"]:
        wrong[key] = f"{key} ({list(stored)} in the checkpoint, {list(expected)} by the config)"
    bad = [wrong[key] for key in sorted(wrong) if key.startswith(prefix) and not key.startswith(unused)]
    if not bad:
        return
    way_out = "check that the checkpoint is complete and that model.config_overrides does not change its shapes"
    if len(info["missing_keys"]) >= len(model.state_dict()) and info["unexpected_keys"]:
        way_out = (
            f"it has weights of other names, such as {min(info['unexpected_keys'])}: a family can map them to the "
            "decoder's (model.family=package.module:Class, Family.key_mapping)"
        )
    raise SourceError(
        f"model {name}: its checkpoint lacks, or has in another shape, {len(bad)} weights of the decoder: "
        f"{shortened(bad, 5)}. They would be random, so nothing is captured; {way_out}"
    )


def _refuse_dropped(
    name: str,
    model: Any,
    decoder: Any,
    family: Family,
    info: Mapping[str, Any],
    stored: Mapping[Path, Collection[str]],
    *,
    multimodal: bool,
) -> None:
    kept = _Kept(model, decoder, family)

    def is_bias(key: str) -> bool:
        # In a larger model, the stored name begins with the path of the decoder.
        places = ((path, each) for path, keys in stored.items() for each in keys if f".{each}".endswith(f".{key}"))
        shapes = [stored_shape(*place) for place in places]
        return any(len(shape) == 1 and shape[0] > 1 for shape in shapes)

    base = f"{model.base_model_prefix}."
    dropped = [
        key
        for key in sorted(info["unexpected_keys"])
        if any(kept.needs(each, partial(is_bias, key)) for each in (key, key.removeprefix(base), base + key))
        or (not multimodal and kept.lacks_embedding(key, base))
    ]
    if not dropped:
        return
    raise SourceError(
        f"model {name}: its config does not ask for {len(dropped)} weights that the checkpoint has: "
        f"{shortened(dropped, 5)}. Without them the vectors would differ, so nothing is captured; "
        f"{_way_out(decoder.config, dropped)}"
    )


def _way_out(config: Any, dropped: list[str]) -> str:
    unset = [key for key, value in config.to_dict().items() if "bias" in key and value is False]
    if unset and all(key.endswith(".bias") for key in dropped):
        return "set " + " or ".join(f"model.config_overrides.{key}=true" for key in unset)
    way_out = "check that its config.json belongs to it, with quantization_config if it is quantized"
    if any(re.search(_QUANTIZED, key) for key in dropped):
        return f"{way_out}; {UNREADABLE}"
    return f"{way_out}; a family can name weights that no query or key depends on (Family.unused)"


class _Kept:
    """The modules of a decoder, and which weights of a checkpoint belong into them."""

    def __init__(self, model: Any, decoder: Any, family: Family) -> None:
        self.prefix = _prefix(model, decoder)
        self.unused = family.unused
        self.modules = dict(decoder.named_modules())
        self.attention = family.attention_layers(decoder)

    def needs(self, key: str, is_bias: Callable[[], bool]) -> bool:
        """Whether the vectors depend on a weight of the name `key`, which the decoder does not have.

        `is_bias` tells whether it is no mask, if it has the name of one.
        """
        if not key.startswith(self.prefix):
            return False
        inner = key.removeprefix(self.prefix)
        path, _, leaf = inner.rpartition(".")
        if inner.startswith(self.unused) or re.search(_COMPUTED, inner):
            return False
        owner = path
        while owner not in self.modules:
            owner = owner.rpartition(".")[0]
        module = self.modules[owner]
        if owner == "":
            return False
        is_mask = leaf in _MASKS and module in self.attention
        if owner == path and ((is_mask and not is_bias()) or leaf in module._buffers):
            return False
        # A layer that was left out has no module. An expert that was left out has none either, but is inside a layer.
        is_stack = isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in owner.split("."))
        number = inner.removeprefix(f"{owner}.").partition(".")[0]
        return not (is_stack and number.isdigit())

    def lacks_embedding(self, key: str, base: str) -> bool:
        """Whether `key`, stored with the prefix `base` of the decoder, is of what is between token ids and layers."""
        first, _, rest = key.removeprefix(base).partition(".")
        if key.startswith(base) and not rest:
            return first.endswith("_scale") and "logit" not in first
        is_lacking = key.startswith(base) and first not in self.modules
        return is_lacking and re.search(_EMBEDDINGS, first) is not None and not re.search(_COMPUTED, key)


def _refuse_unscaled(name: str, names: "_Names", dtypes: Mapping[str, str], *, quantized: bool) -> None:
    """Refuses quantized weights that were read as if their numbers were the weights themselves."""
    scaled = {key.rpartition(".")[0] for key in dtypes if re.search(_SCALE, key) and not re.search(_OTHER_SCALE, key)}

    def is_unscaled(key: str, dtype: str) -> bool:
        is_weight = names.lands_on_floats(key) or re.search(_INTEGERS_OF_WEIGHTS, key) is not None
        if quantized:  # a quantizer reads all but what lacks its scale
            has_scale = not scaled.isdisjoint((key, key.rpartition(".")[0])) and not key.endswith("bias")
            return (dtype.startswith("F8") or is_weight) and "scale" not in key and not has_scale
        return dtype.startswith("F") or is_weight

    unscaled = [
        f"{key} ({dtype})"
        for key, dtype in sorted(dtypes.items())
        if dtype not in FLOATS and is_unscaled(key, dtype) and names.is_read(key)
    ]
    if unscaled:
        lack = "no scale" if quantized else "no quantization_config in config.json that transformers can read"
        raise SourceError(
            f"model {name}: {len(unscaled)} of its weights are quantized, and there is {lack}: "
            f"{shortened(unscaled, 3)}. Their numbers are not the weights, so nothing is captured; {UNREADABLE}"
        )


def _refuse_renumbered(name: str, names: "_Names", stored: Collection[str]) -> None:
    """Refuses experts that are not numbered from zero without a gap."""
    if wrong := experts.renumbered(filter(names.is_read, stored)):
        raise SourceError(
            f"model {name}: the experts of its checkpoint are not numbered from 0 without a gap: "
            f"{shortened(wrong, 2)}. Each would be read as another one, so nothing is captured; check that the "
            "checkpoint is complete"
        )


def decoder_float(
    model: Any, family: Family, info: Mapping[str, Any], dtypes: Mapping[str, str], *, multimodal: bool
) -> str | None:
    """Returns the dtype in which most tensors of the decoder are stored; None if none is stored in floats."""
    names = _Names(model, family, info, multimodal=multimodal)
    mine = {key: dtype for key, dtype in dtypes.items() if dtype in FLOATS and names.lands_on_floats(key)}
    counted = Counter(FLOATS[dtype] for dtype in (mine or dtypes).values() if dtype in FLOATS)
    return counted.most_common(1)[0][0] if counted else None


def stored_modules(
    model: Any, family: Family, info: Mapping[str, Any], stored: Collection[str], *, multimodal: bool
) -> dict[str, str]:
    """Returns the names of the decoder's attention modules in the checkpoint, by their names in the decoder.

    A module is missing if the stored names of its weights do not begin with one name, or are not known.
    """
    decoder = family.decoder(model)
    names, prefix = _Names(model, family, info, multimodal=multimodal), _prefix(model, decoder)
    attention = family.attention_layers(decoder)
    inner = {name for name, module in decoder.named_modules() if module in attention}
    found: dict[str, set[str]] = {}
    for key in stored:
        for name in names.of(key):
            path = name.removeprefix(prefix)
            owner = path if name.startswith(prefix) and names.has(name) else ""
            while owner and owner not in inner:
                owner = owner.rpartition(".")[0]
            rest = path.removeprefix(owner)  # `.k_proj.weight`
            if owner and key.endswith(rest):
                found.setdefault(owner, set()).add(key.removesuffix(rest))
    return {owner: next(iter(each)) for owner, each in found.items() if len(each) == 1}


class _Names:
    """The names that the tensors of a checkpoint have in the loaded model."""

    def __init__(self, model: Any, family: Family, info: Mapping[str, Any], *, multimodal: bool) -> None:
        self._model = model
        self._weights = model.state_dict()
        self._modules = dict(model.named_modules())
        self._base = f"{model.base_model_prefix}."
        self._mapping = family.key_mapping or {}
        self._multimodal = multimodal
        self._unexpected = info["unexpected_keys"]
        self._ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]

    def of(self, key: str) -> set[str]:
        """Returns the names that a tensor stored as `key` may have."""
        mapped = key
        for pattern, replacement in self._mapping.items():
            mapped = re.sub(pattern, replacement, mapped)
        found = {key, mapped}
        if self._multimodal:
            found.add(re.sub(r"^.*language_model\.", "", key))
        return {name for each in found for name in (each, each.removeprefix(self._base), self._base + each)}

    def has(self, name: str) -> bool:
        """Whether the model has a tensor `name`."""
        return name in self._weights

    def lands_on_floats(self, key: str) -> bool:
        """Whether a tensor stored as `key` becomes a floating-point tensor of the model without a conversion."""
        return any(name in self._weights and not self._is_packed(name) for name in self.of(key))

    def is_read(self, key: str) -> bool:
        """Whether a tensor stored as `key` was read as numbers. The packed weights of a quantizer are not."""
        names = self.of(key)
        if any(name in self._weights and self._is_packed(name) for name in names):
            return False
        return not any(name in self._unexpected for name in names) and not any(
            pattern.search(key) for pattern in self._ignored
        )

    def _is_packed(self, name: str) -> bool:
        """Whether the tensor `name` of the model is not of floats, and is so on purpose.

        Where a quantizer reads a checkpoint, any other parameter keeps the dtype that it is stored in.
        """
        weight = self._weights[name]
        if weight.is_floating_point():
            return False
        path, _, leaf = name.rpartition(".")
        module = self._modules.get(path)
        if module is None:  # a part that a quantizer adds to the state of a weight
            return True
        parameter = module._parameters.get(leaf)
        is_plain = type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor
        is_of_model = type(module).__module__.startswith(("torch.nn.", "transformers.models.")) or (
            type(module).__module__ == type(self._model).__module__
        )
        return not (is_plain and is_of_model)


def _prefix(model: nn.Module, decoder: nn.Module) -> str:
    """Returns the prefix that the names of the decoder's weights have in `model`."""
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")
