"""Loading: without the head, in the dtype asked for, whole or not at all, with the overrides that were asked for."""

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_config import choice, composed
from transformers import Qwen3Config, Qwen3ForCausalLM
from zoo import CASES, Case

from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError, SourceError
from qk_sniffer.job import folder_digest
from qk_sniffer.loading import load_backbone
from qk_sniffer.model_config import with_overrides

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
multimodal_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.vision is not None], ids=lambda case: case.name
)


def saved(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> ModelConfig:
    case.model(dtype=dtype).save_pretrained(folder)
    return ModelConfig(name=str(folder), dtype=str(dtype).removeprefix("torch."))


@all_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_loads_without_its_head_in_the_dtype_asked_for(case: Case, dtype: str, tmp_path: Path) -> None:
    config = replace(saved(case, tmp_path), dtype=dtype)
    backbone = load_backbone(config)
    decoder = backbone.decoder
    # Of some families the library keeps a few weights (routers of experts) in float32; attention never.
    attention = [weight.dtype for module in backbone.attention_layers for weight in module.parameters()]
    assert set(attention) == {backbone.dtype} == {getattr(torch, dtype)}
    assert not decoder.training
    assert not any("lm_head" in name for name, _ in decoder.named_modules())
    original = case.decoder().state_dict()
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, original[name].to(weight.dtype)), name


def test_a_missing_weight_is_an_error_that_names_it(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        load_backbone(config)


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    config = replace(saved(CASES[0], tmp_path), config_overrides={"num_key_value_heads": 1})
    with pytest.raises(SourceError, match="k_proj"):
        load_backbone(config)


def test_weights_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SourceError, match=str(tmp_path)):
        load_backbone(config)


def test_a_pickle_checkpoint_is_refused_unless_asked_for(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"model\.allow_pickle=true"):
        load_backbone(config)
    decoder = load_backbone(replace(config, allow_pickle=True)).decoder
    assert torch.equal(decoder.state_dict()["embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_code_that_comes_with_a_checkpoint_does_not_run_unless_asked_for(tmp_path: Path) -> None:
    saved(CASES[0], tmp_path)
    config_file = tmp_path / "config.json"
    text = config_file.read_text().replace('"model_type": "llama"', '"model_type": "unheard_of"')
    config_file.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"},', 1))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(SourceError, match=r"trust_remote_code"):
        load_backbone(ModelConfig(name=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere"])
def test_a_folder_that_is_not_there_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(SourceError, match=name):
        load_backbone(ModelConfig(name=name))


def test_a_folder_without_a_config_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=str(tmp_path)):
        load_backbone(ModelConfig(name=str(tmp_path)))


def test_the_digest_of_a_local_checkpoint_follows_its_contents(tmp_path: Path) -> None:
    saved(CASES[0], tmp_path)
    before = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("not what is loaded")
    assert folder_digest(tmp_path) == before
    file = tmp_path / "model.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    assert folder_digest(tmp_path) != before


def change_weights(folder: Path, change: Any) -> list[str]:
    """Saves what `change` makes of the weights of a checkpoint in one file; returns their names."""
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    save_file(weights, file, metadata={"format": "pt"})
    return list(weights)


@multimodal_cases
def test_a_missing_weight_of_a_multimodal_checkpoint_is_an_error_that_names_it(case: Case, tmp_path: Path) -> None:
    config = saved(case, tmp_path)
    lost = "layers.0.self_attn.k_proj.weight"

    def without(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in weights.items() if "vision" in name or not name.endswith(lost)}

    change_weights(tmp_path, without)
    with pytest.raises(SourceError, match=rf"lacks.* 1 weights of the decoder: {re.escape(lost)}\."):
        load_backbone(config)


@multimodal_cases
def test_weights_of_another_shape_in_a_multimodal_checkpoint_are_an_error(case: Case, tmp_path: Path) -> None:
    config = replace(saved(case, tmp_path), config_overrides={"num_key_value_heads": 1})
    with pytest.raises(
        SourceError, match=r"k_proj\.weight \(\[\d+, 32\] in the checkpoint, \[\d+, 32\] by the config\)"
    ):
        load_backbone(config)


def test_a_checkpoint_in_shards_is_whole_or_an_error(tmp_path: Path) -> None:
    model = CASES[0].model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    config = ModelConfig(name=str(tmp_path), dtype="float32")
    weights = load_backbone(config).decoder.state_dict()
    for name, weight in model.get_decoder().state_dict().items():
        assert torch.equal(weights[name], weight), name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    lost = "model.layers.2.self_attn.q_proj.weight"
    shard = tmp_path / index["weight_map"][lost]
    assert len(set(index["weight_map"].values())) > 2
    save_file({name: weight for name, weight in load_file(shard).items() if name != lost}, shard)
    with pytest.raises(SourceError, match=re.escape(lost.removeprefix("model."))):
        load_backbone(config)
    shard.unlink()
    with pytest.raises(SourceError, match=str(tmp_path)):
        load_backbone(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_or_is_left_out_is_not_missed(tied: bool, tmp_path: Path) -> None:
    case = replace(CASES[0], options=CASES[0].options | {"tie_word_embeddings": tied})
    config = saved(case, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    change_weights(
        tmp_path, lambda weights: {name: weight for name, weight in weights.items() if "lm_head" not in name}
    )
    load_backbone(config)


def test_weights_of_other_names_are_an_error_that_shows_them(tmp_path: Path) -> None:
    config = saved(CASES[0], tmp_path)
    change_weights(tmp_path, lambda weights: {f"tower.{name}": weight for name, weight in weights.items()})
    with pytest.raises(SourceError, match=r"of other names, such as tower\..*Family\.inside"):
        load_backbone(config)


QWEN3: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"max_window_layers": 28, "tie_word_embeddings": True},
    "qwen3-1.7b": {"max_window_layers": 28, "tie_word_embeddings": True},
    "qwen3-4b": {"max_window_layers": 36, "tie_word_embeddings": True},
    "qwen3-8b": {"max_window_layers": 36, "tie_word_embeddings": False},
    "qwen3-14b": {"max_window_layers": 40, "tie_word_embeddings": False},
}
"""Where the config.json of the five on the Hub differ, but for their width, depth and number of heads."""

QWEN3_ALL: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
"""What they have in common, in the spelling of the transformers of their time."""

CUT: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def qwen3(slug: str, folder: Path) -> Path:
    """A checkpoint with the config of that model on the Hub, cut where the rotary embedding does not see it."""
    Qwen3ForCausalLM(Qwen3Config(**CUT, head_dim=128)).to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(QWEN3_ALL | QWEN3[slug] | CUT))
    return folder


def rotary(model: ModelConfig) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (d / 2,) and attention scaling of the loaded model."""
    (embedding,) = load_backbone(model).rotary_parameters()["embeddings"].values()
    return torch.tensor(embedding["inv_freq"], dtype=torch.float64), embedding["attention_scaling"]


def plain_frequencies(dim: int = 128, theta: float = 1e6) -> torch.Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def yarn_frequencies(dim: int = 128, theta: float = 1e6, factor: float = 4.0, original: int = 32768) -> torch.Tensor:
    """Peng et al. 2023, "YaRN" (arXiv 2309.00071), section 3.2, with alpha 1 and beta 32.

    A component that turns less than once over the original context is interpolated by `factor`, one that turns more
    than 32 times is kept. Between the two, as in their code, the mixture is linear in the component's number, from the
    last whole one before to the first whole one behind.
    """

    def component(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(component(32)), math.ceil(component(1))
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    plain = plain_frequencies(dim, theta)
    return plain / factor * interpolated + plain * (1 - interpolated)


SPELLINGS: dict[str, Any] = {
    "as shipped": lambda yarn: {"rope_parameters": yarn},
    "rope_scaling": lambda yarn: {"rope_scaling": yarn},
    "type": lambda yarn: {"rope_scaling": {("type" if key == "rope_type" else key): yarn[key] for key in yarn}},
    "type, rope_theta beside it": lambda yarn: {"rope_scaling": yarn, "rope_theta": 1000000.0},
    "in two places": lambda yarn: {"rope_parameters": {"factor": 4.0}, "rope_scaling": yarn},
}


@pytest.mark.parametrize("slug", QWEN3)
def test_the_study_runs_qwen3_with_yarn_in_any_spelling_and_without_it_plain(slug: str, tmp_path: Path) -> None:
    study = composed("+experiment=attention_plasticity", choice(slug)).model
    local = replace(study, name=str(qwen3(slug, tmp_path)))
    yarn = study.config_overrides["rope_parameters"]
    assert yarn == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for name, spelling in SPELLINGS.items():
        inv_freq, scaling = rotary(replace(local, config_overrides=spelling(yarn)))
        torch.testing.assert_close(inv_freq, yarn_frequencies(), rtol=1e-6, atol=0, msg=name)
        # Section 3.4: sqrt(1/t) = 0.1 ln(s) + 1
        assert scaling == pytest.approx(0.1 * math.log(4.0) + 1), name
    alone = composed(choice(slug)).model
    inv_freq, scaling = rotary(replace(alone, name=str(tmp_path)))
    torch.testing.assert_close(inv_freq, plain_frequencies(), rtol=1e-6, atol=0)
    assert scaling == 1.0
    assert (inv_freq / yarn_frequencies()).max() == pytest.approx(4.0)


def test_a_rotary_base_of_its_own_takes_effect_in_both_spellings(tmp_path: Path) -> None:
    model = ModelConfig(name=str(qwen3("qwen3-8b", tmp_path)))
    for overrides in ({"rope_theta": 5e6}, {"rope_parameters": {"rope_theta": 5e6}}):
        inv_freq, _ = rotary(replace(model, config_overrides=overrides))
        torch.testing.assert_close(inv_freq, plain_frequencies(theta=5e6), rtol=1e-6, atol=0)


def test_scaling_of_a_checkpoint_can_be_turned_off(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "llama3_rope")
    model = replace(saved(case, tmp_path), config_overrides={"rope_scaling": None})
    inv_freq, _ = rotary(model)
    torch.testing.assert_close(inv_freq, plain_frequencies(dim=8, theta=1e4), rtol=1e-6, atol=0)


def test_each_kind_of_layer_has_the_rotary_parameters_that_it_was_given(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "gemma3")
    given = {"full_attention": {"type": "linear", "factor": 8.0}, "sliding_attention": {"rope_theta": 5e5}}
    for key in ("rope_parameters", "rope_scaling"):
        backbone = load_backbone(replace(saved(case, tmp_path), config_overrides={key: given}))
        (embedding,) = backbone.rotary_parameters()["embeddings"].values()
        assert embedding["full_attention_inv_freq"] == pytest.approx((plain_frequencies(16, 1e6) / 8).tolist())
        assert embedding["sliding_attention_inv_freq"] == pytest.approx(plain_frequencies(16, 5e5).tolist())


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
    # Some classes keep `partial_rotary_factor` beside `rope_parameters` too.
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
    ("llama", {"model_type": "qwen3"}, r"model_type: it is what the checkpoint is"),
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
    ("llama", {"rope_parameters": {"rope_type": "yarnn"}}, r"rope_type is 'yarnn'; valid: default, .*, yarn$"),
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
    ("qwen3", {"sliding_window": 8}, r"sliding_window is 8, but the model's config makes None of it"),
    ("qwen3", {"num_hidden_layers": 2, "layer_types": ["full_attention"]}, r"does not accept them: .*layer_types"),
]


@pytest.mark.parametrize(("name", "overrides", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_an_override_without_effect_is_refused_with_the_way_out(
    name: str, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(CONFIGS[name], overrides)
    (problem,) = caught.value.problems
    assert problem.startswith("model.config_overrides") and re.search(said, problem), problem


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


def test_fewer_layers_are_the_first_ones(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3_sliding")
    config = saved(case, tmp_path)
    cut = replace(
        config, config_overrides={"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    )
    facts = load_backbone(cut).probe()
    assert facts == load_backbone(config).probe()[:2]
