"""A quantized checkpoint has the vectors of its dequantized weights, or is refused with the package that it needs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from quantized import FORMATS, Format, compared, examine
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.jobs import run
from support.tiny import save_tokenizer
from support.zoo import CASES

from qk_sniffer.backbone import quantization as quantization_module
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError
from qk_sniffer.store import manifest as manifests

of_transformers = pytest.mark.parametrize(
    "format", [each for each in FORMATS if each.package is None], ids=lambda each: each.name
)


@of_transformers
def test_a_format_that_transformers_reads_alone(format: Format) -> None:
    entry = examine(format)
    assert entry.captured == (format.method != "modelopt")
    assert quantized.row(entry) in quantized.TABLE.read_text().splitlines()


IN_EXTRA = {"bitsandbytes", "compressed_tensors", "torchao"}
"""The packages of the extra `quantized`. gptqmodel demands one version of torch: its formats are only in the table."""


@pytest.mark.slow
@pytest.mark.parametrize("format", [each for each in FORMATS if each.package in IN_EXTRA], ids=lambda each: each.name)
def test_a_format_of_another_package(format: Format) -> None:
    assert quantized.row(examine(format)) in quantized.TABLE.read_text().splitlines()


def test_dequantized_weights_are_the_stored_numbers_times_their_scales(tmp_path: Path) -> None:
    quantized.save_fp8(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    decoder = load_backbone(ModelConfig(name=str(tmp_path), dtype="float32")).decoder
    name = "layers.1.self_attn.k_proj.weight"
    scale = stored[f"model.{name}_scale_inv"].repeat_interleave(quantized.BLOCK, 0)
    expected = stored[f"model.{name}"].float() * scale.repeat_interleave(quantized.BLOCK, 1)
    assert torch.equal(decoder.state_dict()[name], expected)


def test_a_scale_that_is_missing_is_an_error_that_names_its_weight(tmp_path: Path) -> None:
    quantized.save_fp8(tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({key: w for key, w in load_file(file).items() if key != f"{name}_scale_inv"}, file, {"format": "pt"})
    with pytest.raises(SourceError, match=rf"1 of its weights are quantized, .* no scale: {name} \(F8_E4M3\)"):
        load_backbone(ModelConfig(name=str(tmp_path), dtype="float32"))


@pytest.mark.slow
@pytest.mark.parametrize("format", [each for each in FORMATS if each.package in IN_EXTRA], ids=lambda each: each.name)
def test_each_part_of_a_quantized_weight_that_is_missing_is_an_error_that_names_the_weight(
    format: Format, tmp_path: Path
) -> None:
    format.save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    module = "layers.1.self_attn.q_proj"
    parts = [name for name in weights if name.startswith(f"model.{module}.") and not name.endswith("weight_format")]
    assert len(parts) > 1
    for part in parts:
        save_file({name: weight for name, weight in weights.items() if name != part}, file, metadata)
        with pytest.raises(SourceError, match=rf" 1 (weights|of its weights) .*{re.escape(module)}\."):
            load_backbone(ModelConfig(name=str(tmp_path), dtype="float32", device_map="cpu"))


def test_the_decoder_of_a_quantized_multimodal_checkpoint_is_dequantized(tmp_path: Path) -> None:
    original = next(case for case in CASES if case.name == "gemma3_multimodal").model()
    original.save_pretrained(tmp_path)
    weights = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        weights[name] = weight
        if "language_model" in name and "_proj." in name:
            scale = weight.abs().max() / 448
            weights |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    whole = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": whole}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    backbone = load_backbone(ModelConfig(name=str(tmp_path), dtype="float32"))
    assert backbone.stored.describe_quantization(backbone.decoder) == {
        "method": "fp8",
        "dequantized": True,
        "config": config,
    }
    assert 0 < compared(backbone, original) < quantized.MOST_DIFFERENCE


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ({"quant_method": "gptq"}, "optimum gptqmodel"),
        ({"quant_method": "awq"}, "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    method: dict[str, Any], packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized.llama()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
    monkeypatch.setattr(quantization_module, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=rf"the package that reads it is not installed: run pip install {packages}$"):
        check_model(ModelConfig(name=str(tmp_path)))


def test_a_job_names_the_quantization(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    quantized.save_fp8(folder)
    save_tokenizer(folder)
    manifest = manifests.read(run(folder, texts, tmp_path / "out", dataset={"max_samples": 2}))
    assert manifest["model"]["quantization"] == {
        "method": "fp8",
        "dequantized": True,
        "config": json.loads((folder / "config.json").read_text())["quantization_config"],
    }
    assert manifest["proof"]["proven"] is True
    assert "The model's weights are quantized with fp8, dequantized" in capsys.readouterr().out
    assert "| quantization | fp8, dequantized" in (tmp_path / "out" / "README.md").read_text()


def test_the_comparison_finds_other_vectors(tmp_path: Path) -> None:
    original = quantized.save_fp8(tmp_path)
    with torch.no_grad():
        original.get_submodule("model.layers.1.self_attn.k_proj").weight.mul_(2)
    backbone = load_backbone(ModelConfig(name=str(tmp_path), dtype="float32"))
    assert compared(backbone, original) > quantized.MOST_DIFFERENCE
