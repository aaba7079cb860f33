"""Tests the scales and ranges of keys against the rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.backbones import FolderOf
from support.export_cases import rows_of, statistics, without_rows
from support.zoo import CASES

import qk_sniffer
from qk_sniffer.errors import StoreError

BY_NAME = {case.name: case for case in CASES}


def test_the_ranges_are_those_of_all_keys(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    post = qk_sniffer.open_dataset(undisturbed(capture=statistics()))
    pre = qk_sniffer.open_dataset(undisturbed(capture=statistics() | {"capture_pre_rope": True}))
    folder = qk_sniffer.export(post, "kv_scales", tmp_path / "scales")
    scales, ranges = load_file(folder / "kv_scales.safetensors"), load_file(folder / "key_ranges.safetensors")
    assert {*scales} == {f"model.layers.{layer}.self_attn.k_scale" for layer in range(3)}
    for layer in range(3):
        keys = np.stack([rows_of(post, layer, head, "k") for head in range(2)])
        scale = scales[f"model.layers.{layer}.self_attn.k_scale"]
        assert scale.shape == (1,) and scale.dtype == np.float32
        assert scale == pytest.approx(np.abs(keys).max() / 448)
        assert ranges[f"layers.{layer}.k_scale"] == pytest.approx(np.abs(keys).max(axis=(1, 2)) / 448)
        before = np.stack([rows_of(pre, layer, head, "k") for head in range(2)])
        for start, rows in ((f"layers.{layer}.", keys), (f"layers.{layer}.pre.", before)):
            assert np.array_equal(ranges[f"{start}minimum"], rows.min(axis=1))
            assert np.array_equal(ranges[f"{start}maximum"], rows.max(axis=1))
            assert np.array_equal(ranges[f"{start}absmax"], np.abs(rows).max(axis=1))


def test_a_layer_without_attention_has_no_scale(folder_of: FolderOf, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(folder_of(BY_NAME["mllama"]), texts, tmp_path / "out")
    scales = load_file(qk_sniffer.export(dataset, "kv_scales") / "kv_scales.safetensors")
    assert {*scales} == {"model.layers.0.self_attn.k_scale", "model.layers.2.self_attn.k_scale"}


def test_ranges_that_miss_keys_are_refused(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "some", layers=[1], heads=[0], **statistics(skip_tokens=2))
    with pytest.raises(StoreError) as refused:
        qk_sniffer.export(dataset, "kv_scales")
    text = str(refused.value)
    assert "nothing of layers 0, 2, which have attention: capture all with capture.layers=null" in text
    assert "nothing of the heads l01h01k" in text
    assert "leave out the first 2 tokens of each text, whose keys are quantized too" in text
    pre = without_rows(checkpoint, texts, tmp_path / "pre", **statistics(stages=["pre"]))
    with pytest.raises(StoreError, match=r"no statistics of key vectors after RoPE"):
        qk_sniffer.export(pre, "kv_scales")
