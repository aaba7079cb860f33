"""Compares `Dataset.logits` and `Dataset.attention` with the attention weights of the unmodified eager models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import FolderOf
from support.jobs import TEXTS, run, tokens_of
from support.unmodified import whole
from support.verify_cases import edit
from support.zoo import CASES, Case

import qk_sniffer
from qk_sniffer.errors import StoreError

BY_NAME = {case.name: case for case in CASES}
FAMILIES = ["gemma2", "gpt_oss", "llama4", "ministral3", "mistral", "deepseek_v3", "gpt_neox"]
OFF = {"verify": {"examples": 0}}


def weights_of(case: Case, folder: Path, text: str) -> list[np.ndarray]:
    """The weights (H, n, n) of each layer."""
    model = whole(case, folder, kernel="eager")
    with torch.no_grad():
        found = model(input_ids=tokens_of(text), use_cache=False, output_attentions=True).attentions
    return [weights[0].double().numpy() for weights in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_those_of_the_eager_kernel(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    case, path, text = BY_NAME[name], tmp_path / "text.jsonl", TEXTS[15]
    path.write_text(json.dumps({"text": text}) + "\n")
    dataset = qk_sniffer.open_dataset(run(folder_of(case), path, tmp_path / "all", **OFF))
    few: dict[str, Any] = {
        "sampler": {"type": "uniform", "base_rate": 6.0},
        "capture": {"attention": {"enabled": True}},
    }
    sampled = qk_sniffer.open_dataset(run(folder_of(case), path, tmp_path / "few", **few, **OFF))
    for layer, expected in zip(case.layers, weights_of(case, folder_of(case), text), strict=True):
        for head in (0, 3):
            found, logits = dataset.attention(layer, head, 0), dataset.logits(layer, head, 0)
            assert found.query_positions.tolist() == found.key_positions.tolist() == [*range(len(text))]
            np.testing.assert_allclose(found.weights, expected[head], rtol=1e-3, atol=1e-5)
            assert np.array_equal(np.isfinite(logits.logits), found.weights > 0)
            assert logits.num_keys.tolist() == np.isfinite(logits.logits).sum(axis=1).tolist()
            sink = 0.0 if logits.sink is None else np.exp(logits.sink - found.logsumexp)
            np.testing.assert_allclose(found.weights.sum(axis=1) + sink, 1.0, rtol=1e-12)
            assert (logits.sink is not None) == case.sinks
            part = sampled.attention(layer, head, 0)
            assert 0 < part.weights.size < found.weights.size
            of_all = expected[head][np.ix_(part.query_positions, part.key_positions)]
            np.testing.assert_allclose(part.weights, of_all, rtol=1e-3, atol=1e-5)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_weights_times_values_are_the_outputs(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    case, path = BY_NAME[name], tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": TEXTS[15]}) + "\n")
    capture = {"capture_values": True, "capture_outputs": True, "attention": {"enabled": True}}
    dataset = qk_sniffer.open_dataset(run(folder_of(case), path, tmp_path / "all", capture=capture, **OFF))
    config = case.config().get_text_config()
    for layer in case.layers:
        for head in (0, config.num_attention_heads - 1):
            logsumexp = dataset.attention_summary(layer, head).logsumexp
            weights = np.exp(dataset.logits(layer, head, 0).logits - logsumexp[:, None].astype(np.float64))
            key_head = head * config.num_key_value_heads // config.num_attention_heads
            values = dataset.vectors(layer, key_head, "v").vectors
            np.testing.assert_allclose(
                weights @ values, dataset.vectors(layer, head, "o").vectors, rtol=1e-4, atol=1e-5
            )


@pytest.mark.slow
def test_weights_without_all_keys_are_refused(undisturbed: Callable[..., Path]) -> None:
    few = {"type": "uniform", "base_rate": 4.0}
    dataset = qk_sniffer.open_dataset(undisturbed(sampler=few))
    logits = dataset.logits(1, 2, 5)
    assert logits.logits.shape == (len(logits.query_positions), len(logits.key_positions))
    with pytest.raises(
        StoreError, match=r"head 2, example 5: the attention is not known: .* lack the key\. Capture all keys \(sampler"
    ):
        dataset.attention(1, 2, 5)
    every_key = qk_sniffer.open_dataset(undisturbed(sampler=few | {"keys": {"type": "all"}}))
    found = every_key.attention(1, 2, 5)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0)
    assert 0 < len(found.query_positions) < len(found.key_positions) == len(TEXTS[5])


@pytest.mark.slow
def test_what_does_not_give_logits_is_refused(
    undisturbed: Callable[..., Path], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    dataset = qk_sniffer.open_dataset(undisturbed())
    with pytest.raises(StoreError, match="has no example 99"):
        dataset.logits(0, 0, 99)
    with pytest.raises(StoreError, match="layer 0 has no query head 9"):
        dataset.logits(0, 9, 5)
    root = run(checkpoint, texts, tmp_path / "pre", capture={"capture_pre_rope": True}, **OFF)
    with pytest.raises(StoreError, match=r"from before RoPE: capture with capture\.capture_pre_rope=false"):
        qk_sniffer.open_dataset(root).attention(0, 0, 5)
    edit(root, lambda manifest: manifest["config"]["capture"].update(capture_pre_rope=False))
    for change, reason in (
        ({"position_bias": True}, "a bias is added to its logits"),
        ({"sparse_attention": True}, "only some of the keys before them"),
        ({"full_attention": False, "sliding_window": None}, "not known which keys"),
    ):
        edit(root, lambda manifest, change=change: manifest["model"]["layers"][0].update(change))
        with pytest.raises(StoreError, match=reason):
            qk_sniffer.open_dataset(root).logits(0, 0, 5)
        restored = {"position_bias": False, "sparse_attention": False}
        edit(root, lambda manifest, change=restored: manifest["model"]["layers"][0].update(change))


def test_files_of_another_dataset_are_not_multiplied(undisturbed: Callable[..., Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(undisturbed(), tmp_path / "out"))
    dataset = qk_sniffer.open_dataset(root)
    for name in ("l00h01q", "l00h00k"):
        path = root / name / "data.parquet"
        whole = path.read_bytes()
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
        with pytest.raises(StoreError, match=f"{name}.* is damaged, or of another dataset: its sha256 differs"):
            dataset.attention(0, 1, 5)
        path.write_bytes(whole)
    assert dataset.attention(0, 1, 5).weights.shape == (len(TEXTS[5]), len(TEXTS[5]))


def test_summaries_that_the_manifest_does_not_list_are_an_error(
    undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(undisturbed(), tmp_path / "out"))
    enabled = {"enabled": True, "top_k": 8, "sink_tokens": 4}
    edit(root, lambda manifest: manifest["config"]["capture"].update(attention=enabled))
    with pytest.raises(StoreError, match=r"l00h01a/data\.parquet of .*out is not listed in manifest\.json"):
        qk_sniffer.open_dataset(root).attention_summary(0, 1)
