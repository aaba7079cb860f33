"""Tests the folders of kvpress against float64 over all rows, and with kvpress itself."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.backbones import FolderOf
from support.export_cases import edited, rows_of, statistics, without_rows
from support.jobs import TEXTS, run
from support.zoo import CASES

import qk_sniffer
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError

BY_NAME = {case.name: case for case in CASES}
REQUIREMENTS = Path(__file__).parents[1] / "data" / "kvpress.txt"


@pytest.fixture
def pre(undisturbed: Callable[..., Path]) -> Dataset:
    """A dataset of every row before RoPE, whose statistics leave out four tokens of each text."""
    return qk_sniffer.open_dataset(undisturbed(capture=statistics(skip_tokens=4) | {"capture_pre_rope": True}))


@pytest.fixture
def post(undisturbed: Callable[..., Path]) -> Dataset:
    """A dataset of every row after RoPE."""
    return qk_sniffer.open_dataset(undisturbed(capture=statistics(stages=["post"])))


def expected_filters(dataset: Dataset, skip: int = 0) -> np.ndarray:
    """The filters (layers, key heads, d) from a singular value decomposition of all finite queries from `skip` on."""
    filters = np.zeros((3, 2, 16))
    for layer in range(3):
        for head in range(4):
            rows = rows_of(dataset, layer, head, skip=skip)
            left, _, right = np.linalg.svd(rows[np.isfinite(rows).all(axis=1)], full_matrices=False)
            sign = 1 if (left[:, 0] > 0).mean() > 0.5 else -1
            filters[layer, head // 2] += -sign * right[0] / 2
    return filters


def test_expected_attention_has_the_moments_of_the_queries_before_rope(pre: Dataset, tmp_path: Path) -> None:
    folder = qk_sniffer.export(pre, "expected_attention", tmp_path / "stats")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "provenance.json"}
    tensors = load_file(folder / "model.safetensors")
    assert tensors["query_mean"].shape == (3, 4, 16) and tensors["query_cov"].shape == (3, 4, 16, 16)
    for layer in range(3):
        for head in range(4):
            rows = rows_of(pre, layer, head, skip=4)
            assert len(rows) == sum(len(text) - 4 for text in TEXTS)
            covariance = np.cov(rows.T)
            assert tensors["query_mean"][layer, head] == pytest.approx(rows.mean(axis=0), abs=1e-5)
            assert np.abs(tensors["query_cov"][layer, head] - covariance).max() < 1e-5 * np.abs(covariance).max()
    assert json.loads((folder / "config.json").read_text()) == {
        **{"num_layers": 3, "num_heads": 4, "head_dim": 16, "n_sink": 4, "num_samples": len(TEXTS)},
        "sample_seq_len": max(map(len, TEXTS)),
        "dataset_name": pre.manifest["fingerprint"]["dataset.path"],
        "model_name": pre.manifest["fingerprint"]["model.name"],
    }
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["model_commit"] == pre.manifest["commits"]["model"] and provenance["skip_tokens"] == 4


def test_filters_are_the_leading_directions_of_the_queries_after_rope(post: Dataset, tmp_path: Path) -> None:
    folder = qk_sniffer.export(post, "qfilters", tmp_path / "filters")
    filters = load_file(folder / "model.safetensors")["q_filters"]
    assert np.abs(filters - expected_filters(post)).max() < 1e-4
    arguments = {"num_layers": 3, "num_kv_heads": 2, "kv_head_dim": 16}
    assert json.loads((folder / "config.json").read_text()) == arguments
    assert json.loads((folder / "provenance.json").read_text())["sign_from"] == {"rows": 12}


def test_the_sign_follows_from_the_queries_that_the_statistics_count(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][40] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    root = run(folder, texts, tmp_path / "out", capture=statistics(skip_tokens=12), verify={"examples": 0})
    dataset = qk_sniffer.open_dataset(root)
    filters = load_file(qk_sniffer.export(dataset, "qfilters") / "model.safetensors")["q_filters"]
    assert np.abs(filters - expected_filters(dataset, skip=12)).max() < 1e-4


def test_queries_of_another_dataset_give_no_sign(post: Dataset, tmp_path: Path) -> None:
    root = Path(shutil.copytree(str(post.folder), tmp_path / "out"))
    path = root / "l01h02q" / "data.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(StoreError, match=r"l01h02q.* is damaged, or of another dataset: its sha256 differs"):
        qk_sniffer.export(root, "qfilters", tmp_path / "filters")
    assert not (tmp_path / "filters").exists()


@pytest.mark.slow
def test_without_rows_the_mean_gives_the_sign(post: Dataset, undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    root = undisturbed(sampler={"type": "none"}, capture=statistics(), verify={"examples": 0})
    folder = qk_sniffer.export(root, "qfilters", tmp_path / "filters")
    assert json.loads((folder / "provenance.json").read_text())["sign_from"] == {"mean": 12}
    for layer in range(3):
        expected = np.zeros((2, 16))
        for head in range(4):
            rows = rows_of(post, layer, head)
            right = np.linalg.svd(rows, full_matrices=False)[2][0]
            expected[head // 2] += -np.sign(rows.mean(axis=0) @ right) * right / 2
        filters = load_file(folder / "model.safetensors")["q_filters"][layer]
        assert np.abs(filters - expected).max() < 1e-4


@pytest.mark.slow
def test_what_the_formats_cannot_express_is_refused(
    checkpoint: Path, folder_of: FolderOf, texts: Path, tmp_path: Path
) -> None:
    dataset = without_rows(checkpoint, texts, tmp_path / "some", layers=[0, 2], heads=[1, 3])
    for name in ("expected_attention", "qfilters"):
        with pytest.raises(
            StoreError, match=r"(?s)nothing of layers 1, .*nothing of the heads l00h00q, l00h02q, l02h00q"
        ):
            qk_sniffer.export(dataset, name)
        with pytest.raises(StoreError, match="add a bias by position"):
            qk_sniffer.export(edited(tmp_path / "some", position_bias=True), name)
    with pytest.raises(StoreError, match=r"first tokens of each text, .*capture\.statistics\.skip_tokens=4"):
        qk_sniffer.export(dataset, "expected_attention")
    diagonal = without_rows(checkpoint, texts, tmp_path / "diagonal", **statistics(covariance=False))
    with pytest.raises(StoreError, match=r"capture\.statistics\.covariance=true"):
        qk_sniffer.export(diagonal, "qfilters")
    unrotated = without_rows(folder_of(BY_NAME["smollm3"]), texts, tmp_path / "unrotated", **statistics(skip_tokens=4))
    with pytest.raises(StoreError, match=r"layers 2 have no RoPE, .* in halves$"):
        qk_sniffer.export(unrotated, "expected_attention")
    gap = without_rows(folder_of(BY_NAME["mllama"]), texts, tmp_path / "gap")
    with pytest.raises(StoreError, match=r"layers 1, which have no self-attention, .*: no capture of this model"):
        qk_sniffer.export(gap, "qfilters")


def test_a_folder_with_other_files_is_not_replaced(post: Dataset, tmp_path: Path) -> None:
    folder = qk_sniffer.export(post, "qfilters", tmp_path / "filters")
    written = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="exists: give another output"):
        qk_sniffer.export(post, "qfilters", folder)
    qk_sniffer.export(post, "qfilters", folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == written
    (tmp_path / "filters.tmp").mkdir()
    qk_sniffer.export(post, "qfilters", folder, overwrite=True)
    (tmp_path / "filters.tmp").rmdir()
    (folder / "notes.txt").touch()
    with pytest.raises(StoreError, match=r"notes\.txt was not written by an export: remove it, or give another output"):
        qk_sniffer.export(post, "qfilters", folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["filters"]


@pytest.fixture(scope="session")
def kvpress() -> Path:
    """A folder with kvpress and an older transformers, from PyPI; kept in QK_SNIFFER_TEST_CACHE for later runs."""
    cache = Path(os.environ.get("QK_SNIFFER_TEST_CACHE", Path.home() / ".cache" / "qk-sniffer-tests"))
    folder = cache / "kvpress"
    stamp = folder / REQUIREMENTS.name
    if not stamp.is_file() or stamp.read_bytes() != REQUIREMENTS.read_bytes():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            target = Path(made, "kvpress")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
            done = subprocess.run([*command, "-r", str(REQUIREMENTS)], capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"kvpress comes from PyPI, which fails: {done.stderr}")
            shutil.copy(REQUIREMENTS, target)
            shutil.rmtree(folder, ignore_errors=True)
            target.rename(folder)
    return folder


USE = """
import sys
import torch
from kvpress import ExpectedAttentionStatsPress
from kvpress.presses.expected_attention_with_stats import ExpectedAttentionStats
from kvpress.presses.qfilter_press import QFilterPress, QFilters
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

checkpoint, stats_folder, filters_folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()
ids = torch.arange(1, 61)[None]
kept = {}
for name, press in [
    ("expected", ExpectedAttentionStatsPress(0.5, stats_folder=stats_folder)),
    ("filters", QFilterPress(0.5)),
]:
    if name == "filters":
        press.load_q_filters = lambda model_name: QFilters.from_pretrained(filters_folder).q_filters
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    kept[name] = torch.stack([layer.keys[0] for layer in cache.layers])
stats = ExpectedAttentionStats.from_pretrained(stats_folder)
read = {"mean": stats.query_mean, "cov": stats.query_cov, "q": QFilters.from_pretrained(filters_folder).q_filters}
tensors = {name: tensor.detach().clone() for name, tensor in (kept | read).items()}
save_file(tensors, out, {"n_sink": str(stats.n_sink), "model": stats.model_name})
"""


@pytest.mark.slow
def test_kvpress_loads_the_folders_and_its_presses_run(
    kvpress: Path, folder_of: FolderOf, texts: Path, tmp_path: Path
) -> None:
    folder = folder_of(BY_NAME["qwen3"])
    root = run(folder, texts, tmp_path / "out", capture=statistics(skip_tokens=4), verify={"examples": 0})
    stats, filters = qk_sniffer.export(root, "expected_attention"), qk_sniffer.export(root, "qfilters")
    out = tmp_path / "seen.safetensors"
    env = os.environ | {"PYTHONPATH": str(kvpress)}
    command = [sys.executable, "-c", USE, *map(str, (folder, stats, filters, out))]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, written = load_file(out), load_file(stats / "model.safetensors")
    assert np.array_equal(seen["mean"], written["query_mean"]) and np.array_equal(seen["cov"], written["query_cov"])
    assert np.array_equal(seen["q"], load_file(filters / "model.safetensors")["q_filters"])
    assert seen["expected"].shape == seen["filters"].shape == (3, 2, 30, 16), "half of the keys are kept"
    assert np.isfinite(seen["expected"]).all()
