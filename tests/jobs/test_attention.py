"""Jobs with `capture.attention`: summaries are aligned with the queries, survive kills, and are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from summaries import summarized
from support.jobs import TEXTS, hashes, run, stopped_after, tokens_of
from support.verify_cases import edit, rewrite, with_values, wrong

import qk_sniffer
from qk_sniffer.backbone import backbone as backbone_module
from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.config import ModelConfig, from_dict
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.validation import problems

ATTENTION: dict[str, Any] = {"enabled": True, "top_k": 5, "sink_tokens": 3}
SECTIONS: dict[str, Any] = {
    "capture": {"attention": ATTENTION},
    "sampler": {"type": "uniform", "base_rate": 4.0},
    "inference": {"batch_size": 1},
    "verify": {"examples": 0},
}
KEYS = ["bucket", "example_id", "position"]


@pytest.fixture(scope="module")
def whole(undisturbed: Callable[..., Path]) -> Path:
    """The dataset of an undisturbed job; read-only."""
    return undisturbed(**SECTIONS)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.slow
def test_summaries_are_those_of_the_queries_row_for_row(whole: Path, checkpoint: Path) -> None:
    assert verify(whole).problems == 0
    dataset = qk_sniffer.open_dataset(whole)
    backbone = load_backbone(ModelConfig(name=str(checkpoint), dtype="float32"))
    calls: dict[int, AttentionCall] = {}
    backbone.forward(tokens_of(TEXTS[5]), lambda call: calls.update({call.layer: call}))
    queries = [key for key in dataset.heads if key.kind == "q"]
    assert len(queries) == 12 and {key.kind for key in dataset.heads} == {"q", "k"}
    for layer, head, _ in queries:
        summary, rows = dataset.attention_summary(layer, head), dataset.vectors(layer, head, "q")
        np.testing.assert_array_equal(summary.positions, rows.positions)
        np.testing.assert_array_equal(summary.example_ids, rows.example_ids)
        of_text = summary.example_ids == 5
        expected = summarized(calls[layer], 0).columns
        assert of_text.any()
        for name in ("num_keys", "logsumexp", "entropy", "first_mass", "top_position", "top_weight"):
            found = getattr(summary, name)[of_text]
            np.testing.assert_allclose(found, expected[name][head, summary.positions[of_text]], rtol=1e-4, atol=1e-5)
    files = {path.parent.name: pq.read_table(path) for path in whole.glob("l*h*[qa]/data.parquet")}
    assert files["l01h02a"].select(KEYS).equals(files["l01h02q"].select(KEYS))
    assert summary.bin_edges.tolist() == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095, 8191]
    assert summary.distance_mass.shape[1] == 13, "4,096 tokens at most"


@pytest.mark.slow
def test_a_stopped_job_shards_and_growth_end_with_the_same_bytes(
    whole: Path, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    stopped_after(5, checkpoint, texts, tmp_path / "stopped", **SECTIONS)
    grown = run(checkpoint, texts, tmp_path / "grown", **SECTIONS, dataset={"max_samples": 9})
    assert pq.read_metadata(grown / "l00h00a/data.parquet").num_rows > 0
    for root, shards in ((tmp_path / "stopped", 1), (grown, 1), (tmp_path / "sharded", 2)):
        for index in range(shards):
            run(checkpoint, texts, root, **SECTIONS, shard={"count": shards, "index": index})
        assert hashes(root) == hashes(whole)


@pytest.mark.slow
def test_every_row_in_pieces_has_the_summaries_of_the_sampled_ones(
    whole: Path, checkpoint: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    everything = SECTIONS | {"sampler": {"type": "all"}, "inference": {"batch_size": 1, "queue_mb": 1}}
    caplog.set_level("INFO")
    root = run(checkpoint, texts, tmp_path / "all", **everything)
    assert "about 100 % of the attention weights" in caplog.text
    sampled, of_all = (qk_sniffer.open_dataset(each).attention_summary(2, 1) for each in (whole, root))
    rows = {key: row for row, key in enumerate(zip(of_all.example_ids, of_all.positions, strict=True))}
    at = [rows[key] for key in zip(sampled.example_ids, sampled.positions, strict=True)]
    assert 0 < len(at) < len(rows)
    for name in ("logsumexp", "entropy", "distance_mass", "top_weight"):
        np.testing.assert_allclose(getattr(of_all, name)[at], getattr(sampled, name), rtol=1e-5, atol=1e-6)


def test_with_vectors_before_rope_the_attention_is_that_of_the_vectors_after_it(
    whole: Path, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    before = SECTIONS | {"capture": SECTIONS["capture"] | {"capture_pre_rope": True, "heads": [1, 2, 3]}}
    root = run(checkpoint, texts, tmp_path / "pre", **before)
    assert "although the vectors are from before RoPE" in (root / "README.md").read_text()
    pre, post = (qk_sniffer.open_dataset(each) for each in (root, whole))
    assert not np.array_equal(pre.vectors(1, 2, "q").vectors, post.vectors(1, 2, "q").vectors)
    for name in ("logsumexp", "entropy", "top_position"):
        found, expected = (getattr(each.attention_summary(1, 2), name) for each in (pre, post))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_model_whose_attention_is_not_known_is_refused_at_the_start(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_module, "why_unknown", lambda call: "its kernel is odd" if call.layer == 1 else None)
    reason = "capture.attention.enabled is true, but the attention of layer 1 cannot be summarized: its kernel is odd"
    with pytest.raises(ConfigError, match=reason):
        run(checkpoint, texts, tmp_path / "out", **SECTIONS)
    assert not (tmp_path / "out").exists()
    others = {**SECTIONS, "capture": {"attention": ATTENTION, "layers": [0, 2]}}
    assert verify(run(checkpoint, texts, tmp_path / "others", **others)).problems == 0


def test_settings_that_leave_nothing_to_summarize_are_refused() -> None:
    def lines(**sections: Any) -> list[str]:
        values = {"model": {"name": "org/model"}, "dataset": {"path": "pydoc"}} | sections
        return [line for line in problems(from_dict(values)) if "attention" in line]

    assert lines(capture={"attention": ATTENTION}) == []
    assert "capture_queries is false" in lines(capture={"attention": ATTENTION, "capture_queries": False})[0]
    assert "sampler.type is none" in lines(capture={"attention": ATTENTION}, sampler={"type": "none"})[0]
    assert "it must be 1 to 1024" in lines(capture={"attention": {"top_k": 0}})[0]
    assert "it must be 1 to" in lines(capture={"attention": {"sink_tokens": 0}})[0]


def test_a_dataset_without_summaries_says_how_to_make_them(verify_base: Path, whole: Path) -> None:
    with pytest.raises(StoreError, match=r"has no attention summaries: capture\.attention\.enabled=true makes them"):
        qk_sniffer.open_dataset(verify_base).attention_summary(0, 0)
    with pytest.raises(StoreError, match="has no queries of layer 7, head 0; it has l00h00q, l00h01q"):
        qk_sniffer.open_dataset(whole).attention_summary(7, 0)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("column", "value", "finding"),
    [
        ("position", 1, "its rows are not those of the queries"),
        ("num_keys", 1000, "num_keys is not the number of keys that a query at this position sees"),
        ("sink_weight", 0.5, "the weights do not sum to 1 with that of the learned sink"),
        ("first_mass", 1.5, "the weights do not sum to 1 with that of the learned sink"),
        ("distance_mass", [0.0] * 12 + [1.0], "keys have a weight at distances that the query does not see"),
        ("entropy", 9.0, "the entropy is not possible for this number of keys"),
        ("effective_keys", 0.5, "effective_keys is not possible for this number of keys"),
        ("max_logit", 60.0, "max_logit, logsumexp and the largest weight do not belong together"),
        ("top_position", [3, 3, 1, 0, 2], "top_position and top_weight are not those of the largest weights"),
        ("top_weight", [0.0, 0.1, 0.0, 0.0, 0.0], "top_position and top_weight are not those of the largest weights"),
        ("entropy", float("nan"), "the number of rows with NaN or Inf differs from manifest.json"),
    ],
)
def test_verify_finds_impossible_numbers(column: str, value: Any, finding: str, copy: Path) -> None:
    rewrite(copy, "l01h03a/data.parquet", lambda table: with_values(table, column, {4: value}))
    found = wrong(str(verify(copy)))
    assert finding in found["attention"] and "attention head 3 of layer 1" in found["attention"]


def test_verify_finds_files_of_summaries_that_are_missing_or_in_surplus(copy: Path) -> None:
    (copy / "l00h00a/data.parquet").unlink()
    edit(copy, lambda manifest: manifest["files"].pop("l00h00a/data.parquet"))
    assert "manifest.json does not list the file of a captured head" in wrong(str(verify(copy)))["heads"]
    edit(copy, lambda manifest: manifest["config"]["capture"]["attention"].update(enabled=False))
    edit(copy, lambda manifest: manifest["fingerprint"].update({"capture.attention.enabled": False}))
    assert "manifest.json lists heads that no layer captures" in wrong(str(verify(copy)))["heads"]


def test_a_manifest_with_an_impossible_table_is_not_read(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    for section, key, value in (("attention", "top_k", 2**40), ("attention", "sink_tokens", 0)):
        changed = json.loads(json.dumps(manifest))
        changed["config"]["capture"][section][key] = value
        (copy / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(StoreError, match=key):
            qk_sniffer.open_dataset(copy)
