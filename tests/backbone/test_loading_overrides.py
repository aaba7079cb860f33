"""Overrides of a checkpoint's config change the loaded model, above all its rotary embedding."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.configs import choice, composed
from support.tiny import CUT, saved
from support.zoo import CASES
from transformers import Qwen3Config, Qwen3ForCausalLM

from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError

pytestmark = pytest.mark.floor

QWEN3: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"max_window_layers": 28, "tie_word_embeddings": True},
    "qwen3-1.7b": {"max_window_layers": 28, "tie_word_embeddings": True},
    "qwen3-4b": {"max_window_layers": 36, "tie_word_embeddings": True},
    "qwen3-8b": {"max_window_layers": 36, "tie_word_embeddings": False},
    "qwen3-14b": {"max_window_layers": 40, "tie_word_embeddings": False},
}
"""The differences of the five models' config.json on the Hub, without width, depth and number of heads."""

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
"""The common keys of the five models, in the spelling of their version of transformers."""


def qwen3(slug: str, folder: Path) -> Path:
    """Saves a checkpoint with the config of that model on the Hub, with small sizes that do not affect RoPE."""
    Qwen3ForCausalLM(Qwen3Config(**CUT, head_dim=128)).to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(QWEN3_ALL | QWEN3[slug] | CUT))
    return folder


def rotary(model: ModelConfig) -> tuple[torch.Tensor, float]:
    """Returns the inverse frequencies (d / 2,) and the attention scaling of the loaded model."""
    (embedding,) = load_backbone(model).rotary_parameters()["embeddings"].values()
    return torch.tensor(embedding["inv_freq"], dtype=torch.float64), embedding["attention_scaling"]


def plain_frequencies(dim: int = 128, theta: float = 1e6) -> torch.Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def yarn_frequencies(dim: int = 128, theta: float = 1e6, factor: float = 4.0, original: int = 32768) -> torch.Tensor:
    """Returns the frequencies of Peng et al. 2023, "YaRN" (arXiv 2309.00071), section 3.2, with alpha 1 and beta 32.

    A component that turns less than once over the original context is interpolated by `factor`. One that turns more
    than 32 times does not change. Between the two, the mixture is linear in the component's index, from the floor of
    the first bound to the ceiling of the second, as in the authors' code.
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
    "type, rope_theta next to it": lambda yarn: {"rope_scaling": yarn, "rope_theta": 1000000.0},
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


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Qwen2Moe"])
def test_a_window_that_the_checkpoint_has_and_does_not_use_can_be_turned_on(name: str, tmp_path: Path) -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    options = CUT | (experts | {"shared_expert_intermediate_size": 8} if name == "Qwen2Moe" else {})
    made = getattr(transformers, f"{name}Config")(**options, max_window_layers=1)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["layer_types"]
    config = ModelConfig(name=str(tmp_path), dtype="float32")

    def windows(saved_window: int | None, **overrides: Any) -> set[int | None]:
        file.write_text(json.dumps(values | {"sliding_window": saved_window}))
        facts = load_backbone(replace(config, config_overrides=overrides)).probe()
        return {fact.heads.sliding_window for fact in facts}

    assert windows(16, use_sliding_window=False) == windows(16, rms_norm_eps=0.5) == {None}
    assert windows(16, use_sliding_window=True) == {None, 16}
    assert windows(16, use_sliding_window=True, sliding_window=8) == {None, 8}
    with pytest.raises(ConfigError, match=r"use_sliding_window has no effect without a window.*\.sliding_window too"):
        windows(None, use_sliding_window=True)
    no_layers = {"max_window_layers": 2 if name != "Qwen2Moe" else 0}
    with pytest.raises(ConfigError, match=r"all layers .* attention: give .*max_window_layers or .*layer_types too"):
        windows(16, use_sliding_window=True, **no_layers)


def test_fewer_layers_are_the_first_ones(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3_sliding")
    config = saved(case, tmp_path)
    cut = replace(
        config, config_overrides={"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    )
    facts = load_backbone(cut).probe()
    assert facts == load_backbone(config).probe()[:2]
