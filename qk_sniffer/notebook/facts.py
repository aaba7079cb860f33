"""Describes a capture in Python: its settings, the user's model, and the heads that are captured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.capture.selection import Selection
from qk_sniffer.config import Config
from qk_sniffer.jobs.loaded_code import class_and_code
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
    model_name: str | None
    """The Hub id or folder that the model was loaded from; None if its config names none."""
    model_commit: str | None
    """The commit on the Hub that it was loaded at; None if its config names none."""
    adapter: Mapping[str, Any] | None
    """The settings of the active adapter of the package peft, as plain data; None without one."""

    @property
    def both_stages(self) -> bool:
        """Whether passes must show queries and keys before RoPE and after it."""
        return len(stages_shown(self.config)) == 2

    @property
    def model(self) -> dict[str, Any]:
        """The facts of the model, in the form of `model` in a manifest."""
        backbone = self.backbone
        layers = []
        for layer in self.layers:
            chosen = {kind: list(heads) for number, kind, heads in self.selection if number == layer.heads.layer}
            layers.append(layer.to_dict() | {"captured": chosen})
        return {
            "decoder": class_and_code(type(backbone.decoder)),
            "family": class_and_code(type(backbone.family)),
            "attn_implementation": backbone.config._attn_implementation,
            "model_type": backbone.config.model_type,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "checkpoint_dtype": backbone.stored.dtype,
            "quantization": backbone.stored.describe_quantization(backbone.decoder),
            "rope_stage": "pre" if backbone.pre_rope else "post",
            "num_layers": backbone.num_layers,
            "layers": layers,
            "rotary": backbone.rotary_parameters(),
            "max_positions": backbone.max_positions,
        }


def stages_shown(config: Config) -> set[str]:
    """Returns the stages of queries and keys that rows and statistics are of."""
    statistics = config.capture.statistics
    return {"pre" if config.capture.capture_pre_rope else "post", *(statistics.stages if statistics.enabled else ())}
