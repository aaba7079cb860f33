"""Families whose attention does not use the interface, and models that no family serves."""

from typing import Any

import pytest
import torch
from recording import recorded
from tiny_configs import tiny_config
from torch import nn
from torch.nn import functional
from transformers import AutoModel

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.banded_attention import Band
from qk_sniffer.backbone.family import Family, find_family
from qk_sniffer.backbone.tap import AttentionCall, ForwardDone
from qk_sniffer.capture.selection import select
from qk_sniffer.config import CaptureConfig
from qk_sniffer.errors import CaptureError, ConfigError

OWN_ATTENTION = ["bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "openai-gpt"]


def decoder_of(model_type: str, **options: Any) -> nn.Module:
    config = tiny_config(model_type)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    # Older versions of transformers give Doge no causal mask for other kernels.
    kernel = "eager" if model_type == "doge" else None
    decoder: nn.Module = AutoModel.from_config(config, attn_implementation=kernel).eval().get_decoder()
    return decoder


def ids(length: int = 24) -> torch.Tensor:
    return torch.randint(5, 100, (2, length), generator=torch.Generator().manual_seed(1))


def captured(backbone: Backbone, tokens: torch.Tensor) -> list[AttentionCall]:
    seen: list[AttentionCall] = []
    backbone.forward(tokens, seen.append)
    return seen


@pytest.mark.few(3)
@pytest.mark.parametrize("model_type", OWN_ATTENTION)
@pytest.mark.parametrize("error", [ForwardDone, ZeroDivisionError])
def test_an_attention_of_its_own_is_put_back_also_after_an_exception(model_type: str, error: Any) -> None:
    decoder = decoder_of(model_type)
    kernel = functional.scaled_dot_product_attention
    attributes = {module: set(vars(module)) for module in decoder.modules()}

    def leave(call: AttentionCall) -> None:
        if call.layer == 2:
            raise error

    backbone = Backbone(decoder, find_family(model_type))
    if error is ForwardDone:
        backbone.forward(ids(), leave)
    else:
        with pytest.raises(ZeroDivisionError):
            backbone.forward(ids(), leave)
    assert functional.scaled_dot_product_attention is kernel
    assert {module: set(vars(module)) for module in decoder.modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
    assert [call.layer for call in captured(backbone, ids())] == [0, 1, 2, 3]


@pytest.mark.parametrize("model_type", OWN_ATTENTION)
def test_an_attention_of_its_own_is_captured_in_bfloat16_too(model_type: str) -> None:
    decoder = decoder_of(model_type).to(torch.bfloat16)
    with torch.inference_mode():
        expected, _ = recorded(decoder, ids())
    seen = captured(Backbone(decoder, find_family(model_type)), ids())
    for call, own in zip(expected, seen, strict=True):
        assert torch.equal(own.query.float(), call.query.float())
        assert torch.equal(own.key.float(), call.key.float())


def test_newer_falcon_models_have_their_key_heads_back() -> None:
    decoder = decoder_of("falcon", new_decoder_architecture=True, num_kv_heads=2)
    with torch.inference_mode():
        expected, _ = recorded(decoder, ids())
    seen = captured(Backbone(decoder, find_family("falcon")), ids())
    for call, own in zip(expected, seen, strict=True):
        assert own.key.shape[1] == 2 and call.key.shape[1] == 4
        assert torch.equal(own.query, call.query)
        assert torch.equal(own.key.repeat_interleave(2, dim=1), call.key)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_an_encoder_is_refused_because_it_sees_padding(kernel: str) -> None:
    decoder: Any = decoder_of("bert", is_decoder=False)
    decoder.set_attn_implementation(kernel)
    with pytest.raises(CaptureError, match=r"BertSelfAttention is not causal.*config_overrides.is_decoder=true"):
        Backbone(decoder, Family()).probe()
    assert len(Backbone(decoder_of("bert"), Family()).probe()) == 4


def test_a_decoder_whose_mask_alone_makes_it_causal_is_captured() -> None:
    decoder = decoder_of("bigbird_pegasus")
    assert not any(getattr(module, "is_causal", False) for module in decoder.modules())
    assert len(Backbone(decoder, Family()).probe()) == 4


def test_keys_that_are_not_one_a_token_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"DeepseekV4Attention attends with 24 queries to \d+ keys"):
        captured(Backbone(decoder_of("deepseek_v4"), Family()), ids())
    with pytest.raises(CaptureError, match="compressed keys"):
        Backbone(decoder_of("deepseek_v4"), find_family("deepseek_v4"))


def test_a_decoder_that_does_not_run_on_token_ids_is_refused_with_its_reason() -> None:
    with pytest.raises(CaptureError, match=r"xmod: its decoder does not run.*Input language unknown"):
        Backbone(decoder_of("xmod", default_language=None), Family()).probe()


def test_several_stacks_that_number_their_layers_alike_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"blt: layer 0 .* several attention modules name this layer as theirs"):
        Backbone(decoder_of("blt"), Family()).probe()


def test_the_two_attentions_of_one_query_and_key_are_one_call() -> None:
    assert [call.layer for call in captured(Backbone(decoder_of("diffllama"), Family()), ids())] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [("zamba", [1, 3]), ("zamba2", [1, 3]), ("hrm_text", list(range(32))), ("longcat_flash", list(range(8)))],
)
def test_layers_are_numbered_as_their_key_value_cache_numbers_them(model_type: str, layers: list[int]) -> None:
    decoder: Any = decoder_of(model_type)
    facts = Backbone(decoder, find_family(model_type)).probe()
    assert [fact.heads.layer for fact in facts] == layers
    cache = decoder(input_ids=ids(), use_cache=True).past_key_values
    filled = [layer for layer, states in enumerate(cache.layers) if getattr(states, "keys", None) is not None]
    assert filled == layers


def fact_by_layer(backbone: Backbone, fact: str) -> list[Any]:
    return [getattr(call, fact) for call in captured(backbone, ids())]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("model_type", "windows"),
    [("qwen2", [None, 8] * 2), ("qwen2_moe", [None, 8] * 2), ("qwen3", [None, 8] * 2), ("phimoe", [8] * 4)],
)
def test_a_window_is_recorded_also_where_the_kernel_is_not_told_of_it(
    model_type: str, windows: list[int | None], kernel: str
) -> None:
    decoder: Any = decoder_of(model_type)
    decoder.set_attn_implementation(kernel)
    assert fact_by_layer(Backbone(decoder, find_family(model_type)), "sliding_window") == windows


def test_without_its_window_phimoe_attends_fully() -> None:
    backbone = Backbone(decoder_of("phimoe", sliding_window=None), find_family("phimoe"))
    assert fact_by_layer(backbone, "sliding_window") == [None] * 4


def test_a_window_that_nothing_declares_is_refused() -> None:
    backbone = Backbone(decoder_of("phimoe"), Family())
    with pytest.raises(
        CaptureError, match=r"PhimoeAttention .* window of 8 tokens, but no window is declared: a family can"
    ):
        captured(backbone, ids())


@pytest.mark.parametrize(
    ("model_type", "sparse"),
    [
        ("deepseek_v32", [True] * 4),
        ("hy_v4", [True] * 4),  # its last two layers see the keys that the second one selects
        ("minimax_m3_vl_text", [True, False] * 2),
        ("doge", [True] * 4),
        ("mistral", [False] * 4),
    ],
)
def test_a_layer_says_whether_it_sees_only_some_keys(model_type: str, sparse: list[bool]) -> None:
    backbone = Backbone(decoder_of(model_type), find_family(model_type))
    assert [fact.sparse_attention for fact in backbone.probe()] == sparse


def test_texts_of_doge_whose_queries_do_not_keep_every_key_run_alone() -> None:
    backbone = Backbone(decoder_of("doge", keep_window_size=20, sliding_window=None), find_family("doge"))
    for module in backbone.attention_layers:
        module.A.data.fill_(0.5)
        module.keep_window_size = 20
    text = ids(20).repeat(1, 2)  # each token twice: equal biases in the first layer

    def last_keys(tokens: torch.Tensor, n: int) -> torch.Tensor:
        return captured(backbone, tokens)[-1].key[:, :, :n]

    assert backbone.length_boundary == 20
    assert torch.allclose(last_keys(text[:, :20], 20), last_keys(text, 20), atol=1e-4)
    padded = torch.cat([text, torch.zeros(2, 24, dtype=torch.long)], dim=1)
    assert not torch.allclose(last_keys(text, 40), last_keys(padded, 40), atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "full"),
    [
        ("llama4_text", [1, 3]),
        ("minimax_m3_vl_text", [1, 3]),
        ("gemma3_text", [1, 3]),
        ("deepseek_v32", []),
        ("llama", [0, 1, 2, 3]),
    ],
)
def test_full_attention_only_keeps_the_layers_that_hide_no_key(model_type: str, full: list[int]) -> None:
    layers = [fact.heads for fact in Backbone(decoder_of(model_type), find_family(model_type)).probe()]
    assert [layer.layer for layer in layers if layer.full_attention] == full
    capture = CaptureConfig(full_attention_only=True)
    if full:
        assert sorted({layer for layer, _, _ in select(layers, capture)}) == full
    else:
        with pytest.raises(ConfigError, match=r"every layer of the model hides earlier keys .*full attention: none"):
            select(layers, capture)


def test_attention_of_an_unknown_kind_is_not_full() -> None:
    decoder: Any = decoder_of("llama")
    decoder.config.layer_types = ["full_attention", "another_attention"] * 2
    facts = Backbone(decoder, Family()).probe()
    assert [fact.heads.full_attention for fact in facts] == [True, False] * 2


@pytest.mark.parametrize(
    ("model_type", "options", "biased"),
    [
        ("bloom", {}, True),
        ("doge", {}, True),
        ("inkling_text", {}, True),
        ("falcon", {"alibi": True}, True),
        ("falcon", {"alibi": False}, False),
        ("mistral", {}, False),
    ],
)
def test_a_layer_says_whether_a_bias_is_added_to_its_logits(
    model_type: str, options: dict[str, Any], biased: bool
) -> None:
    facts = Backbone(decoder_of(model_type, **options), find_family(model_type)).probe()
    assert {fact.position_bias for fact in facts} == {biased}


def test_a_band_can_be_asked_for_whole_and_for_no_part() -> None:
    band = Band(8)
    assert band[:, :, slice(0, None), :] is band
    with pytest.raises(TypeError, match="a part of a band"):
        band[:, :, -1:, :]
