"""A model on several devices has the same vectors as on one device. Here the second device is the disk."""

from pathlib import Path
from typing import Any

import pytest
from support.jobs import hashes, run

from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.config import ModelConfig

pytestmark = pytest.mark.floor

PLACES = ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2")


def placed(*on_disk: str) -> dict[str, str]:
    return {name: "disk" if name in on_disk else "cpu" for name in PLACES}


@pytest.mark.parametrize(
    ("on_disk", "stage"),
    [(("layers.0", "layers.2"), "after RoPE"), (("embed_tokens", "layers.1", "norm"), "before RoPE")],
)
def test_parts_of_the_model_elsewhere_change_no_bit(
    on_disk: tuple[str, ...], stage: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    capture = {"capture_pre_rope": stage == "before RoPE"}
    whole = run(checkpoint, texts, tmp_path / "whole", capture=capture)
    model: dict[str, Any] = {"device_map": placed(*on_disk)}
    parts = run(checkpoint, texts, tmp_path / "parts", capture=capture, model=model)
    assert hashes(parts) == hashes(whole)


def test_the_weights_are_where_they_should_be(checkpoint: Path) -> None:
    backbone = load_backbone(ModelConfig(name=str(checkpoint), device_map=placed("layers.1")))
    devices = [{str(weight.device) for weight in layer.parameters()} for layer in backbone.decoder.layers]
    assert devices == [{"cpu"}, {"meta"}, {"cpu"}]
    assert str(backbone.device) == "cpu"
