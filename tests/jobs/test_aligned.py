"""Captures the same tokens in all layers, and in several models that share a tokenizer."""

import json
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.jobs import heads_of, keys, run, vectors
from support.verify_cases import verified, wrong
from support.zoo import CASES
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

SAMPLED = {"type": "uniform", "base_rate": 4.0, "min_bucket_size": 16}
LLAMA = next(case for case in CASES if case.name == "llama")


@pytest.fixture
def both(
    request: pytest.FixtureRequest, undisturbed: Callable[..., Path], folder_of: Any, texts: Path, tmp_path: Path
) -> list[dict[str, list[tuple[int, int]]]]:
    """The tokens of each head, in datasets of two models."""
    sampler = SAMPLED | request.param
    other = run(folder_of(LLAMA), texts, tmp_path / "llama", sampler=sampler)
    return [
        {name: keys(head) for name, head in heads_of(root).items()} for root in (undisturbed(sampler=sampler), other)
    ]


@pytest.mark.parametrize("both", [{"share": "example"}], indirect=True)
def test_all_heads_of_all_models_have_the_same_tokens(both: list[dict[str, list[tuple[int, int]]]]) -> None:
    one, other = both
    found = [*one.values(), *other.values()]
    assert len(found) > 20 and len(found[0]) > 50
    assert all(tokens == found[0] for tokens in found)


@pytest.mark.slow
@pytest.mark.parametrize("both", [{}], indirect=True)
def test_without_sharing_the_heads_of_one_layer_and_kind_have_the_same_tokens_in_all_models(
    both: list[dict[str, list[tuple[int, int]]]],
) -> None:
    one, other = both
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one)
    assert one["l00h00q"] != one["l01h00q"] and one["l00h00q"] != one["l00h00k"]


WORDS = ["the", "in", "then", "hat", "antenna", "thin", "inn", "a", "tea", "hint"]


def save_merging_tokenizer(folder: Path) -> None:
    """Saves a tokenizer some of whose tokens have several letters, and whose texts begin with `<s>`."""
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n")]
    tokens = ["<s>", *string.ascii_lowercase, *(one + other for one, other in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)


@pytest.fixture
def by_characters(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of two datasets, with the tokens of two tokenizers."""
    texts = ["".join(WORDS[(3 * i + j * j) % len(WORDS)] for j in range(9)) for i in range(4)]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    save_merging_tokenizer(other)
    capture = {"capture_offsets": True, "heads": [0], "layers": [0, 1], "capture_token_strings": True}
    run(checkpoint, path, tmp_path / "outputs" / "characters", capture=capture)
    run(other, path, tmp_path / "outputs" / "characters-smollm2", capture=capture)
    monkeypatch.chdir(tmp_path)
    return texts


def test_tokens_of_two_tokenizers_are_paired_by_their_characters(by_characters: list[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "aligned.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "last_tokens" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    table = heads_of(Path("outputs/characters"))["l00h00q"]
    other = heads_of(Path("outputs/characters-smollm2"))["l00h00q"]
    pairs = names["pairs"]
    np.testing.assert_array_equal(names["one"], vectors(table)[pairs["row"]])
    np.testing.assert_array_equal(names["other"], vectors(other)[pairs["row_other"]])
    assert 60 < len(pairs) == len(other) - len(by_characters) < len(table), "all tokens but <s>"
    strings, ends = other["token_str"].to_pylist(), other["char_end"].to_pylist()
    for example, end, row, row_other in pairs[["example_id", "char_end", "row", "row_other"]].itertuples(index=False):
        assert keys(table)[row] == (example, end - 1)
        assert by_characters[example][:end].endswith(strings[row_other]) and ends[row_other] == end
    first = {(column, value) for column in ("char_start", "char_end") for value in other[column].to_pylist()[:2]}
    assert first == {("char_start", None), ("char_end", None), ("char_start", 0), ("char_end", len(strings[1]))}
    assert "token_str" in other.schema.names[-3:] and other.schema.names[-2:] == ["char_start", "char_end"]
    for root in ("outputs/characters", "outputs/characters-smollm2"):
        assert wrong(verified(Path(root))) == {}
