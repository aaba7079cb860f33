"""What torch computes wrongly on CUDA is refused there, and nowhere else; cuDNN's kernels serve long texts alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.backbones import captured
from support.simulated_cuda import moved, simulated_cuda
from support.zoo import CASES, ids
from torch import nn

from qk_sniffer.backbone import cuda_attention
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.cuda_attention import refuse_wrong_kernel
from qk_sniffer.backbone.family import Family
from qk_sniffer.errors import CaptureError

BY_NAME = {case.name: case for case in CASES}


def backbone_on_cuda(name: str, *, kernel: str = "sdpa", banded: bool = True) -> Backbone:
    return Backbone(moved(BY_NAME[name].decoder(kernel=kernel)), Family(), banded_attention=banded)


@pytest.mark.parametrize(
    ("name", "kernel", "banded", "is_refused"),
    [
        ("llama4", "sdpa", True, True),
        ("qwen3_sliding", "sdpa", False, True),
        ("qwen3_sliding", "sdpa", True, False),  # a band is no tensor
        ("qwen3_sliding", "eager", False, False),
        ("llama", "sdpa", True, False),
    ],
)
def test_a_mask_of_too_many_scores_is_refused_under_sdpa_on_cuda(
    name: str, kernel: str, banded: bool, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda_attention.MOST_SCORES == 65_536**2
    monkeypatch.setattr(cuda_attention, "MOST_SCORES", 20**2)
    on_cpu = Backbone(BY_NAME[name].decoder(kernel=kernel), Family(), banded_attention=banded)
    captured(on_cpu, ids(length=21))
    with simulated_cuda("at once"):
        backbone = backbone_on_cuda(name, kernel=kernel, banded=banded)
        captured(backbone, ids(length=20))
        if is_refused:
            with pytest.raises(CaptureError, match=r"a mask of 21 x 21 scores, .*at most 20 tokens"):
                captured(backbone, ids(length=21))
        else:
            captured(backbone, ids(length=21))


def refused(device: str, kernel: str = "sdpa", **arguments: torch.Tensor) -> None:
    module = nn.Module()
    module.config = SimpleNamespace(_attn_implementation=kernel)  # type: ignore[assignment]
    query: Any = torch.ones(1, 2, 6, 4, dtype=torch.bfloat16).to(device)
    refuse_wrong_kernel(module, query, query, arguments)


@pytest.mark.parametrize("argument", ["attention_mask", "position_bias"])
def test_a_bias_of_another_dtype_than_queries_in_half_precision_is_refused(argument: str) -> None:
    bias = torch.zeros(1, 1, 6, 6)
    with simulated_cuda("at once"):
        with pytest.raises(CaptureError, match=r"a bias in float32 .* queries in bfloat16.*attn_implementation=eager"):
            refused("cuda:0", **{argument: bias})
        for other in (bias.bfloat16(), bias.bool()):
            refused("cuda:0", **{argument: other})
        refused("cuda:0", "eager", **{argument: bias})
        refused("cpu", **{argument: bias})


def test_the_slots_of_a_static_cache_count() -> None:
    mask = torch.zeros(1, dtype=torch.bool).expand(1, 1, 6, 1 << 30)
    with simulated_cuda("at once"), pytest.raises(CaptureError, match=r"a mask of 6 x 1,073,741,824 scores"):
        refused("cuda:0", attention_mask=mask)


def cudnn_in(backbone: Backbone, length: int) -> list[bool]:
    """Whether cuDNN may attend in each layer of a forward pass."""
    seen: list[bool] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
        for module in backbone.attention_layers
    ]
    backbone.forward(ids(length=length), lambda call: None)
    for hook in hooks:
        hook.remove()
    return seen


def test_cudnn_attends_in_long_texts_alone_and_its_setting_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_attention.CUDNN_TOKENS == 16_384
    monkeypatch.setattr(cuda_attention, "CUDNN_TOKENS", 20)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert cudnn_in(Backbone(BY_NAME["llama"].decoder(), Family()), 8) == [True] * 3
    with simulated_cuda("at once"):
        backbone = backbone_on_cuda("llama")
        assert cudnn_in(backbone, 19) == [False] * 3 and torch.backends.cuda.cudnn_sdp_enabled()
        assert cudnn_in(backbone, 20) == [True] * 3 and torch.backends.cuda.cudnn_sdp_enabled()

        def failing(call: Any) -> None:
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise ValueError

        with pytest.raises(CaptureError):
            backbone.forward(ids(length=19), failing)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
        monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: pytest.fail() if enabled else None)
        assert cudnn_in(backbone, 20) == cudnn_in(backbone, 19) == [False] * 3
