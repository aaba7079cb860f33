"""Loading: without the head, in the dtype asked for, whole or not at all, from safetensors unless told otherwise."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config
from zoo import CASES, Case, ids

from qk_sniffer.backbone import Backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError, SourceError
from qk_sniffer.families import Family, find_family
from qk_sniffer.job import folder_digest
from qk_sniffer.loading import load_backbone, with_overrides

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


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
    original = case.model().get_decoder().state_dict()
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


def test_no_cache_and_no_mask_reach_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CASES[0].model().get_decoder()
    given: dict[str, Any] = {}

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given.update(kwargs, output=output)

    decoder.register_forward_hook(watch, with_kwargs=True)
    Backbone(decoder, Family()).forward(ids(), lambda call: None)
    assert given["use_cache"] is False and "attention_mask" not in given
    assert given["output"].past_key_values is None


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


QWEN3 = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "max_position_embeddings": 40960,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": YARN},
        {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ],
    ids=["rope_parameters", "rope_scaling", "rope_scaling with type"],
)
def test_yarn_keeps_the_rotary_base_in_old_and_new_spelling(overrides: dict[str, Any]) -> None:
    config = with_overrides(Qwen3Config(**QWEN3), overrides)
    assert config.rope_parameters["rope_theta"] == 1000000.0
    from transformers import AutoModel

    backbone = Backbone(AutoModel.from_config(config), Family())
    (embedding,) = backbone.rotary_parameters()["embeddings"].values()
    torch.testing.assert_close(torch.tensor(embedding["inv_freq"]), yarn_frequencies(), rtol=1e-6, atol=0)
    # Peng et al. 2023, "YaRN", section 3.4: sqrt(1/t) = 0.1 ln(s) + 1
    assert embedding["attention_scaling"] == pytest.approx(0.1 * math.log(4.0) + 1)


def yarn_frequencies(dim: int = 128, theta: float = 1e6, factor: float = 4.0, original: int = 32768) -> torch.Tensor:
    """Peng et al. 2023, "YaRN", section 3.2: interpolate below 1 turn over the original context, keep above 32."""

    def component(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(component(32)), math.ceil(component(1))
    made = []
    for i in range(dim // 2):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        frequency = theta ** (-2 * i / dim)
        made.append(frequency / factor * interpolated + frequency * (1 - interpolated))
    return torch.tensor(made)


def test_an_override_that_the_config_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config_overrides\.num_layers"):
        with_overrides(LlamaConfig(), {"num_layers": 3})


def test_overrides_are_merged_deep() -> None:
    config: PretrainedConfig = with_overrides(Qwen3Config(**QWEN3), {"rope_parameters": {"rope_theta": 5.0}})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5.0}


def test_a_family_is_found_by_model_type_or_named() -> None:
    assert type(find_family("llama")) is Family
    assert type(find_family("llama", "test_backbone:Named")) is Named
    for bad in ("no_such_module:Family", "test_backbone:Nothing", "test_backbone:Case"):
        with pytest.raises(ConfigError, match=r"model\.family"):
            find_family("llama", bad)


class Named(Family):
    """A user's own family."""
