"""Tests that a config that asks for more layers or modules than any model has is refused before a model is built."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import write_gguf
from support.tiny import CUT
from support.zoo import CASES
from transformers import LlamaConfig

from qk_sniffer.backbone import unloaded as building
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.backbone.unloaded import unloaded
from qk_sniffer.config import ModelConfig
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.config_limits import refuse_too_many_layers

LLAMA = next(case for case in CASES if case.name == "llama")


@pytest.mark.parametrize(
    "settings",
    [{"num_hidden_layers": 2**32}, {"layer_types": ["full_attention"] * 10_000}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_config_with_too_many_layers_is_refused(settings: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | settings), encoding="utf-8")
    config = ModelConfig(name=str(folder), dtype="float32", device_map="cpu")
    for load in (check_model, load_backbone, load_tokenizer):
        with pytest.raises(SourceError, match=rf"{next(iter(settings))} asks for [\d,]+ layers, and no model has more"):
            load(config)


def test_a_config_that_stands_for_another_one_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """transformers would read the other one, which may lie outside of the folder, and no check has seen."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    own = json.loads((folder / "config.json").read_bytes())
    (tmp_path / "config.4.0.0.json").write_text(json.dumps(own), encoding="utf-8")
    config = ModelConfig(name=str(folder), dtype="float32", device_map="cpu")
    for listed in (["config.4.0.0.json"], ["config.4/../../config.4.0.0.json"], "config.4.0.0.json"):
        (folder / "config.json").write_text(json.dumps(own | {"configuration_files": listed}), encoding="utf-8")
        for load in (check_model, load_backbone, load_tokenizer):
            with pytest.raises(SourceError, match=r"config\.json is refused: its configuration_files names configs"):
                load(config)
    (folder / "config.json").write_text(json.dumps(own | {"configuration_files": []}), encoding="utf-8")
    check_model(config)


def test_a_gguf_file_with_too_many_layers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(LLAMA.model(), file)
    content = bytearray(file.read_bytes())
    place = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    content[place : place + 4] = struct.pack("<I", 2**32 - 1)
    file.write_bytes(content)
    config = ModelConfig(name=str(tmp_path), gguf_file=file.name, dtype="float32", device_map="cpu")
    for load in (check_model, load_backbone):
        with pytest.raises(SourceError, match=r"llama\.block_count asks for 4,294,967,295 layers"):
            load(config)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"text_config": {"num_hidden_layers": 2_001}}, "text_config.num_hidden_layers"),
        ({"n_layer": 2_001}, "n_layer"),
        ({"vision_config": {"depth": 1e300}}, "vision_config.depth"),
        ({"layers_block_type": ["mamba"] * 2_001}, "layers_block_type"),
        ({"num_hidden_layers": 2_000, "layer_norm_eps": 1e-5, "hidden_size": 10_000, "layerdrop": 0.1}, None),
    ],
)
def test_the_keys_of_layers(values: dict[str, Any], key: str | None) -> None:
    if key is None:
        refuse_too_many_layers("it", values)
    else:
        with pytest.raises(SourceError, match=f"its {key} asks for"):
            refuse_too_many_layers("it", values)


def test_a_model_of_too_many_modules_is_not_built(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unloaded(LlamaConfig(**CUT)) is not None
    monkeypatch.setattr(building, "_MOST_MODULES", 5)
    with pytest.raises(SourceError, match="more than 5 modules"):
        unloaded(LlamaConfig(**CUT))
    with pytest.raises(SourceError, match="more than 5 modules"):
        load_backbone(ModelConfig(name=str(checkpoint), dtype="float32", device_map="cpu"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_config_larger_than_any_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Libraries read and copy it several times."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(" " * (1 << 23))
    config = ModelConfig(name=str(folder), dtype="float32", device_map="cpu")
    for load in (check_model, load_backbone, load_tokenizer):
        with pytest.raises(SourceError, match=rf"{name} is refused: it has 8\.4 MB, and no config of a model has more"):
            load(config)
