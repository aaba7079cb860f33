"""Counts what makes the host wait for a (simulated) GPU in a forward pass that captures, beyond the plain one.

A wait costs the time that the GPU needs for all that is queued, and then the time until it has work again.
"""

from collections import Counter
from typing import Any

import pytest
from support.backbones import captured
from support.simulated_cuda import moved, simulated_cuda
from support.zoo import CASES, CASES_AND_KERNELS, Case, ids
from torch import nn

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family, find_family
from qk_sniffer.errors import CaptureError

BY_NAME = {case.name: case for case in CASES}

QUICK = {"llama eager", "gemma3 sdpa", "llama4 sdpa", "deepseek_v3 sdpa", "qwen3_moe sdpa", "gpt_oss eager"}
"""Masks, bands, chunks, latent attention whose keys are rotated in part, experts, sinks."""


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        pytest.param(case, kernel, marks=() if f"{case.name} {kernel}" in QUICK else pytest.mark.slow)
        for case, kernel in CASES_AND_KERNELS
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_capturing_waits_no_more_than_the_forward_pass(case: Case, kernel: str) -> None:
    with simulated_cuda("at once") as machine:
        decoder = moved(case.decoder(kernel=kernel))
        backbone = Backbone(decoder, find_family(decoder.config.model_type), pre_rope=True)  # type: ignore[union-attr, arg-type]

        def forward(length: int) -> None:
            backbone.forward(ids(length=length), lambda call: None, on_output=lambda *_: None, both_stages=True)

        forward(6)  # the probe, which finds the rotated parts of heads
        machine.waits.clear()
        backbone.run(ids())
        own = Counter(machine.waits)
        machine.waits.clear()
        forward(40)
    assert Counter(machine.waits) - own == Counter()


class Windowed(Family):
    """Declares a window that the model does not have."""

    def sliding_window(self, module: nn.Module, arguments: dict[str, Any]) -> int:
        return 5


def test_a_mask_on_a_gpu_is_checked_by_the_end_of_the_pass() -> None:
    with simulated_cuda("late"):
        backbone = Backbone(moved(BY_NAME["llama"].decoder(kernel="eager")), Windowed())
        with pytest.raises(CaptureError, match="attends without a window, but a window of 5 is declared"):
            captured(backbone, ids())
