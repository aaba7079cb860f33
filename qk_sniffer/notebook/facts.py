"""Describes a capture in Python: its settings, the user's model, and the heads that are captured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.capture.selection import Selection
from qk_sniffer.config import Config
from qk_sniffer.jobs.components import shows_both_stages
from qk_sniffer.notebook.model import UserBackbone


@dataclass(frozen=True)
class CaptureFacts:
    """What is known of a capture before its first forward pass."""

    config: Config
    """Its sections `sampler` and `capture` are those of the capture. `model.name` is the name in the model's config, if
    there is one; all other settings have their defaults and say nothing."""
    backbone: UserBackbone
    """The decoder of the user's model."""
    layers: list[LayerFacts]
    """All attention layers of the decoder."""
    selection: Selection
    model_commit: str | None
    """The commit on the Hub that it was loaded at; None if its config names none."""
    adapters: Mapping[str, Mapping[str, Any]]
    """The settings of the adapters of the package peft in effect, as plain data, by name; empty without any."""
    model: dict[str, Any]
    """The facts of the model, in the form of `model` in a manifest. They are of the time before the first pass: the
    user may change the model before a dataset is written."""

    @property
    def both_stages(self) -> bool:
        """Whether passes must show queries and keys before RoPE and after it."""
        return shows_both_stages(self.config.capture)
