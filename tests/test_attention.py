"""The tap: exact, harmless, and gone afterwards. Over every family of the zoo."""

import importlib
from typing import Any

import pytest
import reference
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from zoo import CASES, CASES_AND_KERNELS, Case, ids

from qk_sniffer.attention import AttentionCall
from qk_sniffer.backbone import Backbone
from qk_sniffer.errors import CaptureError
from qk_sniffer.families import Family, find_family

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_kernels = pytest.mark.parametrize(
    ("case", "kernel"), CASES_AND_KERNELS, ids=[f"{case.name}-{kernel}" for case, kernel in CASES_AND_KERNELS]
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
both_stages = pytest.mark.parametrize("pre_rope", [False, True], ids=["post_rope", "pre_rope"])


def captured(
    decoder: nn.Module, tokens: torch.Tensor, *, pre_rope: bool = False
) -> dict[tuple[int, str], torch.Tensor]:
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def keep(call: AttentionCall) -> None:
        for kind, states in (("q", call.query), ("k", call.key)):
            assert (call.layer, kind) not in seen
            seen[call.layer, kind] = states.clone()

    Backbone(decoder, find_family(decoder.config.model_type), pre_rope=pre_rope).forward(tokens, keep)
    return seen


def received(
    model: nn.Module, tokens: torch.Tensor, monkeypatch: Any, *, pre_rope: bool
) -> dict[tuple[int, str], torch.Tensor]:
    """What the unmodified model hands to its attention kernel, or to its rotary function, found without the tap.

    The kernel, and the module's rotary function, are replaced by ones that copy their arguments first. A layer that
    reaches its kernel without a rotary call is not rotated.
    """
    module = importlib.import_module(type(model).__module__)
    turned: list[tuple[torch.Tensor, torch.Tensor]] = []
    seen: dict[tuple[int, str], torch.Tensor] = {}
    rotary = module.apply_rotary_pos_emb
    kernel = model.config._attn_implementation
    original = module.eager_attention_forward if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]

    def copying_rotary(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        turned.append((q.clone(), k.clone()))
        return rotary(q, k, *args, **kwargs)

    def copying_kernel(layer: nn.Module, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = turned.pop() if turned else (q.clone(), k.clone())
        seen[layer.layer_idx, "q"], seen[layer.layer_idx, "k"] = before if pre_rope else (q.clone(), k.clone())
        return original(layer, q, k, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "apply_rotary_pos_emb", copying_rotary)
        if kernel == "eager":
            patch.setattr(module, "eager_attention_forward", copying_kernel)
        else:
            patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kernel, copying_kernel)
        model.get_decoder()(input_ids=tokens, use_cache=False)
    return seen


@with_kernels
@both_dtypes
@both_stages
def test_captured_vectors_are_bit_for_bit_what_the_unmodified_model_computes(
    case: Case, kernel: str, dtype: torch.dtype, pre_rope: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.model(dtype=dtype, kernel=kernel)
    expected = received(model, ids(), monkeypatch, pre_rope=pre_rope)
    seen = captured(model.get_decoder(), ids(), pre_rope=pre_rope)
    assert seen.keys() == expected.keys() and len(seen) == 6
    for key, states in seen.items():
        assert states.dtype == dtype
        assert torch.equal(states, expected[key]), key


@with_kernels
@both_stages
def test_captured_vectors_agree_with_a_reference_in_float64(case: Case, kernel: str, pre_rope: bool) -> None:
    decoder = case.model(kernel=kernel).get_decoder()
    expected = reference.vectors(case, decoder, ids(), rotated=not pre_rope)
    seen = captured(decoder, ids(), pre_rope=pre_rope)
    for key, states in seen.items():
        assert states.shape == expected[key].shape
        torch.testing.assert_close(states.double(), expected[key], rtol=2e-5, atol=2e-5)


@all_cases
def test_before_and_after_the_rotary_embedding_differ(case: Case) -> None:
    decoder = case.model().get_decoder()
    before, after = captured(decoder, ids(), pre_rope=True), captured(decoder, ids())
    for layer, kind in after:
        old, new = before[layer, kind], after[layer, kind]
        assert torch.equal(old[:, :, 0], new[:, :, 0])  # position 0 is turned by nothing
        assert torch.allclose(old[:, :, 1:], new[:, :, 1:], atol=1e-3) == (layer in case.unrotated)


@with_kernels
@both_stages
def test_the_forward_is_the_same_with_the_tap_open(case: Case, kernel: str, pre_rope: bool) -> None:
    decoder = case.model(kernel=kernel).get_decoder()
    backbone = Backbone(decoder, find_family(decoder.config.model_type), pre_rope=pre_rope)
    with torch.no_grad():
        plain = decoder(input_ids=ids(), use_cache=False).last_hidden_state
        with backbone.tapped(lambda call: None):
            tapped = decoder(input_ids=ids(), use_cache=False).last_hidden_state
    assert torch.equal(plain, tapped)


@all_cases
@both_stages
def test_everything_is_put_back_also_after_an_exception(case: Case, pre_rope: bool) -> None:
    import sys

    decoder = case.model().get_decoder()
    backbone = Backbone(decoder, find_family(decoder.config.model_type), pre_rope=pre_rope)
    space = vars(sys.modules[type(decoder).__module__])
    lookup, functions = AttentionInterface.get_interface, dict(space)

    def fail(call: AttentionCall) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        backbone.forward(ids(), fail)
    assert AttentionInterface.get_interface is lookup
    assert space == functions
    assert not any(module._forward_pre_hooks for module in decoder.modules())
    assert len(captured(decoder, ids(), pre_rope=pre_rope)) == 6


@all_cases
def test_right_padding_changes_no_valid_position_beyond_rounding(case: Case) -> None:
    decoder = case.model().get_decoder()
    long, short = ids(batch=1, length=40), ids(batch=1, length=23, seed=2)
    padded = torch.cat([long, torch.nn.functional.pad(short, (0, 17))])
    together, alone = captured(decoder, padded), captured(decoder, short)
    for key, states in alone.items():
        torch.testing.assert_close(together[key][1:, :, :23], states, rtol=2e-5, atol=2e-5)


@all_cases
def test_the_probe_finds_each_layer_as_the_config_says(case: Case) -> None:
    config = case.config()
    facts = Backbone(case.model().get_decoder(), find_family(config.model_type)).probe()
    assert [fact.heads.layer for fact in facts] == [0, 1, 2]
    for fact, window in zip(facts, case.sliding_windows, strict=True):
        assert fact.heads.num_q_heads == config.num_attention_heads
        assert fact.heads.num_k_heads == getattr(config, "num_key_value_heads", 4)
        assert fact.heads.head_dim == case.head_dim
        assert fact.heads.sliding_window == window
        assert fact.softmax_scale == pytest.approx(case.softmax_scale or case.head_dim**-0.5)
        assert fact.softcap == case.softcap
        assert (None if fact.sinks is None else len(fact.sinks)) == (4 if case.sinks else None)


def test_a_model_whose_attention_is_its_own_is_refused_not_captured_empty() -> None:
    import transformers

    config = transformers.GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    with pytest.raises(CaptureError, match="nothing can be captured from gptj"):
        Backbone(transformers.AutoModel.from_config(config).eval(), Family()).probe()


def test_vectors_before_rope_are_refused_where_something_else_changes_them_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama import modeling_llama

    rotary = modeling_llama.apply_rotary_pos_emb
    decoder = CASES[0].model().get_decoder()
    backbone = Backbone(decoder, Family(), pre_rope=True)

    class Scaling(Family):
        def before_rotary(self, module, rotary_calls, query, key):  # type: ignore[no-untyped-def]
            return super().before_rotary(module, rotary_calls, query * 2, key)

    backbone.family = Scaling()
    with pytest.raises(CaptureError, match=r"capture_pre_rope=false"):
        backbone.forward(ids(), lambda call: None)
    assert modeling_llama.apply_rotary_pos_emb is rotary
