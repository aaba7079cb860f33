"""Runs jobs over token ids, without a tokenizer, and over the ids of an answer that a model has generated."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import TEXTS, hashes, heads_of, keys, run, stopped_after, vectors, write_texts
from support.tiny import ALPHABET

from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.store import manifest as manifests

IDS = [[1 + ALPHABET.index(character) for character in text] for text in TEXTS]
TOKENS = {"tokens_column": "input_ids"}
CAPTURE: dict[str, Any] = {"capture": {"capture_token_ids": True}}


def write(path: Path, ids: list[Any]) -> Path:
    pq.write_table(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32()))}), path)
    return path


@pytest.fixture
def untokenized(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint without the files of its tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    return folder


@pytest.mark.slow
def test_ids_have_the_vectors_of_their_text(checkpoint: Path, untokenized: Path, tmp_path: Path) -> None:
    root = run(untokenized, write(tmp_path / "ids.parquet", IDS[:6]), tmp_path / "out", dataset=TOKENS, **CAPTURE)
    of_texts = run(
        checkpoint, write_texts(tmp_path / "t.jsonl"), tmp_path / "texts", dataset={"max_samples": 6}, **CAPTURE
    )
    found, expected = heads_of(root), heads_of(of_texts)
    assert found.keys() == expected.keys() and all(found[name].equals(expected[name]) for name in expected)
    manifest = manifests.read(root)
    assert manifest["tokenizer"] == {"class": "none"}
    assert manifest["proof"]["proven"] is True and not verify(root).problems
    card = (root / "README.md").read_text()
    assert "| token ids column | input_ids |" in card and "| text column |" not in card
    assert "| tokenizer | none: the dataset has token ids |" in card


def test_strings_of_tokens_need_the_tokenizer(checkpoint: Path, untokenized: Path, tmp_path: Path) -> None:
    file, strings = write(tmp_path / "ids.parquet", IDS[:2]), {"capture": {"capture_token_strings": True}}
    root = run(checkpoint, file, tmp_path / "out", dataset=TOKENS, **strings)
    rows = heads_of(root)["l00h00q"].to_pylist()
    assert "".join(row["token_str"] for row in rows if row["example_id"] == 1) == TEXTS[1]
    with pytest.raises(SourceError, match=r"model\.tokenizer\.name"):
        run(untokenized, file, tmp_path / "other", dataset=TOKENS, **strings)


@pytest.mark.parametrize(("wrong", "shown"), [(10_000, "the token id 10000 at place 1"), (None, "null at place 1")])
def test_an_id_that_is_none_of_the_model_names_its_row(
    untokenized: Path, tmp_path: Path, wrong: int | None, shown: str
) -> None:
    file = write(tmp_path / "ids.parquet", [IDS[0], None, [], [3, wrong, 4]])
    with pytest.raises(SourceError, match=f"example 3 .*has {shown}"):
        run(untokenized, file, tmp_path / "out", dataset=TOKENS)


@pytest.mark.slow
def test_a_job_over_ids_resumes_and_grows(untokenized: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = CAPTURE | {"inference": {"max_batch_tokens": 100}}
    file = write(tmp_path / "ids.parquet", [*IDS[:8], None, []])
    undisturbed = run(untokenized, file, tmp_path / "undisturbed", dataset=TOKENS, **small)
    assert manifests.read(undisturbed)["skipped_rows"] == 2
    stopped_after(2, untokenized, file, tmp_path / "out", dataset=TOKENS, **small)
    assert hashes(run(untokenized, file, tmp_path / "out", dataset=TOKENS, **small)) == hashes(undisturbed)
    root, growing = tmp_path / "grown", tmp_path / "growing.parquet"
    run(untokenized, write(growing, IDS[:3]), root, dataset=TOKENS, **small)
    run(untokenized, write(growing, IDS[:8]), root, dataset=TOKENS, **small)
    found, expected = heads_of(root), heads_of(undisturbed)
    assert all(keys(found[name]) == keys(expected[name]) for name in expected)
    with pytest.raises(SourceError, match=r"example 1 of the dataset \(id 1\) is not the text"):
        run(untokenized, write(growing, [IDS[0], IDS[2], *IDS[2:8]]), root, dataset=TOKENS, **small)
    with pytest.raises(StoreError, match=r"dataset\.segments_column: null there, 'part' now"):
        run(untokenized, file, tmp_path / "out", dataset=TOKENS | {"segments_column": "part"}, **small)


@pytest.mark.slow
def test_the_vectors_of_a_generated_answer_are_those_of_its_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures by one forward pass what generating has computed token by token, with a cache of keys and values."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from qk_sniffer.config import ASSETS

    model_name = ASSETS / "pydoc_tiny"
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    prompt = tokenizer("The with statement is used to", return_tensors="pt")
    torch.manual_seed(0)
    queries: dict[int, list[torch.Tensor]] = {}
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def seen(module: torch.nn.Module, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        queries.setdefault(module.layer_idx, []).append(query[0].clone())
        return kernel(module, query, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", seen)
        made = model.generate(**prompt, max_new_tokens=40, do_sample=True, return_dict_in_generate=True)
    ids, length = made.sequences[0].tolist(), prompt["input_ids"].shape[1]
    rows = [{"input_ids": ids, "segments": [["prompt", 0], ["answer", length]]}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = run(
        model_name,
        tmp_path / "answers.jsonl",
        tmp_path / "out",
        dataset=TOKENS | {"segments_column": "segments"},
        capture={"capture_values": True, "capture_token_ids": True, "capture_segments": True},
        verify={"examples": 0},
    )
    heads = heads_of(root)
    assert heads["l00h00k"]["token_id"].to_pylist() == ids and len(ids) > length + 20
    assert heads["l00h00k"]["segment"].to_pylist() == ["prompt"] * length + ["answer"] * (len(ids) - length)
    cached = len(ids) - 1  # the last token was chosen, and not run
    for layer in range(model.config.num_hidden_layers):
        cache = made.past_key_values.layers[layer]
        for kind, states in (
            ("q", torch.cat(queries[layer], dim=-2)),
            ("k", cache.keys[0]),
            ("v", cache.values[0]),
        ):
            for head, generated in enumerate(states.numpy()):
                captured = vectors(heads[f"l{layer:02d}h{head:02d}{kind}"])[:cached]
                assert generated.shape == captured.shape
                np.testing.assert_allclose(captured, generated, atol=2e-5, rtol=1e-4)
