"""A model that fits one of several GPUs stays on the first one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import QWEN3, run
from support.simulated_cuda import moved, simulated_cuda
from support.zoo import ids

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.devices import FILLED, on_one_gpu
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import CaptureError


class LoadingError(Exception):
    """Ends a job where it loads its model."""


def loaded_to(free: float, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, texts: Path, root: Path) -> Any:
    """Returns the device map by which a job loads its model, on a machine with two GPUs with `free` bytes each."""

    def stop(config: ModelConfig, **_: Any) -> None:
        raise LoadingError(config.device_map)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (int(free), 1 << 40))
    monkeypatch.setattr("qk_sniffer.jobs.components.load_backbone", stop)
    with pytest.raises(LoadingError) as stopped:
        run(checkpoint, texts, root, model={"tokenizer": {"max_length": 64}})
    return stopped.value.args[0]


def test_weights_and_the_largest_forward_pass_must_fit(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_backbone(ModelConfig(name=str(checkpoint), dtype="float32", device_map="cpu")).decoder
    weights = sum(weight.nbytes for weight in decoder.parameters())
    hidden = 16_384 * decoder.config.hidden_size * 4  # type: ignore[union-attr, operator]
    job = monkeypatch, checkpoint, texts, tmp_path / "out"
    assert loaded_to((weights + hidden) / FILLED, *job) == "auto"
    assert loaded_to(weights + 50 * hidden, *job) == "cuda:0"


def test_other_device_maps_and_other_machines_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, device_map in ((0, "auto"), (1, "auto"), (2, "balanced"), (2, {"": 1}), (2, "cuda:1")):
        monkeypatch.setattr("torch.cuda.is_available", lambda count=count: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert on_one_gpu(device_map, lambda: pytest.fail("it is not asked")) == device_map
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert on_one_gpu("auto", lambda: None) == "auto"
    assert on_one_gpu("auto", lambda: 1 << 39) == "cuda:0"


@pytest.mark.parametrize("is_spread", [False, True])
def test_a_text_that_one_gpu_cannot_hold_may_fit_all(is_spread: bool) -> None:
    def failing(call: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with simulated_cuda("at once"):
        decoder = moved(QWEN3.decoder(), lambda name: "cuda:1" if is_spread and "layers.2" in name else "cuda:0")
        with pytest.raises(CaptureError, match="a single text of 9 tokens") as raised:
            Backbone(decoder, Family()).forward(ids(batch=1, length=9), failing)
    assert ("model.device_map=balanced" in str(raised.value)) is not is_spread
