"""The facts of a layer explain the attention weights of eager models: reach, key heads, scale, softcap and sinks."""

import re
from typing import Any

import examine as examine_module
import pytest
import supported
import transformers
from support.eager import check_reach, check_scale_next_to_bias, check_weights, eager_backbone, layers_and_calls

TABLE = supported.TABLE.read_text()
CAPTURED = re.findall(r"^\| (\S+) \| \w+ \| yes ", TABLE, flags=re.MULTILINE)

UNSHOWN = {"falcon"}
"""Types whose own kernel returns no attention weights."""

SINKS_AFTERWARDS = {"granite_swa", "granitemoe_swa"}
"""Types whose eager kernel returns the weights before the sinks, and scales its output by them."""

BIASED_BY_CONTENT = {"doge", "inkling2_text", "inkling_text"}
"""Types whose bias follows from the text, so that two texts do not show the scale next to it."""


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "llama4_text", "minimax_m3_vl_text"])
def test_facts_give_the_attention_weights(model_type: str) -> None:
    layers = layers_and_calls(eager_backbone(model_type))
    assert len(layers) == 4
    for layer, call, weights in layers:
        check_reach(layer, weights)
        check_weights(layer, call, weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("falcon_h1", {"key_multiplier": 0.7}),
        ("gemma3_text", {"attn_logit_softcapping": 3.0}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("granite", {"attention_multiplier": 0.4}),
        ("llama4_text", {"attn_temperature_tuning": False}),
        ("olmo", {"clip_qkv": 3.0}),
        ("vaultgemma", {"attn_logit_softcapping": 5.0}),
    ],
)
def test_settings_that_change_attention_are_among_the_facts(model_type: str, options: dict[str, Any]) -> None:
    for layer, call, weights in layers_and_calls(eager_backbone(model_type, **options)):
        check_reach(layer, weights)
        check_weights(layer, call, weights)


@pytest.mark.slow
@pytest.mark.skipif(f"transformers {transformers.__version__}" not in TABLE, reason="the table is of another version")
@pytest.mark.parametrize("model_type", CAPTURED)
def test_facts_give_the_attention_weights_of_every_type(model_type: str) -> None:
    backbone, _, _ = examine_module._loaded(model_type)
    decoder = backbone.decoder
    decoder.set_attn_implementation("eager")
    layers = layers_and_calls(backbone)
    assert bool(layers) is (model_type not in UNSHOWN)
    for layer, call, weights in layers:
        check_reach(layer, weights)
        if layer["position_bias"] and model_type in BIASED_BY_CONTENT:
            continue
        if layer["position_bias"]:
            check_scale_next_to_bias(layer, call, weights)
        else:
            check_weights(layer, call, weights, without_sinks=model_type in SINKS_AFTERWARDS)
