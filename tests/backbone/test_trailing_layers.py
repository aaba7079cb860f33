"""Layers after the last captured one are removed, and the others have the same vectors."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.backbones import FolderOf, all_cases, captured, loaded
from support.jobs import QWEN3, heads_of, run
from support.tiny import save_checkpoint
from support.zoo import Case, ids

from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import ConfigError

pytestmark = pytest.mark.floor


def cut(folder: Path, layers: list[int], family: str | None = None) -> torch.nn.Module:
    config = ModelConfig(name=str(folder), dtype="float32", device_map="cpu", family=family)
    return load_backbone(config, layers=layers).decoder


@pytest.mark.few(5)
@all_cases
def test_the_layers_that_are_left_have_the_same_vectors(case: Case, folder_of: FolderOf) -> None:
    first = case.layers[0]
    whole = loaded(folder_of(case))
    config = ModelConfig(name=str(folder_of(case)), dtype="float32", device_map="cpu")
    short = load_backbone(config, layers=[first])
    seen, expected = captured(short, ids()), captured(whole, ids())
    assert seen.keys() == {(first, "q"), (first, "k")}
    assert all(torch.equal(seen[key], expected[key]) for key in seen)
    assert short.probe() == whole.probe()[:1]
    assert short.config.to_dict() == whole.config.to_dict()
    sizes = [sum(weight.numel() for weight in backbone.decoder.parameters()) for backbone in (short, whole)]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.slow
def test_weights_of_the_layers_behind_are_not_even_read(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    whole = run(checkpoint, texts, tmp_path / "whole", capture={"layers": [0, 1]})
    short = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    weights = load_file(short / "model.safetensors")
    left = {name: weight for name, weight in weights.items() if ".layers.2." not in name}
    assert len(left) < len(weights)
    save_file(left, short / "model.safetensors", metadata={"format": "pt"})
    root = run(short, texts, tmp_path / "out", capture={"layers": [0, 1]})
    tables = heads_of(root)
    assert tables.keys() == heads_of(whole).keys()
    assert all(tables[name].equals(table) for name, table in heads_of(whole).items())


def test_a_layer_that_is_not_there_is_named_with_those_that_are(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no layer 7; the layers with attention are 0-2"):
        run(checkpoint, texts, tmp_path / "out", capture={"layers": [0, 7]})


class Reversed(Family):
    """Counts the layers from the end, so that they are not in order."""

    def attention_layers(self, decoder: torch.nn.Module) -> dict[torch.nn.Module, int]:
        return {module: 2 - layer for module, layer in super().attention_layers(decoder).items()}


def test_a_model_whose_layers_are_not_in_order_is_left_whole(tmp_path: Path) -> None:
    folder = save_checkpoint(QWEN3, tmp_path / "model")
    assert len(cut(folder, [0])._modules["layers"]) == 1  # type: ignore[arg-type]
    assert len(cut(folder, [2], f"{__name__}:Reversed")._modules["layers"]) == 3  # type: ignore[arg-type]
