"""Tests the scales and ranges of keys against the rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.backbones import FolderOf
from support.export_cases import edited, rows_of, statistics, without_rows
from support.hub_cases import copied
from support.jobs import run
from support.segmented import COLUMNS, write
from support.verify_cases import edit
from support.zoo import CASES

import qk_sniffer
from qk_sniffer.errors import StoreError

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.slow
def test_the_ranges_are_those_of_all_keys(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    post = qk_sniffer.open_dataset(undisturbed(capture=statistics()))
    pre = qk_sniffer.open_dataset(undisturbed(capture=statistics() | {"capture_pre_rope": True}))
    folder = qk_sniffer.export(post, "kv_scales", tmp_path / "scales")
    scales, ranges = load_file(folder / "kv_scales.safetensors"), load_file(folder / "key_ranges.safetensors")
    by_head = load_file(folder / "kv_scales_by_head.safetensors")
    assert by_head.keys() == scales.keys()
    for name in ("kv_scales.safetensors", "kv_scales_by_head.safetensors"):
        with safe_open(folder / name, "numpy") as file:
            assert file.metadata() == {"format": "pt", "scales_of": "key"}
    again = [qk_sniffer.export(post, "kv_scales", tmp_path / str(number)) for number in range(8)]
    assert len({(each / "kv_scales.safetensors").read_bytes() for each in again}) == 1
    assert {*scales} == {f"model.layers.{layer}.self_attn.k_scale" for layer in range(3)}
    for layer in range(3):
        keys = np.stack([rows_of(post, layer, head, "k") for head in range(2)])
        scale = scales[f"model.layers.{layer}.self_attn.k_scale"]
        assert scale.shape == (1,) and scale.dtype == np.float32
        assert scale == pytest.approx(np.abs(keys).max() / 448)
        assert ranges[f"layers.{layer}.k_scale"] == pytest.approx(np.abs(keys).max(axis=(1, 2)) / 448)
        of_heads = by_head[f"model.layers.{layer}.self_attn.k_scale"]
        assert of_heads.shape == (2, 1, 1) and of_heads.ravel() == pytest.approx(np.abs(keys).max(axis=(1, 2)) / 448)
        before = np.stack([rows_of(pre, layer, head, "k") for head in range(2)])
        for start, rows in ((f"layers.{layer}.", keys), (f"layers.{layer}.pre.", before)):
            assert np.array_equal(ranges[f"{start}minimum"], rows.min(axis=1))
            assert np.array_equal(ranges[f"{start}maximum"], rows.max(axis=1))
            assert np.array_equal(ranges[f"{start}absmax"], np.abs(rows).max(axis=1))


@pytest.mark.slow
def test_values_that_were_captured_have_scales_too(folder_of: FolderOf, texts: Path, tmp_path: Path) -> None:
    for name in ("qwen3_sliding", "deepseek_v3"):  # the values of the second one are narrower than its keys
        root = run(folder_of(BY_NAME[name]), texts, tmp_path / name, capture=statistics() | {"capture_values": True})
        dataset = qk_sniffer.open_dataset(root)
        folder = qk_sniffer.export(dataset, "kv_scales", tmp_path / f"{name}-scales")
        scales, ranges = (load_file(folder / f"{file}.safetensors") for file in ("kv_scales", "value_ranges"))
        by_head = load_file(folder / "kv_scales_by_head.safetensors")
        modules = {f"model.layers.{layer}.self_attn" for layer in range(3)}
        assert scales.keys() == by_head.keys() == {f"{module}.{kind}_scale" for module in modules for kind in "kv"}
        noted = json.loads((folder / "provenance.json").read_text())["scales"]
        assert noted["of"] == ["key", "value"] and "missing" not in noted
        for layer in range(3):
            heads = [key.head for key in dataset.heads if (key.layer, key.kind) == (layer, "v")]
            values = np.stack([rows_of(dataset, layer, head, "v") for head in heads])
            module = f"model.layers.{layer}.self_attn"
            assert scales[f"{module}.v_scale"] == pytest.approx(np.abs(values).max() / 448)
            assert by_head[f"{module}.v_scale"].ravel() == pytest.approx(np.abs(values).max(axis=(1, 2)) / 448)
            assert np.array_equal(ranges[f"layers.{layer}.absmax"], np.abs(values).max(axis=1))
            assert np.array_equal(ranges[f"layers.{layer}.minimum"], values.min(axis=1))
        assert not any(".pre." in each for each in ranges)


def test_a_layer_without_attention_has_no_scale(folder_of: FolderOf, texts: Path, tmp_path: Path) -> None:
    checkpoint = folder_of(BY_NAME["mllama"])
    dataset = without_rows(checkpoint, texts, tmp_path / "out")
    folder = qk_sniffer.export(dataset, "kv_scales")
    scales = load_file(folder / "kv_scales.safetensors")
    stored = [*load_file(checkpoint / "model.safetensors")]
    modules = [name.removesuffix(".k_scale") for name in scales]
    assert len(modules) == 2 and all(f"{module}.k_proj.weight" in stored for module in modules)
    noted = json.loads((folder / "provenance.json").read_text())["scales"]
    assert noted["of"] == ["key"] and noted["missing"] == ["value"] and "448" in noted["scale"]


@pytest.mark.slow
@pytest.mark.parametrize("values", [False, True])
def test_the_loader_of_compressed_tensors_reads_the_scales(
    values: bool, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    """transformers loads such checkpoints with the package compressed-tensors."""
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    dataset = without_rows(checkpoint, texts, tmp_path / "out", capture_values=values)
    folder = qk_sniffer.export(dataset, "kv_scales", tmp_path / "scales")
    entry = json.loads((folder / "quantization_config.json").read_text())
    config = json.loads((checkpoint / "config.json").read_text())
    for strategy, name in (("tensor", "kv_scales"), ("attn_head", "kv_scales_by_head")):
        entry["quantization_config"]["kv_cache_scheme"]["strategy"] = strategy
        parsed = QuantizationConfig.model_validate(entry["quantization_config"])
        assert parsed.kv_cache_scheme is not None and parsed.kv_cache_scheme.num_bits == 8
        scales = load_file(folder / f"{name}.safetensors")
        quantized = tmp_path / strategy
        quantized.mkdir()
        save_file(
            load_file(checkpoint / "model.safetensors") | scales, quantized / "model.safetensors", {"format": "pt"}
        )
        (quantized / "config.json").write_text(json.dumps(config | entry))
        model, info = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        assert info["missing_keys"] == {each.replace("k_scale", "v_scale") for each in scales} - {*scales}
        state = model.state_dict()
        for each, numbers in scales.items():
            assert np.array_equal(state[each].numpy(), numbers)


@pytest.mark.slow
def test_a_model_whose_modules_have_no_names_is_refused(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    without_rows(checkpoint, texts, tmp_path / "out")
    dataset = edited(tmp_path / "out", module=None)
    with pytest.raises(StoreError, match="modules of layers 2 have no known names in the checkpoint"):
        qk_sniffer.export(dataset, "kv_scales")


@pytest.mark.slow
def test_ranges_that_miss_keys_are_refused(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "some", layers=[1], heads=[0], **statistics(skip_tokens=2))
    with pytest.raises(StoreError) as refused:
        qk_sniffer.export(dataset, "kv_scales")
    text = str(refused.value)
    assert "nothing of layers 0, 2, which have attention: capture all with capture.layers=null" in text
    assert "nothing of the heads l01h01k" in text
    assert "leave out the first 2 tokens of each text, whose keys are quantized too" in text
    assert "capture.full_attention_only=false and capture.head_sampling.count=null" in text
    pre = without_rows(checkpoint, texts, tmp_path / "pre", **statistics(stages=["pre"]))
    with pytest.raises(StoreError, match=r"no statistics of key vectors after RoPE"):
        qk_sniffer.export(pre, "kv_scales")


def test_scales_of_some_segments_alone_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"dataset": COLUMNS, "verify": {"examples": 0}, "capture": statistics()}
    sampler = {"type": "none", "segments": ["assistant"]}
    root = run(checkpoint, write(tmp_path / "ids.jsonl"), tmp_path / "out", sampler=sampler, **sections)
    with pytest.raises(StoreError, match=r"of the segments assistant alone, .*sampler\.segments=null"):
        qk_sniffer.export(root, "kv_scales")
    provenance = qk_sniffer.export(root, "tria").with_name("out-triattention.tria.json")
    assert json.loads(provenance.read_text())["segments"] == ["assistant"]


@pytest.mark.slow
def test_a_module_that_two_layers_name_has_no_scale(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    """As a dataset of someone else may say: the scales of one layer would take the place of the other's."""
    root = copied(undisturbed(capture=statistics()), tmp_path / "out")

    def share(manifest: dict[str, Any]) -> None:
        layers = manifest["model"]["layers"]
        layers[2]["module"] = layers[0]["module"]

    edit(root, share)
    with pytest.raises(StoreError, match=r"layers 0, 2 have the same attention module in manifest\.json"):
        qk_sniffer.export(root, "kv_scales", tmp_path / "scales")
    assert not (tmp_path / "scales").exists()
