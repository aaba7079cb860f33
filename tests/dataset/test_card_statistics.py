"""Tests the section of a card on statistics: its data dictionary, and its code on the dataset of a job."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.jobs import TEXTS, run

from qk_sniffer.dataset.card import write_card
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.dataset.card_statistics import ARRAYS, statistics
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.statistics_file import FIELDS

STATISTICS = {"enabled": True, "stages": ["pre", "post"], "skip_tokens": 4}


def section_of(card: str) -> str:
    body = re.search(r"^## Statistics\n(.*?)(?=^## |\Z)", card, flags=re.DOTALL | re.MULTILINE)
    return "" if body is None else body[1]


@pytest.mark.parametrize("covariance", [True, False])
def test_the_card_of_a_job_explains_its_arrays_and_reads_them(
    covariance: bool, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = {"statistics": STATISTICS | {"covariance": covariance}, "layers": [1]}
    root = run(checkpoint, texts, tmp_path / "out", capture=capture, sampler={"type": "none"}, verify={"examples": 0})
    card = (root / "README.md").read_text()
    section = section_of(card)
    tokens = sum(max(0, len(text) - 4) for text in TEXTS)
    assert f"without the first 4 tokens of each text:\n{tokens:,} tokens a head, before RoPE and after RoPE." in section

    arrays = load_file(root / "statistics" / "layer-01.safetensors")
    described = re.findall(r"^\| `(\w+)` \| \(([^)]*)\) (\w+) \|", section, flags=re.MULTILINE)
    assert {name for name, _, _ in described} == {name.rpartition(".")[2] for name in arrays}
    for name, shape, dtype in described:
        sizes = {"H": 4, "d": arrays["q.pre.mean"].shape[1], "f": len(arrays["q.pre.frequency_pairs"]), "2": 2}
        found = arrays[f"q.pre.{name}"]
        assert found.shape == tuple(sizes[each] for each in shape.replace(",", " ").split()) and found.dtype == dtype

    monkeypatch.chdir(root)
    results = []
    for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)
        results.append(names)
    reader, alone = results
    np.testing.assert_array_equal(reader["mean"], arrays["q.pre.mean"])
    np.testing.assert_array_equal(alone["mean"], arrays["q.pre.mean"])
    assert ("covariance" in reader) == covariance and ("variance" in reader) != covariance
    assert "Sampler: `none`. It keeps no position: the files of the heads have no rows." in card


def test_the_dictionary_has_every_array() -> None:
    assert tuple(ARRAYS) == FIELDS


def test_arrays_that_are_not_there_are_not_described(root: Path) -> None:
    facts = CardFacts.of(manifests.read(root))
    assert statistics(facts) == section_of(write_card(facts)) == ""
    stages = replace(facts.config.capture.statistics, enabled=True, stages=["post"])
    capture = replace(facts.config.capture, statistics=stages)
    section = statistics(
        replace(facts, config=replace(facts.config, capture=capture), statistics={"tokens": 1, "nonfinite": {}})
    )
    assert "frequency_" not in section and "1 token a head, after RoPE" in section
