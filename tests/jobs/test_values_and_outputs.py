"""Jobs with `capture_values` and `capture_outputs`: exact vectors at the positions of keys and queries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import FolderOf
from support.jobs import TEXTS, hashes, heads_of, keys, run, stopped_after, tokens_of, vectors
from support.unmodified import received, whole
from support.zoo import CASES, Case

import qk_sniffer
from qk_sniffer.backbone import backbone as backbone_module
from qk_sniffer.backbone import banded_attention
from qk_sniffer.backbone.family import Family
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import CaptureError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import parse_head_name
from qk_sniffer.store.rows import Slot

BOTH = {"capture_values": True, "capture_outputs": True}
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: case.name,
)
def test_they_are_what_the_unmodified_model_attends_to_and_returns(
    case: Case, folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
    root = run(
        folder_of(case),
        path,
        tmp_path / "out",
        model={"dtype": "bfloat16"},
        inference={"batch_size": 1, "banded_attention": False},
        capture=BOTH | {"capture_queries": False, "capture_keys": False},
    )
    model = whole(case, folder_of(case), dtype="bfloat16")
    expected = [received(model, tokens_of(text), monkeypatch) for text in TEXTS[:3]]
    tables = heads_of(root)
    assert len(tables) == len(case.layers) * (4 + case.config().get_text_config().num_key_value_heads)
    for name, table in tables.items():
        key = parse_head_name(name)
        assert key is not None and key.kind in "vo"
        of_texts = torch.cat([seen[key.layer, key.kind][0, key.head] for seen in expected]).float().numpy()
        assert np.array_equal(vectors(table), of_texts)
        assert keys(table) == [(i, p) for i in range(3) for p in range(len(TEXTS[i]))]
    if case.name == "deepseek_v3":
        assert {vectors(table).shape[1] for table in tables.values()} == {12}
        assert manifests.read(root)["model"]["layers"][0]["head_dim"] == 24
    assert verify(root).problems == 0


def test_outputs_of_banded_attention_are_those_of_its_kernel(
    folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "text.jsonl", TEXTS[23]
    path.write_text(json.dumps({"text": text}) + "\n")
    returned: list[torch.Tensor] = []
    real = banded_attention._banded_attention

    def noting(*args: Any, **kwargs: Any) -> Any:
        output, weights = real(*args, **kwargs)
        is_real = output.device.type != "meta"  # the plan of a job runs the decoder without weights
        if is_real and isinstance(args[5], banded_attention.Band) and output.shape[1] == len(text):
            returned.append(output.clone())
        return output, weights

    monkeypatch.setattr(banded_attention, "_banded_attention", noting)
    case, values = BY_NAME["mistral"], {"capture": BOTH, "verify": {"examples": 0}}
    banded = heads_of(run(folder_of(case), path, tmp_path / "banded", **values))
    plain = heads_of(run(folder_of(case), path, tmp_path / "plain", **values, inference={"banded_attention": False}))
    assert len(returned) == 3
    for name, table in banded.items():
        key = parse_head_name(name)
        assert key is not None
        if key.kind == "o":
            assert np.array_equal(vectors(table), returned[key.layer][0, :, key.head].numpy())
        np.testing.assert_allclose(vectors(table), vectors(plain[name]), rtol=1e-4, atol=1e-5)


SAMPLERS: dict[str, dict[str, Any]] = {
    "log_uniform": {"type": "log_uniform", "base_rate": 6.0},
    "uniform": {"type": "uniform", "base_rate": 4.0},
    "the same for all": {"type": "uniform", "base_rate": 4.0, "share": "example"},
    "all keys": {"type": "uniform", "base_rate": 4.0, "keys": {"type": "all"}},
    "more keys": {"type": "uniform", "base_rate": 2.0, "keys": {"base_rate": 6.0}},
    "few rows": {"type": "uniform", "base_rate": 4.0, "max_rows_per_example": 5},
    "few rows of all": {"type": "all", "max_rows_per_example": 5, "share": "example"},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=[*SAMPLERS])
def test_values_have_the_rows_of_keys_and_outputs_those_of_queries(
    sampler: dict[str, Any], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"sampler": sampler, "verify": {"examples": 0}, "dataset": {"max_samples": 6}}
    root = run(checkpoint, texts, tmp_path / "out", capture=BOTH, **sections)
    alone = run(
        checkpoint,
        texts,
        tmp_path / "alone",
        capture=BOTH | {"capture_queries": False, "capture_keys": False, "heads": [0, 3]},
        **sections,
    )
    tables, others = heads_of(root), heads_of(alone)
    assert {name for name in tables if name[-1] in "vo"} >= {*others}
    assert {name for name in others if name.startswith("l02")} == {"l02h00o", "l02h03o", "l02h00v", "l02h01v"}
    places = ["bucket", "example_id", "position", "sliding_window"]
    for name, table in tables.items():
        of = {"v": "k", "o": "q"}.get(name[-1], name[-1])
        assert len(table) > 0 and table.select(places).equals(tables[name[:-1] + of].select(places))
    for name, table in others.items():
        assert table.equals(tables[name]), "rows do not depend on the other kinds"
    assert verify(root).problems == verify(alone).problems == 0


def test_an_output_is_the_sum_of_the_values_by_the_weights_of_its_query(
    undisturbed: Callable[..., Path],
) -> None:
    dataset = qk_sniffer.open_dataset(undisturbed(capture=BOTH))
    for layer in dataset.manifest["model"]["layers"]:
        number, window = layer["layer"], layer["sliding_window"]
        for head in range(4):
            key_head = dataset.key_head(number, head)
            (q, at, examples), (k, *_), (v, *_), (o, *_) = (
                dataset.vectors(number, of, kind)
                for of, kind in ((head, "q"), (key_head, "k"), (key_head, "v"), (head, "o"))
            )
            mine = examples == 5
            distance = at[mine][:, None] - at[mine][None]
            logits = layer["softmax_scale"] * q[mine].astype(np.float64) @ k[mine].T
            logits[(distance < 0) | (distance >= (window or len(at)))] = -np.inf
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            expected = weights / weights.sum(axis=1, keepdims=True) @ v[mine]
            np.testing.assert_allclose(o[mine], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_job_shards_and_growth_end_with_the_same_bytes(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    sections: dict[str, Any] = {
        "capture": BOTH,
        "sampler": {"type": "uniform", "base_rate": 4.0, "keys": {"type": "all"}},
        "inference": {"batch_size": 1},
    }
    root = undisturbed(**sections)
    assert len(heads_of(root)) == 3 * 2 * (4 + 2)
    stopped_after(5, checkpoint, texts, tmp_path / "stopped", **sections)
    run(checkpoint, texts, tmp_path / "grown", **sections, dataset={"max_samples": 9})
    for name, shards in (("stopped", 1), ("grown", 1), ("sharded", 2)):
        for index in range(shards):
            run(checkpoint, texts, tmp_path / name, **sections, shard={"count": shards, "index": index})
        assert hashes(tmp_path / name) == hashes(root), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", "vo")
def test_a_wrong_vector_is_not_proven(
    kind: str, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"capture": BOTH, "inference": {"batch_size": 1}, "dataset": {"max_samples": 4}}
    right = manifests.read(run(checkpoint, texts, tmp_path / "right", **sections))["proof"]
    assert right["proven"] is True and right["heads"] == 36 and right["uncovered"] == []
    commit = JournalWriter.commit

    def of_another_head(self: JournalWriter, slot: Slot, event: None) -> None:
        if slot.kind == kind and slot.layer == 1:
            slot.vectors.copy_(slot.vectors.roll(1, dims=0))
        commit(self, slot, event)

    monkeypatch.setattr(JournalWriter, "commit", of_another_head)
    with pytest.raises(CaptureError, match=r"the proof of .* failed, and the dataset was not published"):
        run(checkpoint, texts, tmp_path / "wrong", **sections)
    proof = manifests.read(tmp_path / "wrong")["proof"]
    assert proof["proven"] is False
    too_large = {layer for layer, most in proof["largest_difference_by_layer"].items() if most > proof["tolerance"]}
    assert too_large == {"1"}


def test_values_that_a_proof_cannot_derive_are_named(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Family, "projected_value", lambda *_: None)
    proof = manifests.read(run(checkpoint, texts, tmp_path / "out", capture=BOTH | {"layers": [0]}))["proof"]
    reason = "no hook path is known for the values of this family of models"
    assert proof["proven"] is True
    assert proof["uncovered"] == [{"layer": 0, "kind": kind, "reason": reason} for kind in "ov"]
    assert f"(no values in layer 0: {reason}, no outputs in layer 0: {reason})" in capsys.readouterr().out


def test_a_kind_that_the_model_does_not_show_is_refused_at_the_start(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_module, "_value_dim", lambda call: "it has none" if call.layer == 1 else 16)
    reason = r"the values of qwen3, layer 1, cannot be captured: it has none. Set capture.capture_values=false"
    with pytest.raises(CaptureError, match=reason):
        run(checkpoint, texts, tmp_path / "out", capture={"capture_values": True})
    assert not (tmp_path / "out").exists()
    others = {"capture_values": True, "layers": [0, 2]}
    assert len(heads_of(run(checkpoint, texts, tmp_path / "others", capture=others))) == 2 * (4 + 2 + 2)


def test_the_last_layer_runs_its_kernel_for_outputs_alone(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    capture = {"capture_outputs": True, "capture_queries": False, "capture_keys": False, "layers": [1]}
    found = heads_of(run(checkpoint, texts, tmp_path / "out", capture=capture))
    assert found.keys() == {f"l01h{head:02d}o" for head in range(4)}
    of_all = heads_of(undisturbed(capture=BOTH))
    for name, table in found.items():
        assert keys(table) == keys(of_all[name])
        np.testing.assert_allclose(vectors(table), vectors(of_all[name]), rtol=1e-4, atol=1e-5)
