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


def captured(backbone: Backbone, tokens: torch.Tensor) -> Vectors:
    seen: Vectors = {}

    def keep(call: AttentionCall) -> None:
        for kind, states in (("q", call.query), ("k", call.key)):
            assert (call.layer, kind) not in seen
            seen[call.layer, kind] = states.clone()

    backbone.forward(tokens, keep)
    return seen
