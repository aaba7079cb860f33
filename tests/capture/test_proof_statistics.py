"""Tests the proof of statistics: right ones pass it, with and without rows, and wrong ones fail it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbones import FolderOf
from support.jobs import TEXTS, run
from support.verify_cases import verified, wrong
from support.zoo import CASES, Case

from qk_sniffer.capture.moments import _Sums
from qk_sniffer.dataset.card import branch_card
from qk_sniffer.errors import CaptureError
from qk_sniffer.store import manifest as manifests

QUICK = {"qwen3", "glm4", "smollm3"}
"""Halves with a norm; neighbours in a part of each head; a layer without RoPE."""


def sections(sampler: str = "none", **statistics: Any) -> dict[str, Any]:
    return {
        "sampler": {"type": sampler},
        "capture": {"statistics": {"enabled": True, "stages": ["pre", "post"]} | statistics},
    }


@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_right_statistics_are_proven(case: Case, dtype: str, folder_of: FolderOf, texts: Path, tmp_path: Path) -> None:
    values = sections() | {"verify": {"examples": 3}, "model": {"dtype": dtype}}
    proof = manifests.read(run(folder_of(case), texts, tmp_path / "out", **values))["proof"]
    found = proof["statistics"]
    assert proof["proven"] is True and "rows" not in proof
    shortest = sorted(range(len(TEXTS)), key=lambda index: (len(TEXTS[index]), index))[:3]
    assert proof["examples"] == found["examples"] == sorted(shortest)
    assert found["tokens"] == sum(len(TEXTS[index]) for index in shortest)
    assert found["uncovered"] == [] and found["stages"] == ["pre", "post"]
    assert found["largest_difference_by_layer"].keys() == {str(layer) for layer in case.layers}
    assert max(found["largest_difference_by_layer"].values()) < (1e-4 if dtype == "float32" else 0.05)


@pytest.mark.slow
def test_summary_card_and_verify_say_what_was_proven(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(checkpoint, texts, tmp_path / "none", **sections(), verify={"examples": 3})
    words = "statistics of 18 heads in all 3 layers, from 3 of 24 examples"
    assert f"\nProven: {words}; attention itself at " in capsys.readouterr().out
    report = verified(root)
    assert wrong(report) == {} and f"{words}, derived again by the job, differ by" in report
    card = branch_card(root, manifests.read(root), "me/vectors", "main").decode()
    assert f"The job derived these vectors a second time: {words}.\n" in card
    assert "Of statistics, count, mean and covariance of single examples were compared" in card
    run(checkpoint, texts, tmp_path / "all", **sections("all", covariance=False, skip_tokens=3), verify={"examples": 2})
    said = capsys.readouterr().out
    assert "Proven: " in said and " rows of 18 heads in all 3 layers" in said
    assert "; statistics of 18 heads in all 3 layers, from 2 of 24 examples.\n" in said
    assert wrong(verified(tmp_path / "all")) == {}


def other_head(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.roll(1, dims=0)


def other_components(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.roll(1, dims=2)


def repeated_token(vectors: torch.Tensor) -> torch.Tensor:
    return torch.cat([vectors[:, 1:2], vectors[:, 1:]], dim=1)


def shifted(vectors: torch.Tensor) -> torch.Tensor:
    return vectors + 0.1 * vectors.std()


def wider(vectors: torch.Tensor) -> torch.Tensor:
    mean = vectors.mean(dim=1, keepdim=True)
    return mean + 1.1 * (vectors - mean)


@pytest.mark.parametrize("harm", [other_head, other_components, repeated_token, shifted, wider])
def test_wrong_statistics_fail(
    harm: Callable[[torch.Tensor], torch.Tensor],
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = _Sums.add
    monkeypatch.setattr(_Sums, "add", lambda self, vectors, *others: add(self, harm(vectors), *others))
    sampler = "uniform" if harm is shifted else "none"
    values = sections(sampler, skip_tokens=1, stages=["post"]) | {"dataset": {"max_samples": 4}}
    failed = r"the proof of .* failed, and the dataset was not published. Statistics derived a second time"
    with pytest.raises(CaptureError, match=failed):
        run(checkpoint, texts, tmp_path / "out", **values)
    assert manifests.read(tmp_path / "out")["proof"]["proven"] is False


def test_statistics_of_late_tokens_alone_are_not_proven(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qk_sniffer.capture.proof_examples.MAX_TOKENS", 20)
    proof = manifests.read(run(checkpoint, texts, tmp_path / "out", **sections(skip_tokens=20)))["proof"]
    assert proof["proven"] is None and "all tokens of the statistics are at positions from" in proof["reason"]
