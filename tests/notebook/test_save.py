"""Tests that a capture in memory becomes a dataset of the contract: the one that a job makes of the same texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.jobs import QWEN3, TEXTS, heads_of, run, write_texts
from support.tiny import ALPHABET, save_checkpoint

from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.capture.capture import Capture
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import select
from qk_sniffer.config import ModelConfig, from_dict
from qk_sniffer.corpus.contents import ids_hash
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.dataset.verify import verify
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.memory import MemoryStore
from qk_sniffer.notebook.save import save
from qk_sniffer.timing import Stages

SAMPLER = {"type": "uniform", "base_rate": 4.0, "min_bucket_size": 16}


def facts_of(checkpoint: Path, **sections: Any) -> CaptureFacts:
    config = from_dict({"sampler": SAMPLER, **sections})
    backbone = load_backbone(ModelConfig(name=str(checkpoint), dtype="float32", device_map="cpu"))
    layers = backbone.probe()
    selection = select([each.heads for each in layers], config.capture)
    return CaptureFacts(config, backbone, layers, selection, None, None, None)


def ids_of(text: str) -> np.ndarray:
    return np.array([1 + ALPHABET.index(character) for character in text], np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(QWEN3, tmp_path_factory.mktemp("checkpoint"))


def filled(facts: CaptureFacts) -> MemoryStore:
    store: Any = MemoryStore(piece_bytes=1 << 20)
    sampler = Sampler(facts.config.sampler)
    capture = Capture(facts.backbone, facts.selection, sampler, store, columns=(), stages=Stages())
    for index, text in enumerate(TEXTS):
        example = Tokens(index, index, str(index), ids_of(text), 0, ids_hash(ids_of(text)))
        capture.run(capture.plan([example]))
        store.end_pass()
        store.complete([example.record()])
    memory: MemoryStore = store
    return memory


def test_the_rows_are_those_of_a_job(checkpoint: Path, tmp_path: Path) -> None:
    facts = facts_of(checkpoint)
    store = filled(facts)
    save(facts, store, [*store.records.values()], tmp_path / "saved")
    texts = write_texts(tmp_path / "texts.jsonl")
    job = run(checkpoint, texts, tmp_path / "job", sampler=SAMPLER, inference={"batch_size": 1})
    saved, expected = heads_of(tmp_path / "saved"), heads_of(job)
    assert saved.keys() == expected.keys()
    for name, table in expected.items():
        assert table.num_rows > 50
        assert saved[name].equals(table), name
    report = verify(tmp_path / "saved")
    assert not report.wrong, report.wrong
