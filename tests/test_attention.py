"""The tap: exact, harmless, and gone afterwards. Over every family of the zoo."""

from typing import Any

import pytest
import reference
import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface
from zoo import CASES, Case, ids

from qk_sniffer.attention import AttentionCall
from qk_sniffer.backbone import Backbone
from qk_sniffer.errors import CaptureError
from qk_sniffer.families import Family

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
both_kernels = pytest.mark.parametrize("kernel", ["eager", "sdpa"])
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

    Backbone(decoder, Family(), pre_rope=pre_rope).forward(tokens, keep)
    return seen


def received(
    model: nn.Module, tokens: torch.Tensor, monkeypatch: Any, *, pre_rope: bool
) -> dict[tuple[int, str], torch.Tensor]:
    """What the unmodified model hands to its attention kernel, or to its rotary function, found without the tap.

    The kernel, or the module's rotary function, is replaced by one that copies its arguments first; layers are
    told apart by the order of the calls.
    """
    import importlib

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = importlib.import_module(type(model).__module__)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    with monkeypatch.context() as patch:
        if pre_rope:
            rotary = module.apply_rotary_pos_emb

            def copying_rotary(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                pairs.append((q.clone(), k.clone()))
                return rotary(q, k, *args, **kwargs)

            patch.setattr(module, "apply_rotary_pos_emb", copying_rotary)
        else:
            kernel = model.config._attn_implementation
            original = module.eager_attention_forward if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]

            def copying_kernel(layer: nn.Module, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                pairs.append((q.clone(), k.clone()))
                return original(layer, q, k, *args, **kwargs)

            if kernel == "eager":
                patch.setattr(module, "eager_attention_forward", copying_kernel)
            else:
                patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kernel, copying_kernel)
        with torch.no_grad():
            model.get_decoder()(input_ids=tokens, use_cache=False)
    return {(layer, kind): pair[i] for layer, pair in enumerate(pairs) for i, kind in enumerate("qk")}


@all_cases
@both_kernels
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


@all_cases
@both_kernels
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
    for key in after:
        assert torch.equal(before[key][:, :, 0], after[key][:, :, 0])  # position 0 is turned by nothing
        assert not torch.allclose(before[key][:, :, 1:], after[key][:, :, 1:], atol=1e-3)


@all_cases
@both_kernels
@both_stages
def test_the_forward_is_the_same_with_the_tap_open(case: Case, kernel: str, pre_rope: bool) -> None:
    decoder = case.model(kernel=kernel).get_decoder()
    backbone = Backbone(decoder, Family(), pre_rope=pre_rope)
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
    backbone = Backbone(decoder, Family(), pre_rope=pre_rope)
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
    facts = Backbone(case.model().get_decoder(), Family()).probe()
    assert [fact.heads.layer for fact in facts] == [0, 1, 2]
    for fact, window in zip(facts, case.sliding_windows, strict=True):
        assert fact.heads.num_q_heads == config.num_attention_heads
        assert fact.heads.num_k_heads == config.num_key_value_heads
        assert fact.heads.head_dim == case.head_dim
        assert fact.heads.sliding_window == window
        scalar = getattr(config, "query_pre_attn_scalar", case.head_dim)
        assert fact.softmax_scale == pytest.approx(scalar**-0.5)
        assert fact.softcap is None and fact.sinks is None


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
