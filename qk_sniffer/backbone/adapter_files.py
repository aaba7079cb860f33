"""Finds the files of adapters: those of `model.adapter`, and those that a `model.name` holds without being asked for.

The package peft saves an adapter as `adapter_config.json` and a file of weights. The config is data: no name, path or
class in it is loaded or imported.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from qk_sniffer.backbone.damaged_files import damage
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError, SourceError
from qk_sniffer.hub.checkpoint_files import ADAPTER_WEIGHTS
from qk_sniffer.hub.lfs import refuse_pointers
from qk_sniffer.hub.revisions import HubUnreachableError, hub_file, is_hub_id
from qk_sniffer.store import stored
from qk_sniffer.store.stored import Text
from qk_sniffer.text import path_text

SETTINGS = "adapter_config.json"
WEIGHTS, PICKLE = ADAPTER_WEIGHTS

_CONFIG = "config.json"


class _Settings(TypedDict):
    peft_type: Text
    base_model_name_or_path: NotRequired[Text | None]


@dataclass(frozen=True)
class Adapter:
    """The adapter of `model.adapter`."""

    name: str
    settings: Mapping[str, Any]
    """The content of `adapter_config.json`."""
    weights: Path

    @property
    def kind(self) -> str:
        """The kind of the adapter in the words of peft, such as LORA."""
        return str(self.settings["peft_type"])

    @property
    def base(self) -> str | None:
        """The model that the adapter was trained on, by its own account."""
        return self.settings.get("base_model_name_or_path") or None

    def facts(self) -> dict[str, str | None]:
        """Returns the facts for the manifest, which holds no path of a machine."""
        base = self.base
        return {"kind": self.kind, "base": base if base is None or is_hub_id(base) else path_text(Path(base).name)}

    def shapes(self) -> dict[str, torch.Tensor]:
        """Returns the weights on the meta device, by name.

        Raises:
            SourceError: the file cannot be read.
        """
        return self._read("meta")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the weights by name, on the CPU.

        Raises:
            SourceError: the file cannot be read.
        """
        return self._read("cpu")

    def _read(self, device: str) -> dict[str, torch.Tensor]:
        """Returns the weights on a device. On the meta device, those of a safetensors file are never read."""
        if self.weights.suffix == ".bin":
            return self._pickled(device)
        try:
            with safe_open(self.weights, "pt") as file:
                names = file.keys()
                if device == "meta":
                    return {name: torch.empty(file.get_slice(name).get_shape(), device=device) for name in names}
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error

    def _pickled(self, device: str) -> dict[str, torch.Tensor]:
        try:
            values = torch.load(self.weights, map_location=device, weights_only=True)
        except Exception as error:  # unpickling fails in any way
            raise self._unreadable(error) from error
        if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
            raise self._unreadable(TypeError("it is not a dict of tensors"))
        return values

    def _unreadable(self, error: Exception) -> SourceError:
        reason = damage(self.weights) or " ".join(str(error).split())[:300].rstrip(".")
        return SourceError(
            f"the weights of the adapter {self.name} cannot be read: {self.weights}: {reason}. Restore the file, or "
            "download the adapter again (hf download)"
        )


def adapter_of(config: ModelConfig, commit: str | None = None, adapter_commit: str | None = None) -> Adapter | None:
    """Returns the adapter of `config`; None if it asks for none and `model.name` has none.

    `commit` and `adapter_commit` pin a model and an adapter on the Hub.

    Raises:
        ConfigError: `model.name` has an adapter that `config` does not mention, peft is not installed, or the weights
            are a pickle and `model.allow_pickle` is false.
        SourceError: there is no adapter of this name.
        UnreadableError: its config is not one of peft.
    """
    _refuse_unasked(config, commit)
    return None if config.adapter is None else _found(config, adapter_commit)


def _found(config: ModelConfig, commit: str | None) -> Adapter:
    """Finds the adapter of `config`; `commit` pins one on the Hub.

    Raises:
        ConfigError: peft is not installed, or the adapter's weights are a pickle and `model.allow_pickle` is false.
        SourceError: there is no adapter of this name.
        UnreadableError: its config is not one of peft.
    """
    name = str(config.adapter)
    if importlib.util.find_spec("peft") is None:
        raise ConfigError([f"model.adapter={name} needs the package peft: run pip install peft"])
    if Path(name).is_dir():
        refuse_pointers(Path(name), SETTINGS, WEIGHTS if Path(name, WEIGHTS).is_file() else PICKLE)
    try:
        settings = _file(name, SETTINGS, commit)
        weights = None if settings is None else _file(name, WEIGHTS, commit)
        pickle = None if settings is None or weights is not None else _file(name, PICKLE, commit)
    except HubUnreachableError as unreachable:
        raise SourceError(
            f"model.adapter={name}: {unreachable}, and the local cache has no whole copy of it"
        ) from unreachable
    if settings is None:
        raise SourceError(
            f"model.adapter={name} has no {SETTINGS}: give model.adapter a folder or repository that holds an adapter "
            "of the package peft itself, not in a folder below it"
        )
    if weights is None and pickle is None:
        raise SourceError(f"model.adapter={name} has no weights: neither {WEIGHTS} nor {PICKLE} is in it")
    if weights is None and not config.allow_pickle:
        raise ConfigError(
            [
                f"model.adapter={name} has pickled weights ({PICKLE}), which can run any code when they are loaded: if "
                "you trust their author, set model.allow_pickle=true"
            ]
        )
    found = weights or pickle
    assert found is not None
    return Adapter(name, _settings(settings), found)


def _refuse_unasked(config: ModelConfig, commit: str | None) -> None:
    """Refuses a `model.name` that holds an adapter, unless `model.adapter` says what to do with it.

    `commit` pins a model on the Hub. transformers ignores such an adapter if peft is not installed, and loads it if it
    is.

    Raises:
        ConfigError: the error names the settings that capture the model with its adapter.
    """
    name = str(config.name)
    try:
        settings = _file(name, SETTINGS, commit or config.revision)
        if settings is None:
            return
        has_config = _file(name, _CONFIG, commit or config.revision) is not None
    except HubUnreachableError:
        return  # the model is loaded from the cache, without files that it does not have
    if has_config or config.gguf_file is not None:
        if config.adapter is None:
            raise ConfigError(
                [
                    f"model.name={name} holds an adapter ({SETTINGS}) next to the weights of its model: set "
                    f"model.adapter={name} to capture the model with the adapter. To capture it without, give "
                    f"model.name a copy that has no {SETTINGS}"
                ]
            )
        return
    base = _settings(settings).get("base_model_name_or_path")
    raise ConfigError(
        [
            f"model.name={name} is an adapter, not a model ({SETTINGS} without {_CONFIG}): set "
            f"model.name={base or '(the model that it was trained on)'} model.adapter={name}"
        ]
    )


def _settings(path: Path) -> dict[str, Any]:
    way_out = "give model.adapter an adapter that the package peft has saved"
    values: Any = stored.read(path, _Settings, way_out=way_out, follow_links=True)
    return dict(values)


def _file(name: str, file: str, commit: str | None) -> Path | None:
    """Returns the path of a file in a local folder or a repository; None if it is not there."""
    folder = Path(name)
    if folder.is_dir():
        path = folder / file
        return path if path.is_file() else None
    return hub_file(name, file, commit)
