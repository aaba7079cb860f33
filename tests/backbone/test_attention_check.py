"""Tests the check of attention kernels: right kernels pass in every family, and wrong ones are named."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.backbones import FolderOf, loaded
from support.kernels import of_another_head, overflowing_from, without_keys_from, wrong_kernel
from support.zoo import CASES, CASES_AND_KERNELS, Case, ids

from qk_sniffer.backbone import exact_attention
from qk_sniffer.backbone.attention_check import AttentionCheck, positions
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.layers import LayerFacts, LayerHeads
from qk_sniffer.backbone.tap import AttentionCall, KernelRun

KINDS = ("qwen2", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4", "deepseek_v3")
"""Shared key heads, sliding windows, softcap, two kinds, sinks, chunks, and values narrower than keys."""

QWEN3 = next(case for case in CASES if case.name == "qwen3_sliding")


def checked(backbone: Backbone, tokens: torch.Tensor, facts: list[LayerFacts] | None = None) -> list[dict[str, Any]]:
    """The checks of one forward pass."""
    check = AttentionCheck(facts or backbone.probe(), backbone.family, backbone.dtype).of(tokens.shape[1])
    assert check is not None
    backbone.forward(tokens, lambda call: None, check.see)
    return check.finish()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("case", "kernel", "dtype"),
    [
        pytest.param(
            case,
            kernel,
            dtype,
            id=f"{case.name}-{kernel}-{dtype}",
            marks=[] if case.name in KINDS and dtype == "float32" else pytest.mark.slow,
        )
        for case, kernel in CASES_AND_KERNELS
        for dtype in ("float32", "bfloat16", "float16")
    ],
)
def test_right_kernels_pass(case: Case, kernel: str, dtype: str, folder_of: FolderOf) -> None:
    backbone = loaded(folder_of(case), kernel=kernel, dtype=dtype)
    facts = backbone.probe()
    kinds = {(layer.heads.sliding_window, layer.attention_chunk) for layer in facts}
    checks = checked(backbone, ids(batch=2, length=40), facts)
    assert len(checks) == len(kinds) and {check["passed"] for check in checks} == {True}
    limit = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003}[dtype]
    assert max(check["largest_difference"] for check in checks) < limit
    for check in checks:
        assert check["positions"][0] == 0 and check["positions"][-1] == 39 and check["wrong_positions"] == []


@pytest.mark.parametrize("banded", [True, False])
def test_a_kernel_that_drops_late_keys_is_wrong_at_late_positions(banded: bool, folder_of: FolderOf) -> None:
    backbone = loaded(folder_of(QWEN3))
    backbone.banded_attention = banded
    with wrong_kernel(without_keys_from(20)):
        sliding, full = checked(backbone, ids(length=40))
        assert checked(backbone, ids(length=20))[0]["passed"]
    assert (sliding["layer"], sliding["kind"]) == (0, "a sliding window of 12")
    assert (full["layer"], full["kind"]) == (1, "full attention")
    for check in (sliding, full):
        assert check["passed"] is False and check["largest_difference"] > 0.1
        assert check["wrong_positions"] == [at for at in check["positions"] if at >= 20]


def test_other_faults_are_found(folder_of: FolderOf, caplog: pytest.LogCaptureFixture) -> None:
    backbone = loaded(folder_of(QWEN3))
    with wrong_kernel(overflowing_from(39)):
        sliding = checked(backbone, ids(length=40))[0]
    assert sliding["passed"] is False and sliding["largest_difference"] is None and 39 in sliding["wrong_positions"]
    assert "layer 0: the attention kernel is wrong at positions" in caplog.text
    with wrong_kernel(of_another_head):
        assert checked(backbone, ids(length=40))[1]["wrong_positions"] == [0, 10, 20, 30, 38, 39]


@pytest.mark.parametrize("name", ["qwen3_sliding", "llama4"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_reach_that_differs_by_one_position_is_found(name: str, change: int, folder_of: FolderOf) -> None:
    backbone = loaded(folder_of(next(case for case in CASES if case.name == name)))
    layer = backbone.probe()[0]
    if layer.attention_chunk is not None:
        other = replace(layer, attention_chunk=layer.attention_chunk + change)
    else:
        assert layer.heads.sliding_window is not None
        other = replace(layer, heads=replace(layer.heads, sliding_window=layer.heads.sliding_window + change))
    assert checked(backbone, ids(length=40), [layer])[0]["passed"] is True
    assert checked(backbone, ids(length=40), [other])[0]["passed"] is False


def test_each_text_that_is_longer_than_the_earlier_ones_is_checked() -> None:
    check = AttentionCheck([layer()], Family(), torch.float32)
    assert [check.of(length) is not None for length in (30, 30, 20, 31, 40, 39)] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]


def layer(window: int | None = None, chunk: int | None = None) -> LayerFacts:
    heads = LayerHeads(layer=0, num_q_heads=2, num_k_heads=1, head_dim=4, sliding_window=window)
    return LayerFacts(heads, chunk, 0.5, None, None, position_bias=False, sparse_attention=False)


def test_positions_are_the_ends_the_middle_the_boundary_and_the_edges() -> None:
    assert positions(131_072, layer()) == [0, 4096, 32_768, 65_536, 98_304, 131_070, 131_071]
    assert positions(131_072, layer(window=512)) == [0, 511, 512, 513, 65_536, 131_070, 131_071]
    assert positions(100_000, layer(chunk=8192)) == [0, 8191, 8192, 8193, 50_000, 65_536, 98_304, 99_998, 99_999]
    assert positions(10, layer(window=512)) == [0, 5, 8, 9]
    assert positions(1, layer()) == [0]


def long_run(length: int, facts: LayerFacts, **arguments: Any) -> KernelRun:
    """A run over random vectors whose output is right at the positions to check."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 4, generator=draw) for heads in (2, 1, 1))
    output = torch.zeros(1, length, 2, 4)
    for at in positions(length, facts):
        first = max(0, at + 1 - (facts.heads.sliding_window or length))
        logits = (query[0, :, at].double() @ key[0, 0, first : at + 1].double().T) * 0.5
        output[0, at] = (logits.softmax(-1) @ value[0, 0, first : at + 1].double()).float()
    off = dict.fromkeys(("position_bias", "sparse_attention", "hides_keys"), False)
    call = AttentionCall(0, query, key, None, None, 0.5, None, None, **off, attended=(query, key), arguments={})
    return KernelRun(call, query, key, value, None, {"scaling": 0.5, "dropout": 0.0} | arguments, output)


def result(run: KernelRun, facts: LayerFacts) -> dict[str, Any]:
    check = AttentionCheck([facts], Family(), torch.float32).of(run.query.shape[2])
    assert check is not None
    check.see(run)
    (only,) = check.finish()
    return only


@pytest.mark.parametrize("window", [None, 1000])
def test_a_long_text_is_checked_piece_by_piece(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = layer(window)
    monkeypatch.setattr(exact_attention, "PIECE_BYTES", 1 << 17)  # 2,048 keys
    run = long_run(70_000, facts)
    assert result(run, facts)["passed"] is True
    run.output[0, 65_536, 1] = 0.0  # one head
    wrong = result(run, facts)
    assert wrong["passed"] is False and wrong["wrong_positions"] == [65_536] and wrong["tokens"] == 70_000


def test_what_is_beyond_float16_is_no_fault_of_the_kernel() -> None:
    facts = layer()
    run = long_run(9, facts)
    large = replace(run, query=run.query * 1e5, output=run.output.clone())
    for at in positions(9, facts):
        logits = large.query[0, :, at].double() @ large.key[0, 0, : at + 1].double().T * 0.5
        large.output[0, at] = (logits.softmax(-1) @ run.value[0, 0, : at + 1].double()).float()
    check = AttentionCheck([facts], Family(), torch.float16).of(9)
    assert check is not None
    check.see(large)
    assert check.finish()[0]["passed"] is True
    run.value[0, 0, 0, 0] = torch.inf
    run.output[..., 0] = torch.inf
    assert result(run, facts)["passed"] is True
    run.output[0, 8, 0, 0] = 0.0
    assert result(run, facts)["wrong_positions"] == [8]


def test_what_is_not_known_is_not_judged() -> None:
    facts = layer()
    assert result(long_run(9, facts, use_cache=False, position_ids=torch.arange(9)), facts)["passed"] is True
    for run, reason in [
        (long_run(9, facts, temperature=2.0), "its kernel has an argument temperature, whose effect is not known"),
        (
            long_run(9, facts, sinks=torch.ones(9)),
            "its kernel has an argument sinks, whose effect is not known",
        ),
        (replace(long_run(9, facts), value=None), "the values are not one for each key"),
        (replace(long_run(9, facts), output=torch.zeros(9)), "the kernel returns its output in another shape"),
        (long_run(9, facts, scaling="half"), "ValueError: could not convert string to float: 'half'"),
    ]:
        made = result(run, facts)
        assert made["passed"] is None and made["reason"] == reason
    biased = replace(facts, position_bias=True)
    assert result(long_run(9, biased), biased)["reason"] == "a bias by position is added to the logits"
    odd = replace(facts, heads=replace(facts.heads, hides_keys=True))
    assert result(long_run(9, odd), odd)["reason"] == "which earlier keys its queries see is not known"
    sparse = replace(facts, sparse_attention=True)
    assert "is not in the mask" in result(long_run(9, sparse), sparse)["reason"]


def test_a_family_without_a_kernel_of_the_interface_is_not_checked() -> None:
    class Own(Family):
        def register_tap(self, module: Any, on_query_key: Any) -> list[Any]:
            return []

    check = AttentionCheck([layer()], Own(), torch.float32).of(9)
    assert check is not None and not check.waits
    assert check.finish()[0] | {"positions": []} == {
        "layer": 0,
        "kind": "full attention",
        "tokens": 9,
        "positions": [],
        "tolerance": 1e-3,
        "passed": None,
        "reason": "this model's attention calls no kernel of transformers' attention interface",
    }
