"""Tests that models with modules of TorchScript are captured, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.live import LLAMA, random_ids
from torch import nn

import qk_sniffer
from qk_sniffer.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

IDS = random_ids(1, 12)


class Scaled(nn.Module):
    """An activation with weights, a mode and a number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.drop, self.scale = nn.Linear(width, width), nn.Dropout(0.5), 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.drop(self.linear(x)) * self.scale
        return scaled


COMPILED: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "script": lambda module, _: torch.jit.script(module),
    "trace": lambda module, example: torch.jit.trace(module, example),
    "frozen": lambda module, _: torch.jit.freeze(torch.jit.script(module)),
}


def with_activation(kind: str) -> tuple[Any, Any]:
    """Returns a model, and an activation of TorchScript in it."""
    model: Any = LLAMA.model()
    mlp = model.model.layers[0].mlp
    width = mlp.gate_proj.out_features
    mlp.act_fn = COMPILED[kind](Scaled(width).eval(), torch.zeros(1, 12, width))
    return model, mlp.act_fn


@pytest.mark.parametrize("kind", COMPILED)
def test_a_module_of_torchscript_is_captured_and_stays_as_it_is(kind: str) -> None:
    model, activation = with_activation(kind)
    before = model(input_ids=IDS).logits
    with qk_sniffer.capture(model) as captured:
        assert torch.equal(model(input_ids=IDS).logits, before)
        model(input_ids=IDS)
    assert len(captured.vectors(0, 0, "q").vectors) == 2 * IDS.numel()
    if kind != "frozen":
        activation.train()
        qk_sniffer.capture(model)
        assert activation.training and activation.drop.training


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda activation: setattr(activation, "scale", 3.0), "numbers", id="number"),
        pytest.param(lambda activation: nn.init.zeros_(activation.linear.weight), "weights", id="weight"),
        pytest.param(lambda activation: activation.train(), "training mode", id="mode"),
    ],
)
def test_a_changed_module_of_torchscript_is_seen(change: Callable[[Any], object], named: str) -> None:
    model, activation = with_activation("script")
    with qk_sniffer.capture(model):
        model(input_ids=IDS)
        change(activation)
        with pytest.raises(CaptureError, match=rf"the .*{named}.* changed inside the block"):
            model(input_ids=IDS)


class First(nn.Module):
    """Returns the first result of a module: a trace cannot return None."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> torch.Tensor:
        first: torch.Tensor = self.inner(*inputs)[0]
        return first


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_attention_in_torchscript_is_refused() -> None:
    model: Any = LLAMA.model()
    inner = model.model
    hidden, layer = torch.zeros(1, 12, inner.config.hidden_size), inner.layers[0]
    rotation = inner.rotary_emb(hidden, torch.arange(12)[None])
    layer.self_attn = torch.jit.trace(First(layer.self_attn), (hidden, rotation))
    with pytest.raises(CaptureError, match=r"layers\.0\.self_attn\.inner of LlamaModel is a module of TorchScript"):
        qk_sniffer.capture(model)
