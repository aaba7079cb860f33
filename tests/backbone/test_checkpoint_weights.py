"""Weights that are missing or have other names are an error that says what is there, and the way out."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fake_hub import FakeHub
from support.tiny import CUT
from support.zoo import CASES

from qk_sniffer.backbone.checkpoint_weights import stored_dtypes, weights_problem
from qk_sniffer.backbone.loading import check_model, load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

LLAMA = replace(CASES[0], options=CUT)


def problem(names: Iterable[str], *, allow_pickle: bool = False, shards: Iterable[str] = ()) -> str:
    index = json.dumps({"weight_map": {f"weight {i}": file for i, file in enumerate(shards)}})
    return weights_problem(list(names), lambda name: index.encode(), allow_pickle=allow_pickle) or ""


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"it has no file of weights\. transformers reads model\.safetensors, or"),
        (["config.json", "tokenizer.json"], r"it has no file of weights\."),
        (SHARDS, rf"has 3 shards \({SHARDS[0]} and 2 more\), but not their index {INDEX}"),
        ([INDEX, *SHARDS[::2]], rf"lacks 1 of the 3 files that its index {INDEX} names: {SHARDS[1]}\. Restore"),
        ([INDEX], r"lacks 3 of the 3 files"),
        (["model.fp16.safetensors"], r"of the variant fp16 alone .*link model\.fp16\.safetensors to model\.safetens"),
        (
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
            r"of the variant fp16 alone .*link model\.safetensors\.index\.fp16\.json to model\.safetensors\.index\.j",
        ),
        (["model.fp16.safetensors", "pytorch_model.bin"], "of the variant fp16 alone"),
        (["pytorch_model.bin"], r"but a pickle \(pytorch_model\.bin\), .*set model\.allow_pickle=true$"),
        (["pytorch_model.bin.index.json", "pytorch_model-1.bin"], r"set model\.allow_pickle=true$"),
        (["tiny.Q4_0.gguf"], r"set model\.gguf_file to one of tiny\.Q4_0\.gguf$"),
        (["step-1/model.safetensors"], r"in its folders alone \(step-1\)"),
        (["consolidated.safetensors"], r"its weights have other names \(consolidated\.safetensors\)\. transformers"),
    ],
)
def test_each_kind_of_missing_weights_has_its_own_way_out(names: list[str], message: str) -> None:
    found = problem(names, shards=SHARDS)
    assert re.search(message, found)
    assert ("allow_pickle" in found) == any(name.startswith("pytorch_model") for name in names[:1])


def test_weights_that_are_there_are_no_problem() -> None:
    assert not problem(["model.safetensors"]) and not problem([INDEX, *SHARDS], shards=SHARDS)
    pickled = ["pytorch_model.bin.index.json", "pytorch_model-1.bin"]
    assert not problem(pickled, allow_pickle=True, shards=pickled[1:])
    assert "lacks 1 of the 2 files" in problem(pickled, allow_pickle=True, shards=[pickled[1], "pytorch_model-2.bin"])
    assert "of weights" in problem(["config.json"], allow_pickle=True)


def test_a_folder_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path, max_shard_size="4KB")
    config = ModelConfig(name=str(tmp_path), dtype="float32")
    load_backbone(config)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(SourceError, match=rf"lacks 1 of the \d+ files .*{lost.name}") as caught:
        check_model(config)
    assert "pickle" not in str(caught.value)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(SourceError, match=rf"model {tmp_path} .*no file of weights"):
        check_model(config)


def test_a_folder_that_is_no_checkpoint_says_what_it_has(tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(SourceError) as caught:
            check_model(ModelConfig(name=str(tmp_path)))
        return str(caught.value)

    assert said().startswith(f"model {tmp_path} is an empty folder: give model.name")
    (tmp_path / "notes.txt").touch()
    assert "has no config.json, which every checkpoint has; in the folder are notes.txt" in said()
    (tmp_path / "step-100").mkdir()
    (tmp_path / "step-100" / "config.json").touch()
    assert "one of its folders that has (step-100)" in said()
    (tmp_path / "tiny.gguf").touch()
    assert "set model.gguf_file to one of tiny.gguf" in said()


def test_the_stored_dtypes_are_those_of_the_files(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    assert stored_dtypes([tmp_path / "model.safetensors"]) == {"a": "BF16", "b": "F8_E4M3"}
    torch.save(weights | {"c": torch.ones(2, dtype=torch.int8)}, tmp_path / "pytorch_model.bin")
    assert stored_dtypes([tmp_path / "pytorch_model.bin"]) == {"a": "BF16", "b": "F8_E4M3FN", "c": "I8"}


ON_THE_HUB = """
import sys
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError
for name in sys.argv[1:]:
    try:
        load_backbone(ModelConfig(name=name, dtype="float32"))
    except SourceError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_repository_without_weights_says_what_it_has(tmp_path: Path) -> None:
    LLAMA.config().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    index = json.dumps({"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
    repositories: dict[str, tuple[dict[str, bytes], str]] = {
        "org/variant": ({"model.fp16.safetensors": b""}, "of the variant fp16 alone"),
        "org/lacking": ({INDEX: index, SHARDS[0]: b""}, f"lacks 1 of the 2 files .*: {SHARDS[1]}"),
        "org/damaged": ({INDEX: index, SHARDS[0]: b"", SHARDS[1]: b""}, f"has a damaged file, {SHARDS[0]}: it ends in"),
        "org/pickled": ({"pytorch_model.bin": b""}, "set model.allow_pickle=true"),
        "org/empty": ({"README.md": b""}, "it has no file of weights"),
    }
    with FakeHub() as hub:
        for name, (files, _) in repositories.items():
            hub.commit(name, {"config.json": config} | files)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", ON_THE_HUB, *repositories]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(repositories), done.stderr
    for line, (name, (_, message)) in zip(lines, repositories.items(), strict=True):
        assert re.match(f"model {name} .*{message}", line), line
        assert ("pickle" in line) == (name == "org/pickled")
