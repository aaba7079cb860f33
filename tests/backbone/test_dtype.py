"""model.dtype=auto is the dtype of the checkpoint; every other dtype is told apart from it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from support.gguf_files import write_gguf
from support.jobs import run
from support.tiny import CUT, save_checkpoint
from support.zoo import CASES

from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError
from qk_sniffer.store import manifest as manifests

pytestmark = pytest.mark.floor

LLAMA = replace(CASES[0], options=CUT)
MULTIMODAL = next(case for case in CASES if case.name == "gemma3_multimodal")


def without_dtype(folder: Path) -> None:
    """Removes the dtype from config.json, and from its parts."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        part.pop("dtype", None)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_config_counts_and_else_that_of_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    LLAMA.model(dtype=dtype).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="auto")
    for change in (lambda folder: None, without_dtype):
        change(tmp_path)
        backbone = load_backbone(config)
        assert backbone.dtype == dtype and f"torch.{backbone.stored.dtype}" == str(dtype)
        for name, weight in LLAMA.decoder(dtype=dtype).state_dict().items():
            assert torch.equal(backbone.decoder.state_dict()[name], weight), name
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}))
    backbone = load_backbone(config)
    assert backbone.dtype == torch.float32 and f"torch.{backbone.stored.dtype}" == str(dtype)


def test_the_dtype_of_a_multimodal_checkpoint_is_that_of_its_decoder(tmp_path: Path) -> None:
    MULTIMODAL.model(dtype=torch.float16).save_pretrained(tmp_path)
    without_dtype(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for whole, part, expected in (("bfloat16", None, "bfloat16"), ("bfloat16", "float32", "float32")):
        values["dtype"], values["text_config"]["dtype"] = whole, part
        file.write_text(json.dumps(values))
        backbone = load_backbone(ModelConfig(name=str(tmp_path), dtype="auto"))
        assert (str(backbone.dtype), backbone.stored.dtype) == (f"torch.{expected}", "float16")


def test_another_dtype_than_that_of_the_checkpoint_is_told_apart(tmp_path: Path) -> None:
    LLAMA.model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    backbone = load_backbone(ModelConfig(name=str(tmp_path), dtype="float32"))
    assert backbone.dtype == torch.float32 and backbone.stored.dtype == "bfloat16"


@pytest.mark.parametrize("named", [True, False])
def test_a_dtype_that_no_model_computes_in_is_refused(named: bool, tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: w.double() for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    without_dtype(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="auto")
    if named:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float64"}))
    with pytest.raises(ConfigError, match=r"own is float64; valid: bfloat16, float16, float32$"):
        check_model(config) if named else load_backbone(config)
    assert load_backbone(replace(config, dtype="float32")).stored.dtype == "float64"


def test_a_gguf_file_has_the_dtype_of_its_floats_and_a_quantized_one_is_named_so(tmp_path: Path) -> None:
    config = ModelConfig(name=str(tmp_path), gguf_file="tiny.gguf", dtype="auto")
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf")
    backbone = load_backbone(config)
    assert (backbone.dtype, backbone.stored.dtype, backbone.stored.quantization) == (torch.float32, "float32", None)
    write_gguf(LLAMA.model(), tmp_path / "tiny.gguf", types={"token_embd.weight": np.float16})
    assert load_backbone(config).dtype == torch.float16
    quantized = replace(LLAMA, options=CUT | {"hidden_size": 32, "num_attention_heads": 4})
    write_gguf(quantized.model(), tmp_path / "tiny.gguf", types={"token_embd.weight": GGMLQuantizationType.Q8_0})
    backbone = load_backbone(config)
    assert backbone.dtype == torch.float32
    description = backbone.stored.describe_quantization(backbone.decoder)
    assert description is not None and description["method"] == "gguf" and description["dequantized"]
    assert description["config"]["types"] == {"F32": 19, "Q8_0": 1}


def test_a_job_names_the_dtype_that_it_computed_in(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = replace(LLAMA, options={key: value for key, value in CUT.items() if key != "vocab_size"})
    save_checkpoint(case, tmp_path / "tiny", torch.bfloat16)
    for dtype in ("auto", "float32"):
        root = run(tmp_path / "tiny", texts, tmp_path / dtype, model={"dtype": dtype}, dataset={"max_samples": 2})
        manifest = manifests.read(root)
        resolved = "bfloat16" if dtype == "auto" else "float32"
        assert manifest["fingerprint"]["model.dtype"] == manifest["config"]["model"]["dtype"] == dtype
        assert (manifest["model"]["dtype"], manifest["model"]["checkpoint_dtype"]) == (resolved, "bfloat16")
        assert manifest["model"]["quantization"] is None
        assert manifest["proof"]["tolerance"] == {"bfloat16": 1e-1, "float32": 2e-3}[resolved]
        written = resolved if dtype == "auto" else "float32, from a checkpoint in bfloat16"
        assert f"Computed in {written}." in capsys.readouterr().out
        assert f"| dtype | {written} |" in (root / "README.md").read_text()
