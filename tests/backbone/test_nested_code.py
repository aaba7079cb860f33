"""Tests that code which a part of a config names is not run, whatever the terminal answers."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.utils.hub import HF_MODULES_CACHE

from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.backbone.unloaded import unloaded
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose tower of images names code, and a user who answers every question with yes."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, vocab_size=300)
    images = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    LlavaConfig(vision_config=images, text_config=text).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    # transformers knows this type, and has no AutoModel of it.
    saved["vision_config"] = {
        "model_type": "siglip_text_model",
        "auto_map": {"AutoModel": "code.Tower"},
        "_name_or_path": str(tmp_path),
    }
    saved["architectures"] = ["LlavaForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "code.py").write_text(CODE)
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def has_run(folder: Path) -> bool:
    return (folder / "ran").exists() or any(Path(HF_MODULES_CACHE).rglob("ran"))


def test_the_code_of_a_part_of_a_model(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"set model\.trust_remote_code=true if you trust its code"):
        load_backbone(ModelConfig(name=str(folder), dtype="float32", device_map="cpu"))
    assert not has_run(folder)


def test_the_code_of_a_part_of_a_config(folder: Path) -> None:
    assert unloaded(LlavaConfig.from_pretrained(folder)) is None
    assert not has_run(folder)
