"""Tests the proof of attention summaries: right ones pass it in every family, and wrong ones fail it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbones import FolderOf
from support.jobs import run
from support.zoo import CASES, Case

from qk_sniffer.capture import proof_vectors
from qk_sniffer.capture.proof_summaries import TOLERANCES
from qk_sniffer.dataset.card import branch_card
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import CaptureError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import ATTENTION
from qk_sniffer.store.rows import Slot

SECTIONS: dict[str, Any] = {
    "capture": {"attention": {"enabled": True, "top_k": 5, "sink_tokens": 3}},
    "sampler": {"type": "uniform", "base_rate": 4.0},
    "inference": {"batch_size": 2},
    "dataset": {"max_samples": 8},
}
QUICK = {"gemma2", "gpt_oss", "llama4", "deepseek_v3"}
"""Softcap and windows; learned sinks; chunks; a key head for each query head."""


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_right_summaries_are_proven(
    case: Case, dtype: str, folder_of: FolderOf, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(folder_of(case), texts, tmp_path / "out", **SECTIONS, model={"dtype": dtype})
    proof = manifests.read(root)["proof"]
    found = proof["summaries"]
    assert proof["proven"] is True and found["heads"] == 4 * len(case.layers) and found["uncovered"] == []
    assert found["largest_difference_by_layer"].keys() == {str(layer) for layer in case.layers}
    assert max(found["largest_difference_by_layer"].values()) < (1e-4 if dtype == "float32" else 0.05)
    line = f"attention summaries of {found['heads']} heads in all {len(case.layers)} layers"
    assert f"; {line}; attention itself " in capsys.readouterr().out
    card = branch_card(root, manifests.read(root), "me/vectors", "main").decode()
    assert f"A{line[1:]} were compared with\nthose of the queries" in card
    assert line in str(verify(root))


def other_head(slot: Slot) -> None:
    slot.vectors.copy_(slot.vectors.roll(1, dims=0))


def one_row_of_another_head(slot: Slot) -> None:
    slot.vectors[0, 0] = slot.vectors[1, 0]


def a_little_larger(slot: Slot) -> None:
    slot.vectors[:, :, 1:] *= 1.05  # all columns but num_keys


def other_positions(slot: Slot) -> None:
    places = slot.vectors[..., -10:-5].view(torch.int32)  # top_position
    places.copy_(torch.where(places > 0, places - 1, places))


def no_number(slot: Slot) -> None:
    slot.vectors[0, 0, 3] = torch.nan  # entropy


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "harm", [other_head, one_row_of_another_head, a_little_larger, other_positions, no_number], ids=lambda f: f.__name__
)
def test_wrong_summaries_fail_the_proof(
    harm: Callable[[Slot], None], checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = JournalWriter.commit

    def harmed(self: JournalWriter, slot: Slot, event: None) -> None:
        if slot.kind == ATTENTION and slot.layer == 1:
            harm(slot)
        commit(self, slot, event)

    monkeypatch.setattr(JournalWriter, "commit", harmed)
    with pytest.raises(CaptureError, match=r"Attention summaries derived a second time, .* differ by more than 0\.005"):
        run(checkpoint, texts, tmp_path / "out", **SECTIONS)
    proof = manifests.read(tmp_path / "out")["proof"]
    assert proof["proven"] is False
    assert max(proof["largest_difference_by_layer"].values()) < 1e-5, "the vectors are right"
    of_layers = proof["summaries"]["largest_difference_by_layer"]
    assert [layer for layer, most in of_layers.items() if not most <= TOLERANCES["float32"]] == ["1"]


@pytest.mark.slow
def test_layers_whose_attention_is_not_derived_are_named(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        proof_vectors, "_unknown_attention", lambda layer: "it is odd" if layer.heads.layer == 1 else None
    )
    proof = manifests.read(run(checkpoint, texts, tmp_path / "some", **SECTIONS))["proof"]
    assert proof["proven"] is True and proof["summaries"]["heads"] == 8
    assert proof["summaries"]["uncovered"] == [{"layer": 1, "kind": "q", "reason": "it is odd"}]
    line = "attention summaries of 8 of 12 heads in 2 of 3 layers (no queries in layer 1: it is odd)"
    assert line in capsys.readouterr().out
    monkeypatch.setattr(proof_vectors, "_unknown_attention", lambda layer: "it is odd")
    root = run(checkpoint, texts, tmp_path / "none", **SECTIONS)
    assert manifests.read(root)["proof"]["summaries"] == {"reason": "it is odd"}
    assert "attention summaries not proven: it is odd" in capsys.readouterr().out
    card = branch_card(root, manifests.read(root), "me/vectors", "main").decode()
    assert "Attention summaries not proven: it is odd.\n" in card
    assert verify(root).problems == 0
