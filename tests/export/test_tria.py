"""Tests the TRIA file with a reader of its format, against float64 over the rows before RoPE."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backbones import FolderOf
from support.export_cases import halves, rows_of, statistics, without_rows
from support.zoo import CASES

import qk_sniffer
from qk_sniffer.errors import StoreError

BY_NAME = {case.name: case for case in CASES}


def read(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Reads a file number by number: the header, the budget scales, and (layers, heads, 4, frequencies)."""
    data = path.read_bytes()
    names = ("magic", "version", "num_layers", "num_heads", "num_kv_heads", "head_dim", "freq_count")
    header: dict[str, Any] = {name: int.from_bytes(data[4 * i : 4 * i + 4], "little") for i, name in enumerate(names)}
    header["rope_theta"], header["attn_scale"] = struct.unpack("<ff", data[28:36])
    assert data[36:64] == bytes(28)
    layers, heads, f = header["num_layers"], header["num_heads"], header["freq_count"]
    numbers = np.array([struct.unpack_from("<f", data, at)[0] for at in range(64, len(data), 4)])
    assert len(numbers) == layers + layers * heads * 4 * f
    return header, numbers[:layers], numbers[layers:].reshape(layers, heads, 4, f)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_queries_before_rope(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    dataset = qk_sniffer.open_dataset(undisturbed(capture=statistics() | {"capture_pre_rope": True}))
    path = qk_sniffer.export(dataset, "tria", tmp_path / "stats.tria")
    header, budgets, heads = read(path)
    assert header == {
        **{"magic": 0x54524941, "version": 2, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        **{"freq_count": 8, "rope_theta": 10000.0, "attn_scale": 1.0},
    }
    assert path.read_bytes()[:4] == b"AIRT"
    assert budgets.tolist() == [1.0] * 3
    for layer in range(3):
        for head in range(4):
            expected = halves(rows_of(dataset, layer, head))
            mean, modulus = expected.mean(axis=0), np.abs(expected).mean(axis=0)
            real, imag, length, ratio = heads[layer, head]
            assert real == pytest.approx(mean.real, abs=1e-5) and imag == pytest.approx(mean.imag, abs=1e-5)
            assert length == pytest.approx(modulus, rel=1e-5)
            assert ratio == pytest.approx(np.abs(mean) / modulus, abs=1e-5)
    provenance = json.loads((tmp_path / "stats.tria.json").read_text())
    assert provenance["model_commit"] == dataset.manifest["commits"]["model"]


def test_heads_that_were_not_captured_are_zeros(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "out", layers=[0], heads=[1, 3])
    header, _, heads = read(qk_sniffer.export(dataset, "tria"))
    assert header["num_layers"] == 3, "those of the model"
    assert (np.abs(heads).sum(axis=(2, 3)) > 0).tolist() == [[False, True, False, True], [False] * 4, [False] * 4]


@pytest.mark.parametrize("name", ["llama3_rope", pytest.param("qwen3_yarn", marks=pytest.mark.slow)])
def test_frequencies_of_no_single_base_are_refused(name: str, folder_of: FolderOf, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(folder_of(BY_NAME[name]), texts, tmp_path / "out")
    with pytest.raises(StoreError, match="not the powers of one rope_theta"):
        qk_sniffer.export(dataset, "tria")
    assert qk_sniffer.export(dataset, "triattention").is_file(), "this format has no frequencies"
