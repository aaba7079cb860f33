"""A weight that a checkpoint has twice, under whatever names, has one value, or the error names both."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import CUT, saved
from support.zoo import CASES, Case

from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

LLAMA = replace(CASES[0], options=CUT)

WRAPPERS = [case for case in CASES if case.name in ("gemma3_multimodal", "mistral3")]


def test_a_weight_that_is_stored_twice_with_other_values_is_an_error_that_names_both(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    one, other = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    config = saved(LLAMA, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(one)
    for second in (name, name.removeprefix("model.")):
        shards = dict.fromkeys(weights, one.name) | {second: other.name}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        save_file({second: weights[name]}, other, metadata={"format": "pt"})
        load_backbone(config)
        save_file({second: weights[name] + 1}, other, metadata={"format": "pt"})
        message = rf"twice, with different values: {name} in {one.name} and {second} in {other.name}\."
        with pytest.raises(SourceError, match=message):
            load_backbone(config)


@pytest.mark.few(3)
@pytest.mark.parametrize("case", WRAPPERS, ids=lambda case: case.name)
@pytest.mark.parametrize("path", ["model.language_model.", "language_model.", "model.language_model.model."])
def test_two_names_of_one_weight_in_a_larger_model(case: Case, path: str, tmp_path: Path) -> None:
    config = saved(case, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    inner = "layers.1.self_attn.q_proj.weight"
    (name,) = (key for key in weights if key.endswith(f"language_model.model.{inner}"))
    save_file(weights | {path + inner: weights[name].clone()}, file, metadata={"format": "pt"})
    decoder = load_backbone(config).decoder
    assert torch.equal(decoder.state_dict()[inner], weights[name])
    save_file(weights | {path + inner: weights[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="has a weight twice, with different values") as caught:
        load_backbone(config)
    assert f"{name} in {file.name}" in str(caught.value) and f"{path + inner} in {file.name}" in str(caught.value)


def test_two_names_of_one_expert(tmp_path: Path) -> None:
    config = saved(next(case for case in CASES if case.name == "qwen3_moe"), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    other = name.removeprefix("model.")
    save_file(weights | {other: weights[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="has a weight twice, with different values") as caught:
        load_backbone(config)
    assert f" {name} in {file.name}" in str(caught.value) and f" {other} in {file.name}" in str(caught.value)
