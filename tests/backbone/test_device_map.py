"""A model on several devices has the same vectors as on one device. Here the second device is the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import hashes, run

from qk_sniffer.backbone.devices import check_devices
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError

pytestmark = pytest.mark.floor

PLACES = ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2")


def placed(*on_disk: str) -> dict[str, str]:
    return {name: "disk" if name in on_disk else "cpu" for name in PLACES}


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (
            "cuda",
            r"model\.device_map is 'cuda', but torch can use no cuda device here.*; set model\.device_map to",
        ),
        (
            {"embed_tokens": "cpu", "layers": 3},
            r"is \{embed_tokens: 'cpu', layers: 3\}, but torch can use no cuda device",
        ),
        ("gpu", r"'gpu' is no device; valid: auto, cpu, cuda, cuda:0"),
    ],
)
@pytest.mark.parametrize("load", [load_backbone, check_model])
def test_a_device_that_this_machine_lacks_is_refused(
    load: Callable[[ModelConfig], object],
    device_map: Any,
    message: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig(name=str(checkpoint), device_map=device_map))


def test_a_number_above_those_of_the_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    check_devices({"layers": "cuda:1", "norm": 0, "embed_tokens": "cuda"})
    with pytest.raises(ConfigError, match="but torch can use 2 cuda devices here, numbered from 0"):
        check_devices("cuda:2")
