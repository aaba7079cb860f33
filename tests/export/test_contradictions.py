"""Tests exports of datasets of someone else: what contradicts itself ends with an error that names the file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.export_cases import statistics, without_rows

import qk_sniffer
from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest as manifests


def drop_frequencies(model: dict[str, Any]) -> None:
    model["rotary"]["frequencies"] = {}


def text_as_frequencies(model: dict[str, Any]) -> None:
    model["rotary"]["frequencies"]["rotary_emb"]["inv_freq"] = "many"


def fewer_frequencies(model: dict[str, Any]) -> None:
    model["layers"][0]["head_dim"] = 8
    model["rotary"]["frequencies"]["rotary_emb"]["inv_freq"] = [1.0] * 4


def another_head(model: dict[str, Any]) -> None:
    model["layers"][1]["captured"]["q"] = [0, 1]


def many_layers_and_heads(model: dict[str, Any]) -> None:
    model["num_layers"] = 2000
    for layer in model["layers"]:
        layer |= {"num_q_heads": 10_000, "key_head": [0] * 10_000, "head_dim": 1 << 12}
    model["rotary"]["frequencies"]["rotary_emb"]["inv_freq"] = [1.0] * (1 << 11)


def text_as_parameters(model: dict[str, Any]) -> None:
    model["rotary"]["rope_parameters"] = ["rope_theta"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_frequencies, "has no frequencies 'rotary_emb', by which layer 0 rotates"),
        (text_as_frequencies, r"not understood \(Expected `array`, got `str` .*inv_freq"),
        (fewer_frequencies, "its layers differ"),
        (another_head, "the statistics of layer 1 are not of the heads that manifest.json describes"),
        (many_layers_and_heads, "the file does not fit in memory"),
        (text_as_parameters, "not the powers of one rope_theta"),
    ],
)
def test_a_manifest_that_contradicts_the_statistics(
    change: Callable[[dict[str, Any]], None], reason: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    without_rows(checkpoint, texts, root)
    manifest = manifests.read(root)
    change(manifest["model"])
    (root / "manifest.json").write_bytes(manifests.encode(manifest))
    with pytest.raises(StoreError, match=reason):
        qk_sniffer.export(root, "tria")


def test_a_dataset_of_one_token(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    dataset = without_rows(checkpoint, tmp_path / "one.jsonl", tmp_path / "out")
    with pytest.raises(StoreError, match=r"the statistics of l00h00q are of 1 token: capture longer texts"):
        qk_sniffer.export(dataset, "triattention")


@pytest.mark.slow
def test_a_head_without_counted_tokens_says_why(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "short", **statistics(skip_tokens=1000))
    with pytest.raises(StoreError, match=r"are of 0 tokens: .*, or set a smaller capture\.statistics\.skip_tokens$"):
        qk_sniffer.export(dataset, "tria")
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][16:32] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    dataset = without_rows(folder, texts, tmp_path / "nan")
    with pytest.raises(StoreError, match=r"l01h01q at the stage pre are of 0 tokens, because 1,546 vectors with NaN"):
        qk_sniffer.export(dataset, "triattention")


@pytest.mark.slow
def test_statistics_of_another_dataset_are_not_exported(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """Statistics of models of one shape have files of one size."""
    for skip, name in enumerate(("out", "other")):
        without_rows(checkpoint, texts, tmp_path / name, **statistics(skip_tokens=skip))
    file = "statistics/layer-01.safetensors"
    swapped, other = (tmp_path / name / file for name in ("out", "other"))
    assert swapped.stat().st_size == other.stat().st_size
    dataset = qk_sniffer.open_dataset(tmp_path / "out")
    assert dataset.statistics(1, "q", "pre").count.sum() > 0
    swapped.write_bytes(other.read_bytes())
    with pytest.raises(
        StoreError, match=r"layer-01\.safetensors is damaged, or of another dataset: its sha256 differs"
    ):
        dataset.statistics(1, "q", "pre")
    with pytest.raises(StoreError, match="of another dataset"):
        qk_sniffer.export(tmp_path / "out", "triattention", tmp_path / "stats.pt")
    assert not (tmp_path / "stats.pt").exists()
