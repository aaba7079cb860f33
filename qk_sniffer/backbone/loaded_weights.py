"""Compares the weights that transformers has read from a checkpoint with those of the decoder."""

from typing import Any

from torch import nn

from qk_sniffer.backbone.family import Family
from qk_sniffer.errors import SourceError
from qk_sniffer.text import shortened


def refuse_incomplete(name: str, model: Any, decoder: Any, family: Family, info: dict[str, Any]) -> None:
    """Refuses a checkpoint whose weights are not those of its decoder.

    `info` is the loading info of transformers for `model`, and `name` that of the checkpoint.

    Raises:
        SourceError: the decoder has weights that the checkpoint lacks, or the checkpoint has weights that determine
            the vectors and that the decoder lacks.
    """
    _refuse_missing(name, model, decoder, family, info)
    _refuse_dropped(name, model, decoder, family, info)


def _refuse_missing(name: str, model: nn.Module, decoder: nn.Module, family: Family, info: dict[str, Any]) -> None:
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


def _refuse_dropped(name: str, model: Any, decoder: Any, family: Family, info: dict[str, Any]) -> None:
    """Refuses a checkpoint with weights that determine its vectors and that the decoder lacks.

    These are weights inside an attention module, and a bias of a module that has none. Masks and rotary tables of older
    checkpoints are buffers. A head, other towers and further layers are omitted on purpose.
    """
    prefix = _prefix(model, decoder)
    layers = family.attention_layers(decoder)
    modules = {prefix + path: module for path, module in decoder.named_modules()}
    attention = tuple(f"{path}." for path, module in modules.items() if module in layers)
    base = f"{model.base_model_prefix}."

    def is_needed(key: str) -> bool:
        path, _, leaf = key.rpartition(".")
        if leaf == "bias" and getattr(modules.get(path), "weight", None) is not None:
            return True
        inside = next((key.removeprefix(start) for start in attention if key.startswith(start)), "")
        return "." in inside and not inside.startswith("rotary") and not leaf.endswith("inv_freq")

    keys = sorted(info["unexpected_keys"])
    dropped = [key for key in keys if any(map(is_needed, (key, key.removeprefix(base), base + key)))]
    if not dropped:
        return
    unset = [key for key, value in decoder.config.to_dict().items() if "bias" in key and value is False]
    way_out = "check that its config.json belongs to it, with quantization_config if it is quantized"
    if unset and all(key.endswith(".bias") for key in dropped):
        way_out = "set " + " or ".join(f"model.config_overrides.{key}=true" for key in unset)
    raise SourceError(
        f"model {name}: its config does not ask for {len(dropped)} weights that the checkpoint has: "
        f"{shortened(dropped, 5)}. Without them the vectors would differ, so nothing is captured; {way_out}"
    )


def _prefix(model: nn.Module, decoder: nn.Module) -> str:
    """Returns the prefix that the names of the decoder's weights have in `model`."""
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")
