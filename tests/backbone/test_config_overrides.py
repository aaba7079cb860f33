"""Each override of a model's config takes effect, with the values derived from it, or is refused with the way out."""

import logging
import re
from typing import Any

import pytest
import transformers
from support.tiny import CUT

from qk_sniffer.backbone.config_overrides import with_overrides
from qk_sniffer.errors import ConfigError

pytestmark = pytest.mark.floor

CONFIGS: dict[str, Any] = {
    "qwen3": transformers.Qwen3Config(**CUT | {"num_hidden_layers": 4}),
    "gemma3": transformers.Gemma3TextConfig(**CUT),
    "gpt2": transformers.GPT2Config(),
    "llama": transformers.LlamaConfig(**CUT),
    "smollm3": transformers.SmolLM3Config(**CUT | {"num_hidden_layers": 4, "pad_token_id": 0}),
    "glm": transformers.GlmConfig(**CUT, pad_token_id=0),
    "mixtral": transformers.MixtralConfig(**CUT),
}


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("llama", {"rms_norm_eps": 0.5}, {"rms_norm_eps": 0.5}),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5.0}},
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        ),
        ("llama", {"rope_theta": 5.0}, {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}),
        (
            "glm",
            {"partial_rotary_factor": 0.25},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}},
        ),
        ("gpt2", {"num_hidden_layers": 3}, {"n_layer": 3}),
        ("mixtral", {"num_experts": 4}, {"num_local_experts": 4}),
        ("qwen3", {"num_hidden_layers": 2}, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            {"sliding_window": 8, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
        ),
        ("smollm3", {"no_rope_layer_interval": 2}, {"no_rope_layers": [1, 0, 1, 0]}),
    ],
)
def test_an_override_is_what_the_config_holds_and_what_follows_from_it_does(
    name: str, overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = CONFIGS[name].to_dict()
    made = with_overrides(CONFIGS[name], overrides).to_dict()
    assert {key: made[key] for key in expected} == expected
    assert CONFIGS[name].to_dict() == before
    # Some classes keep `partial_rotary_factor` next to `rope_parameters` too.
    assert {key for key in made if made[key] != before.get(key)} <= {*overrides, *expected}


def test_a_field_that_is_a_dict_takes_free_keys() -> None:
    config = transformers.LlamaConfig(**CUT, quantization_config={"quant_method": "other", "kept": {"a": 1}})
    made = with_overrides(config, {"quantization_config": {"quant_method": "mine", "kept": {"b": 2}, "free": [1]}})
    assert made.quantization_config == {"quant_method": "mine", "kept": {"a": 1, "b": 2}, "free": [1]}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_layers": 3}, r"num_layers: the llama config has no such key; did you mean num_hidden_layers"),
    ("llama", {"xyzzy": 3}, r"xyzzy: the llama config has no such key; its keys are those of .*LlamaConfig$"),
    ("llama", {"temperature": 1.0}, r"temperature: the llama config has no such key"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: the llama config has no such key"),
    ("gpt2", {"rope_theta": 1.0}, r"rope_theta: the gpt2 config has no such key"),
    ("gpt2", {"n_layer": 3, "num_hidden_layers": 4}, r"num_hidden_layers: n_layer is the same key"),
    ("llama", {"dtype": "float32"}, r"dtype: set model\.dtype"),
    ("llama", {"attn_implementation": "eager"}, r"attn_implementation: set model\.attn_implementation"),
    ("llama", {"_attn_implementation": "eager"}, r"_attn_implementation: set model\.attn_implementation"),
    ("llama", {"_name_or_path": "x"}, r"_name_or_path: the llama config has no such key"),
    ("llama", {"model_type": "qwen3"}, r"model_type: it names the type of the checkpoint"),
    ("gemma3", {"text_config": {"num_hidden_layers": 1}}, r"text_config: .* give its keys without text_config"),
    ("llama", {"rope_parameters": None}, r"rope_parameters is None; it must be a dict"),
    ("llama", {"rope_scaling": 4.0}, r"rope_scaling is 4\.0; it must be a dict"),
    ("llama", {"hidden_size": {"a": 1}}, r"hidden_size is a dict, but it is one value \(16\)"),
    (
        "gemma3",
        {"rope_parameters": {"full_attention": 8.0}},
        r"full_attention is 8\.0, but it is a dict: give its keys",
    ),
    ("llama", {"hidden_size": "wide"}, r"LlamaConfig does not accept them: .*hidden_size"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, r"LlamaConfig does not accept them: .*factor"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarnn"}},
        r"rope_type is 'yarnn', did you mean yarn\?; valid: default, .*, yarn$",
    ),
    ("llama", {"rope_scaling": {"factor": 4.0}}, r"factor has no effect on rope_type default; give .*rope_type too"),
    ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, r"rope_theta: given in two spellings"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, r"rope_type: given in two"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"one set of rotary parameters for all"),
    ("gemma3", {"rope_theta": 5.0}, r"rope_theta: .* each kind of layer; .*rope_parameters\.full_attention"),
    (
        "gemma3",
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        r"rope_scaling\.type, rope_scaling\.factor: .* each",
    ),
    ("gemma3", {"rope_scaling": None}, r"rope_scaling is None; it must be a dict"),
    ("gemma3", {"rope_parameters": {"factor": 8.0}}, r"rope_parameters\.factor: .* each kind of layer"),
    ("gemma3", {"rope_parameters": {"full_attention": {"factor": 8.0}}}, r"full_attention\.factor has no effect"),
    (
        "llama",
        {"rope_parameters": {"attention_factor": 2.0}},
        r"rope_parameters\.attention_factor has no effect on rope_type default of llama: leave .*, or give .*rope_type",
    ),
    ("llama", {"rope_scaling": {"low_freq_factor": 2.0}}, r"low_freq_factor has no effect on rope_type default"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor has no effect on rope_type"),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 2.0}},
        r"attention_factor has no effect on rope_type linear",
    ),
    (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"beta_fast": 2.0}}},
        r"rope_parameters\.sliding_attention\.beta_fast has no effect on rope_type default of gemma3_text",
    ),
    ("qwen3", {"sliding_window": 8}, r"sliding_window is 8, but the model's config changes it to None"),
    ("qwen3", {"num_hidden_layers": 2, "layer_types": ["full_attention"]}, r"does not accept them: .*layer_types"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_an_override_without_effect_is_refused_with_the_way_out(
    name: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(CONFIGS[name], overrides)
    (problem,) = caught.value.problems
    assert problem.startswith("model.config_overrides") and re.search(message, problem), problem


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama", {"rope_type": "yarn", "factor": 2.0, "attention_factor": 2.0, "beta_fast": 32, "beta_slow": 1}),
        ("llama", {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False}),
        ("llama", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}),
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("glm", {"partial_rotary_factor": 0.25}),
        (
            "gemma3",
            {
                "sliding_attention": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
            },
        ),
    ],
)
def test_a_rotary_parameter_that_its_type_reads_is_accepted(name: str, parameters: dict[str, Any]) -> None:
    kind = "sliding_attention"
    given = parameters.get(kind, parameters)
    if given.get("rope_type") in ("yarn", "longrope", "llama3"):
        given["original_max_position_embeddings"] = 64
    made = with_overrides(CONFIGS[name], {"rope_parameters": parameters})
    rope = made.rope_parameters.get(kind, made.rope_parameters)
    assert given.items() <= rope.items() and type(rope) is dict


def test_layers_that_are_the_checkpoints_own_are_overridden_with_what_they_would_follow_from() -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Qwen3Config(**CUT | {"num_hidden_layers": 4}, layer_types=kinds)
    assert with_overrides(config, {"rms_norm_eps": 0.5}).layer_types == kinds
    with pytest.raises(
        ConfigError, match=r"layer_types would follow from num_hidden_layers.*override .*layer_types too"
    ):
        with_overrides(config, {"num_hidden_layers": 2})
    assert with_overrides(config, {"num_hidden_layers": 2, "layer_types": kinds[1:3]}).layer_types == kinds[1:3]


def test_a_rotary_parameter_that_is_unheard_of_is_passed_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    given = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "factr": 4.0}}
    with caplog.at_level(logging.WARNING, "qk_sniffer"):
        assert with_overrides(CONFIGS["llama"], given).rope_parameters["factr"] == 4.0
    assert "rope_parameters.factr" in caplog.text and "rope_parameters.factor" not in caplog.text
