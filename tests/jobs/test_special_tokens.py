"""Texts that already begin with the BOS token get no second one; tokens that are cut off are counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.jobs import TEXTS, heads_of, run
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from qk_sniffer.dataset.card import write_card
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest as manifests

ALONE: dict[str, Any] = {"inference": {"batch_size": 1}, "capture": {"capture_token_ids": True}}


@pytest.fixture(scope="module")
def with_bos(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a tokenizer that puts `<s>` before each text."""
    folder = tmp_path_factory.mktemp("with-bos") / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_a_corpus_in_which_some_texts_have_the_bos_is_captured_as_if_none_had(
    with_bos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = write(tmp_path / "some.jsonl", [TEXTS[0], "<s>" + TEXTS[1], "<s>" + TEXTS[2], TEXTS[3]])
    none = write(tmp_path / "none.jsonl", TEXTS[:4])
    root = run(with_bos, some, tmp_path / "some", **ALONE)
    assert "2 texts begin with <s> already, which was not added again." in capsys.readouterr().out
    found, expected = heads_of(root), heads_of(run(with_bos, none, tmp_path / "none", **ALONE))
    assert found == expected
    assert "begin with" not in capsys.readouterr().out
    (bos,) = {row["token_id"] for row in found["l01h00q"].to_pylist() if row["position"] == 0}
    assert all((row["token_id"] == bos) == (row["position"] == 0) for row in found["l01h00q"].to_pylist())
    manifest = manifests.read(root)
    assert manifest["tokenizer"]["special_tokens"] == {"before": ["<s>"], "after": []}
    assert manifest["own_special_tokens"] == {"before": 2, "after": 0}
    assert "| special tokens | `<s>` before each text (2 have it already) |" in write_card(CardFacts.of(manifest))


@pytest.mark.slow
def test_a_dataset_whose_texts_all_got_special_tokens_names_the_way_to_add_to_it(
    with_bos: Path, tmp_path: Path
) -> None:
    texts = write(tmp_path / "texts.jsonl", ["<s>" + TEXTS[0], TEXTS[1]])
    always: dict[str, Any] = {"model": {"tokenizer": {"add_special_tokens": "true"}}}
    root = run(with_bos, texts, tmp_path / "out", dataset={"max_samples": 1}, **always)
    assert manifests.read(root)["config"]["model"]["tokenizer"]["add_special_tokens"] is True
    with pytest.raises(StoreError, match=r"old values \(model\.tokenizer\.add_special_tokens=true\)"):
        run(with_bos, texts, root)
    run(with_bos, texts, root, **always)
    manifest = manifests.read(root)
    assert manifest["examples"] == 2 and manifest["own_special_tokens"] == {"before": 0, "after": 0}
    assert "| special tokens | added |" in write_card(CardFacts.of(manifest))


def test_the_summary_and_the_card_count_the_tokens_that_were_left_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, short = write(tmp_path / "texts.jsonl", TEXTS[:3]), {"model": {"tokenizer": {"max_length": 25}}}
    lost = [max(0, len(text) - 25) for text in TEXTS[:3]]
    root = run(checkpoint, texts, tmp_path / "out", **short)
    cut = sum(map(bool, lost))
    summary = f"{cut} examples cut to model.tokenizer.max_length: {sum(lost)} tokens left out in all."
    assert summary in capsys.readouterr().out
    assert f"{cut} cut at max_length, without {sum(lost)} tokens in all" in (root / "README.md").read_text()


@pytest.mark.slow
def test_a_dataset_that_grows_counts_on(
    checkpoint: Path, with_bos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, short = write(tmp_path / "texts.jsonl", TEXTS[:3]), {"model": {"tokenizer": {"max_length": 25}}}
    lost = [max(0, len(text) - 25) for text in TEXTS[:5]]
    root = run(checkpoint, texts, tmp_path / "out", **short)
    write(texts, TEXTS[:5])
    run(checkpoint, texts, root, **short)
    manifest = manifests.read(root)
    assert manifest["truncated_tokens"] == sum(lost)
    assert (
        f"{sum(map(bool, lost))} cut at max_length, without {sum(lost)} tokens in all"
        in (root / "README.md").read_text()
    )

    # An earlier version did not count them: the number of the grown dataset is not known.
    del manifest["truncated_tokens"], manifest["own_special_tokens"]
    (root / "manifest.json").write_bytes(manifests.encode(manifest))
    write(texts, TEXTS[:6])
    run(checkpoint, texts, root, **short)
    assert "truncated_tokens" not in manifests.read(root)
    assert "cut to model.tokenizer.max_length.\n" in capsys.readouterr().out

    some = ["<s>" + TEXTS[0], TEXTS[1], "<s>" + TEXTS[2]]
    for count in (1, 3):
        own = run(with_bos, write(texts, some[:count]), tmp_path / "own")
        assert manifests.read(own)["own_special_tokens"] == {"before": (count + 1) // 2, "after": 0}
