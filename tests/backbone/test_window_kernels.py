"""A kernel with a window serves bands if it is right for them; otherwise blocks do. torch's own is a stand-in here."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.backbones import captured
from support.flash_on_cpu import flash_on_cpu
from support.simulated_cuda import moved, simulated_cuda
from support.zoo import CASES, ids
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from qk_sniffer.backbone import window_kernels
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.window_kernels import Form, window_kernel
from qk_sniffer.capture.selection import Selection
from qk_sniffer.jobs.components import model_facts

MISTRAL = next(case for case in CASES if case.name == "mistral")
ONE_LAYER = replace(MISTRAL, options=MISTRAL.options | {"num_hidden_layers": 1})
FORM = Form(torch.device("cuda:0"), torch.bfloat16, 4, 2, MISTRAL.head_dim, MISTRAL.head_dim)
TOKENS = ids(length=40)
NO_HEADS = Selection((), 0, 0, None)


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    with simulated_cuda("at once"):
        yield


def probed(*, banded: bool = True) -> Backbone:
    backbone = Backbone(moved(ONE_LAYER.decoder(dtype=torch.bfloat16)), Family(), banded_attention=banded)
    backbone.probe()
    return backbone


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_kernels, "FINDERS", {name: window_kernels.FINDERS[name]})


@pytest.mark.parametrize("name", window_kernels.FINDERS)
def test_a_right_kernel_serves_the_bands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(name, monkeypatch)
    masked = probed(banded=False)
    expected = captured(masked, TOKENS, "o")
    with flash_on_cpu() as calls:
        backbone = probed()
        assert backbone.window_kernel is not None and backbone.window_kernel.name == name
        calls.clear()
        found = captured(backbone, TOKENS, "o")
    assert [shape[-2:] for shape in calls] == [(4, MISTRAL.head_dim)]
    torch.testing.assert_close(found[0, "o"].cpu(), expected[0, "o"].cpu(), rtol=0.02, atol=0.02)
    facts = model_facts(backbone, [], NO_HEADS)
    assert facts["window_kernel"] == name and "window_kernel" not in model_facts(masked, [], NO_HEADS)


@pytest.mark.parametrize("harm", ["a key too many", "a key too few", "no window"])
def test_a_wrong_kernel_is_not_used(
    harm: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = next(iter(window_kernels.FINDERS))
    only(name, monkeypatch)
    change = {"a key too many": 1, "a key too few": -1, "no window": 1000}[harm]
    with flash_on_cpu(lambda left, n: left + change):
        assert window_kernel({FORM: 12}) is None
    assert f"not computed by {name}: in a window of 12 tokens it differs by" in caplog.text
    assert "sliding windows are computed in blocks with masks" in caplog.text


def test_a_torch_without_the_kernel_computes_blocks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backbone = probed()  # no device but CUDA has it
    assert backbone.window_kernel is None
    assert caplog.text.count("not computed by torch") == 2 and "NotImplementedError" in caplog.text
    captured(backbone, TOKENS)


def test_the_second_kernel_serves_if_the_first_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    _, second = window_kernels.FINDERS.values()
    monkeypatch.setattr(window_kernels, "FINDERS", {"first": lambda: None, "second": second})
    with flash_on_cpu():
        kernel = window_kernel({FORM: 12})
    assert kernel is not None and kernel.name == "second"


@pytest.mark.parametrize("why", ["float32", "not banded", "another implementation"])
def test_no_kernel_is_looked_for_where_none_can_serve(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_kernels, "FINDERS", {"any": lambda: pytest.fail("it is looked for")})
    monkeypatch.setitem(AttentionInterface._global_mapping, "other", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "other", sdpa_mask)
    decoder = moved(ONE_LAYER.decoder(dtype=torch.float32 if why == "float32" else torch.bfloat16))
    if why == "another implementation":
        decoder.config._attn_implementation = "other"  # type: ignore[union-attr]
    backbone = Backbone(decoder, Family(), banded_attention=why != "not banded")
    backbone.probe()
    assert backbone.window_kernel is None


def test_calls_that_differ_from_the_checked_ones_are_left_to_blocks() -> None:
    with flash_on_cpu() as calls:
        kernel = window_kernel({FORM: 12})
        assert kernel is not None
        calls.clear()
        query, key = (torch.ones(1, heads, 20, MISTRAL.head_dim, dtype=torch.bfloat16).to("cuda:0") for heads in (4, 2))
        bias = torch.zeros(1, 4, 20, 20).to("cuda:0")
        assert kernel(query, key, key, 12, {"position_bias": bias}) is None
        assert kernel(query, key, key, 12, {"dropout": 0.1}) is None
        assert kernel(query, query, query, 12, {}) is None
        assert kernel(query.float(), key.float(), key.float(), 12, {}) is None
        assert not calls
        served = kernel(query, key, key, 12, {"dropout": 0.0, "position_bias": None, "softcap": None, "scaling": 0.5})
        assert served is not None and served.shape == (1, 20, 4, MISTRAL.head_dim) and len(calls) == 1
