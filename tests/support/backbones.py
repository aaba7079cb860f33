"""Loads backbones of the zoo from files, as a job does, and captures their vectors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.config import ModelConfig
from support.zoo import CASES, Case

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

FolderOf = Callable[[Case], Path]
Vectors = dict[tuple[int, str], torch.Tensor]
"""By (layer, kind)."""


def loaded(folder: Path, *, kernel: str | None = None, dtype: str = "float32", pre_rope: bool = False) -> Backbone:
    """Returns the backbone as a job loads it."""
    config = ModelConfig(name=str(folder), dtype=dtype, device_map="cpu", attn_implementation=kernel)
    return load_backbone(config, pre_rope=pre_rope)


def captured(backbone: Backbone, tokens: torch.Tensor, kinds: str = "qk") -> Vectors:
    """Returns the vectors of some kinds."""
    seen: Vectors = {}

    def keep(layer: int, kind: str, states: torch.Tensor | None) -> None:
        if kind in kinds:
            assert (layer, kind) not in seen and states is not None
            seen[layer, kind] = states.clone()

    def keep_call(call: AttentionCall) -> None:
        for kind, states in (("q", call.query), ("k", call.key), ("v", call.value)):
            keep(call.layer, kind, states)

    backbone.forward(tokens, keep_call, on_output=lambda call, output: keep(call.layer, "o", output))
    return seen
