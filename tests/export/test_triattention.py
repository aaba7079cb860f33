"""Tests the file of TriAttention with a reader of its format, against float64 over the rows before RoPE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import FolderOf
from support.export_cases import edited, halves, rows_of, statistics, without_rows
from support.jobs import TEXTS
from support.zoo import CASES

import qk_sniffer
from qk_sniffer.errors import StoreError

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def pre(undisturbed: Callable[..., Path]) -> Path:
    """A dataset of every row before RoPE."""
    return undisturbed(capture=statistics() | {"capture_pre_rope": True})


def read(path: Path) -> tuple[dict[str, Any], dict[tuple[int, int], dict[str, np.ndarray]]]:
    """Reads the file as TriAttention does: the metadata, and the arrays of each head that it lists."""
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"metadata", "stats"}
    heads = {}
    for layer, head in content["metadata"]["sampled_heads"]:
        tensors = content["stats"].pop(f"layer{layer:02d}_head{head:02d}")
        assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors.values())
        heads[layer, head] = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert not content["stats"]
    return content["metadata"], heads


def test_the_numbers_are_those_of_the_queries_before_rope(pre: Path, tmp_path: Path) -> None:
    dataset = qk_sniffer.open_dataset(pre)
    path = qk_sniffer.export(dataset, "triattention", tmp_path / "new" / "stats.pt")
    metadata, heads = read(path)
    assert [*heads] == [(layer, head) for layer in range(3) for head in range(4)]
    for (layer, head), found in heads.items():
        expected = halves(rows_of(dataset, layer, head))
        assert found.keys() == {"q_mean_real", "q_mean_imag", "q_abs_mean"}
        assert found["q_mean_real"] == pytest.approx(expected.mean(axis=0).real, abs=1e-5)
        assert found["q_mean_imag"] == pytest.approx(expected.mean(axis=0).imag, abs=1e-5)
        assert found["q_abs_mean"] == pytest.approx(np.abs(expected).mean(axis=0), rel=1e-5)
        assert found["q_abs_mean"].shape == (8,)
    assert metadata["head_dim"] == 16 and metadata["num_traces"] == len(TEXTS)
    assert metadata["rope_style"] == "half" and metadata["rope_type"] == "default"
    provenance = metadata["provenance"]
    assert provenance["model_commit"] == dataset.manifest["commits"]["model"]
    assert provenance["tokens"] == sum(map(len, TEXTS)) and provenance["skip_tokens"] == 0
    assert [path.name for path in path.parent.iterdir()] == ["stats.pt"], "the provenance is in the file"


def test_heads_that_were_not_captured_are_not_listed(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "out", layers=[0, 2], heads=[1, 3])
    _, heads = read(qk_sniffer.export(dataset, "triattention"))
    assert [*heads] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert (tmp_path / "out-triattention.pt").is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("glm4", r"layers 0-2 rotate neighbouring components \(neighbours\)"),
        ("phi3", r"layers 0-2 rotate 4 of 8 components, and the method needs RoPE over whole heads"),
        ("smollm3", r"layers 2 have no RoPE, .*leave them out with capture\.layers"),
        pytest.param("llama4", r"layers 0, 2 rotate neighbouring .*\n.*layers 1 have no RoPE", marks=pytest.mark.slow),
        pytest.param("gpt_neox", r"layers 0-2 rotate 2 of 8 components", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("format", ["triattention", "tria"])
def test_other_rotations_are_refused(
    name: str, reason: str, format: str, folder_of: FolderOf, texts: Path, tmp_path: Path
) -> None:
    dataset = without_rows(folder_of(BY_NAME[name]), texts, tmp_path / "out", layers=None)
    with pytest.raises(StoreError, match=f"(?s)cannot be exported as {format}:\n.*{reason}"):
        qk_sniffer.export(dataset, format, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_bias": True}, "layers 2 add a bias by position"),
        ({"rotation": "not recorded: it is odd"}, "layers 2 have a rotation that is not recorded: it is odd"),
        (
            {"num_q_heads": 6, "key_head": [0, 0, 0, 1, 1, 1]},
            "its layers differ .4 query and 2 key heads of 16 numbers",
        ),
    ],
)
def test_layers_that_it_cannot_express_are_refused(
    changes: dict[str, Any], reason: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    without_rows(checkpoint, texts, tmp_path / "out")
    with pytest.raises(StoreError, match=reason):
        qk_sniffer.export(edited(tmp_path / "out", **changes), "triattention")


def test_queries_that_change_after_rope_are_refused(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "out")
    rotation = dataset.manifest["model"]["layers"][-1]["rotation"]
    for change, reason in [({"changed_after": True}, "normalize queries after RoPE"), ({"direction": -1}, "direction")]:
        with pytest.raises(StoreError, match=reason):
            qk_sniffer.export(edited(tmp_path / "out", rotation=rotation | change), "triattention")
