"""Tests that files which Git LFS has not fetched are named, and that only those which would be loaded matter."""

import json
import shutil
from pathlib import Path

import pytest

from qk_sniffer.backbone.loading import check_model
from qk_sniffer.config import ModelConfig
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.lfs import HEAD_BYTES, pointer_problem

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4096000\n"


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00002-of-00002.safetensors",
        "model-parts/2.safetensors",
        "config.json",
        "pytorch_model.bin",
    ],
)
def test_weights_that_were_not_fetched_are_named(model: Path, name: str) -> None:
    if name.endswith(".bin"):
        (model / "model.safetensors").unlink()
    if name.startswith("model-"):
        (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
        weights = {"a": "model-00001-of-00002.safetensors", "b": name}
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(POINTER)
    with pytest.raises(
        SourceError, match=rf"{name} cannot be loaded: it is a Git LFS pointer to a file of 4,096,000 .*pull"
    ):
        check_model(ModelConfig(name=str(model)))


def test_a_gguf_file_that_was_not_fetched_is_named(model: Path) -> None:
    (model / "q[4].gguf").write_text(POINTER)
    with pytest.raises(SourceError, match=r"q\[4\]\.gguf cannot be loaded: it is a Git LFS pointer"):
        check_model(ModelConfig(name=str(model), gguf_file="q[4].gguf"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_that_was_not_fetched_is_named(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    with pytest.raises(SourceError, match=rf"{name} cannot be loaded: it is a Git LFS pointer"):
        load_tokenizer(ModelConfig(name=str(model)))


def test_files_that_are_not_loaded_may_be_pointers(model: Path) -> None:
    for name in ("pytorch_model.bin", "model.onnx", "q4.gguf", "consolidated.safetensors"):
        (model / name).write_text(POINTER)
    check_model(ModelConfig(name=str(model)))
    (model / "model.safetensors").write_text(POINTER)
    load_tokenizer(ModelConfig(name=str(model)))


def test_a_text_about_pointers_is_none() -> None:
    assert pointer_problem(POINTER.encode()) and pointer_problem(POINTER.replace("size", "x y\nsize").encode())
    assert len(POINTER) < HEAD_BYTES
    for text in ("", "about " + POINTER, "version https://git-lfs.github.com/spec/v1 is a line\nsize 3\n"):
        assert pointer_problem(text.encode()) is None
