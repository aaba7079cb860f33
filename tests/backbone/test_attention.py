"""The tap is exact, does not change the forward pass, and leaves no trace, for every family of the zoo."""

import sys

import pytest
import torch
from support import reference
from support.backbones import FolderOf, all_cases, captured, loaded
from support.unmodified import received, whole
from support.zoo import CASES, CASES_AND_KERNELS, Case, decoder_of, ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.errors import CaptureError

pytestmark = pytest.mark.floor

with_kernels = pytest.mark.parametrize(
    ("case", "kernel"), CASES_AND_KERNELS, ids=[f"{case.name}-{kernel}" for case, kernel in CASES_AND_KERNELS]
)
both_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
both_stages = pytest.mark.parametrize("pre_rope", [False, True], ids=["post_rope", "pre_rope"])
post_rope_first = pytest.mark.parametrize(
    "pre_rope", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["post_rope", "pre_rope"]
)


@pytest.mark.few(19)
@with_kernels
@both_dtypes
@both_stages
def test_captured_vectors_are_bit_for_bit_what_the_unmodified_model_computes(
    case: Case, kernel: str, dtype: str, pre_rope: bool, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(case)
    model = whole(case, folder, kernel=kernel, dtype=dtype)
    expected = received(model, ids(), monkeypatch, pre_rope=pre_rope)
    seen = captured(loaded(folder, kernel=kernel, dtype=dtype, pre_rope=pre_rope), ids(), "qkvo")
    assert seen.keys() == expected.keys() == {(layer, kind) for layer in case.layers for kind in "qkvo"}
    for key, states in seen.items():
        assert states.dtype == getattr(torch, dtype)
        assert torch.equal(states, expected[key]), key


@pytest.mark.few(9)
@with_kernels
@post_rope_first
def test_captured_vectors_agree_with_a_reference_in_float64(
    case: Case, kernel: str, pre_rope: bool, folder_of: FolderOf
) -> None:
    folder = folder_of(case)
    decoder = decoder_of(whole(case, folder, kernel=kernel))
    expected = reference.vectors(case, decoder, ids(), rotated=not pre_rope)
    seen = captured(loaded(folder, kernel=kernel, pre_rope=pre_rope), ids())
    assert seen.keys() == expected.keys()
    for key, states in seen.items():
        assert states.shape == expected[key].shape
        torch.testing.assert_close(states.double(), expected[key], rtol=2e-5, atol=2e-5)


@pytest.mark.few(5)
@all_cases
def test_before_and_after_the_rotary_embedding_differ(case: Case, folder_of: FolderOf) -> None:
    before, after = (captured(loaded(folder_of(case), pre_rope=pre_rope), ids()) for pre_rope in (True, False))
    for (layer, kind), new in after.items():
        old = before[layer, kind]
        assert torch.equal(old, new) == (layer in case.unrotated)
        assert torch.allclose(old[:, :, 1:], new[:, :, 1:], atol=1e-3) == (layer in case.unrotated)


@pytest.mark.few(9)
@with_kernels
@post_rope_first
def test_the_forward_is_the_same_with_the_tap_open(
    case: Case, kernel: str, pre_rope: bool, folder_of: FolderOf
) -> None:
    backbone = loaded(folder_of(case), kernel=kernel, pre_rope=pre_rope)
    decoder = backbone.decoder
    with torch.no_grad():
        plain = decoder(input_ids=ids(), use_cache=False).last_hidden_state
        with backbone.tapped(lambda call: None):
            tapped = decoder(input_ids=ids(), use_cache=False).last_hidden_state
    assert torch.equal(plain, tapped)


@pytest.mark.few(9)
@with_kernels
@post_rope_first
def test_everything_is_put_back_also_after_an_exception(
    case: Case, kernel: str, pre_rope: bool, folder_of: FolderOf
) -> None:
    backbone = loaded(folder_of(case), kernel=kernel, pre_rope=pre_rope)
    decoder = backbone.decoder
    space = vars(sys.modules[type(decoder).__module__])
    lookup, functions, kernels = AttentionInterface.get_interface, dict(space), dict(ALL_ATTENTION_FUNCTIONS)

    def fail(call: AttentionCall) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        backbone.forward(ids(), fail)
    assert AttentionInterface.get_interface is lookup
    assert space == functions
    assert dict(ALL_ATTENTION_FUNCTIONS) == kernels
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in decoder.modules())
    assert len(captured(backbone, ids())) == 2 * len(case.layers)


@pytest.mark.few(9)
@with_kernels
@post_rope_first
def test_right_padding_changes_no_valid_position_beyond_rounding(
    case: Case, kernel: str, pre_rope: bool, folder_of: FolderOf
) -> None:
    backbone = loaded(folder_of(case), kernel=kernel, pre_rope=pre_rope)
    long, short = ids(batch=1, length=40), ids(batch=1, length=23, seed=2)
    padded = torch.cat([long, torch.nn.functional.pad(short, (0, 17))])
    together, alone = captured(backbone, padded), captured(backbone, short)
    for key, states in alone.items():
        torch.testing.assert_close(together[key][1:, :, :23], states, rtol=2e-5, atol=2e-5)


@pytest.mark.few(9)
@with_kernels
def test_the_probe_finds_each_layer_as_the_config_says(case: Case, kernel: str, folder_of: FolderOf) -> None:
    config = case.config().get_text_config()
    facts = loaded(folder_of(case), kernel=kernel).probe()
    assert tuple(fact.heads.layer for fact in facts) == case.layers
    for fact in facts:
        assert fact.heads.num_q_heads == config.num_attention_heads
        assert fact.heads.num_k_heads == getattr(config, "num_key_value_heads", 4)
        assert fact.heads.head_dim == case.head_dim
        assert fact.heads.sliding_window == case.sliding_windows[fact.heads.layer]
        assert fact.softmax_scale == pytest.approx(case.softmax_scale or case.head_dim**-0.5)
        assert fact.softcap == case.softcap
        assert (None if fact.sinks is None else len(fact.sinks)) == (4 if case.sinks else None)


@pytest.mark.few(5)
@all_cases
def test_no_norm_or_bias_could_hide_a_mistake(case: Case, folder_of: FolderOf) -> None:
    for name, weight in loaded(folder_of(case)).decoder.named_parameters():
        assert weight.numel() == 1 or len(weight.unique()) > weight.numel() / 2, name


def test_a_model_whose_attention_is_its_own_is_refused_not_captured_empty() -> None:
    import transformers

    config = transformers.GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    with pytest.raises(CaptureError, match=r"attention \(GPTJAttention\) calls no kernel of"):
        Backbone(transformers.AutoModel.from_config(config).eval(), Family()).probe()


def test_vectors_before_rope_are_refused_where_something_else_changes_them_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama import modeling_llama

    rotary = modeling_llama.apply_rotary_pos_emb
    decoder = CASES[0].decoder()
    backbone = Backbone(decoder, Family(), pre_rope=True)

    class Scaling(Family):
        def before_rotary(self, module, rotary_calls, query, key):  # type: ignore[no-untyped-def]
            return super().before_rotary(module, rotary_calls, query * 2, key)

    backbone.family = Scaling()
    with pytest.raises(CaptureError, match=r"capture_pre_rope=false"):
        backbone.forward(ids(), lambda call: None)
    assert modeling_llama.apply_rotary_pos_emb is rotary
