"""Windows and batches by their properties; the tokenizer against the `tokenizers` library used by hand."""

import hashlib
import json
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bpe import save_tokenizer
from tokenizers import Tokenizer

from qk_sniffer.config import ModelConfig, TokenizerConfig
from qk_sniffer.corpus.batches import batches, windows
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer, text_hash
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.revisions import cached_commit

pytestmark = pytest.mark.floor

TEXTS = ["hello world", "a", "naïve 漢字 \U0001f600\n\ttabs", "the statement " * 40, "x" * 300, "</s> in the text <s>"]

lengths_lists = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 5000)), max_size=120)


def examples(texts: list[str]) -> list[Example]:
    return [Example(3 * i, 100 + i, f"id {i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that would pad and cut on the left, and warn above 16 tokens."""
    return save_tokenizer(
        tmp_path_factory.mktemp("bpe"),
        model_max_length=16,
        truncation_side="left",
        padding_side="left",
        pad_token="<s>",
    )


def loaded(folder: Path, max_length: int = 4096, *, add_special_tokens: bool = True) -> TextTokenizer:
    tokenizer = TokenizerConfig(max_length=max_length, add_special_tokens=add_special_tokens)
    return load_tokenizer(ModelConfig(name=str(folder), tokenizer=tokenizer))


# ---- windows and batches


@given(st.integers(0, 50), st.integers(1, 12))
def test_windows_keep_every_example_in_order(count: int, size: int) -> None:
    every = examples([f"text {i}" for i in range(count)])
    cut = list(windows(iter(every), size))
    assert [example for window in cut for example in window] == every
    assert all(len(window) == size for window in cut[:-1]) and all(0 < len(window) <= size for window in cut)


def test_windows_look_no_further_than_they_must() -> None:
    taken = []

    def source() -> Any:
        for example in examples(["text"] * 10):
            taken.append(example.index)
            yield example

    next(windows(source(), 4))
    assert len(taken) == 4


@settings(max_examples=300, deadline=None)
@given(
    lengths_lists,
    st.integers(1, 6000),
    st.one_of(st.none(), st.integers(1, 9)),
    st.one_of(st.just(0.05), st.floats(0, 0.9)),
)
def test_batches_hold_to_every_bound(lengths: list[int], tokens: int, size: int | None, padding: float) -> None:
    cut = batches(lengths, max_batch_tokens=tokens, batch_size=size, max_padding=padding)
    assert sorted(place for batch in cut for place in batch) == list(range(len(lengths)))
    for batch in cut:
        held = [lengths[place] for place in batch]
        area = max(held) * len(batch)
        assert held == sorted(held, reverse=True)
        assert size is None or len(batch) <= size
        assert area <= tokens or len(batch) == 1
        assert (area - sum(held)) / area <= padding + 1e-12
    longest = [lengths[batch[0]] for batch in cut]
    assert longest == sorted(longest, reverse=True)
    assert cut == batches(tuple(lengths), max_batch_tokens=tokens, batch_size=size, max_padding=padding)


@settings(max_examples=100, deadline=None)
@given(lengths_lists, st.integers(1, 6000), st.one_of(st.none(), st.integers(1, 9)))
def test_no_two_batches_could_be_one(lengths: list[int], tokens: int, size: int | None) -> None:
    cut = batches(lengths, max_batch_tokens=tokens, batch_size=size)
    for batch, after in pairwise(cut):
        held = [lengths[place] for place in [*batch, after[0]]]
        area = held[0] * len(held)
        full = size is not None and len(held) > size
        assert full or area > tokens or (area - sum(held)) / area > 0.05


def test_batches_of_known_lengths() -> None:
    lengths = [100, 7, 98, 100, 50, 48, 95, 300]
    assert batches(lengths, max_batch_tokens=400) == [[7], [0, 3, 2, 6], [4, 5], [1]]
    assert batches(lengths, max_batch_tokens=299, batch_size=2) == [[7], [0, 3], [2, 6], [4, 5], [1]]
    assert batches([5] * 5, max_batch_tokens=10) == [[0, 1], [2, 3], [4]]
    assert batches([], max_batch_tokens=10) == []


# ---- tokens


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("max_length", [3, 4, 17, 64, 4096])
def test_tokens_are_those_of_the_tokenizer_cut_at_the_right(
    folder: Path, max_length: int, add_special_tokens: bool
) -> None:
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = loaded(folder, max_length, add_special_tokens=add_special_tokens)(examples(TEXTS))
    assert [(each.index, each.example_id, each.source_id) for each in tokens] == [
        (each.index, each.example_id, each.source_id) for each in examples(TEXTS)
    ]
    for text, each in zip(TEXTS, tokens, strict=True):
        inner = reference.encode(text, add_special_tokens=False).ids
        room = max_length - 2 * add_special_tokens
        expected = [0, *inner[:room], 1] if add_special_tokens else inner[:room]
        assert each.ids.tolist() == expected and each.ids.dtype == np.int32
        assert each.num_tokens == len(expected) <= max_length
        assert each.truncated == (len(inner) > room)
        assert each.text_hash == hashlib.blake2b(text.encode(), digest_size=16).hexdigest() == text_hash(text)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_truncation_is_told_to_the_token(folder: Path, add_special_tokens: bool) -> None:
    text = examples(["the statement is a simple one"])
    [whole] = loaded(folder, add_special_tokens=add_special_tokens)(text)
    assert not whole.truncated
    for max_length in (whole.num_tokens, whole.num_tokens + 1):
        [same] = loaded(folder, max_length, add_special_tokens=add_special_tokens)(text)
        assert not same.truncated and same.ids.tolist() == whole.ids.tolist()
    [cut] = loaded(folder, whole.num_tokens - 1, add_special_tokens=add_special_tokens)(text)
    assert cut.truncated and cut.num_tokens == whole.num_tokens - 1


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_tokenizer_in_python_gives_the_same_answers(tmp_path: Path, add_special_tokens: bool) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(model_max_length=4, truncation_side="left", padding_side="left").save_pretrained(tmp_path)
    for max_length in (2, 5, 6, 100):
        tokens = loaded(tmp_path, max_length, add_special_tokens=add_special_tokens)(examples(["hello", "hi"]))
        for text, each in zip(["hello", "hi"], tokens, strict=True):
            inner = [byte + 3 for byte in text.encode()]
            room = max_length - add_special_tokens
            assert each.ids.tolist() == inner[:room] + [1] * add_special_tokens
            assert each.truncated == (len(inner) > room)


def test_texts_of_no_token_are_left_out_and_counted(folder: Path) -> None:
    plain = loaded(folder, add_special_tokens=False)
    given = examples(["one", "", "two"])
    assert [each.index for each in plain(given)] == [0, 6]
    assert plain.skipped == 1
    assert [each.num_tokens for each in plain(given[1:2])] == [] and plain.skipped == 2
    special = loaded(folder)
    assert [each.num_tokens for each in special(given)][1] == 2 and special.skipped == 0


def test_large_texts_in_parts_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i} " * (i % 7 * 10 + 1) for i in range(40)]
    at_once = loaded(folder)(examples(texts))
    monkeypatch.setattr("qk_sniffer.corpus.tokenizer._CALL_CHARACTERS", 100)
    in_parts = loaded(folder)(examples(texts))
    assert [(a.index, a.ids.tolist()) for a in at_once] == [(b.index, b.ids.tolist()) for b in in_parts]
    assert loaded(folder)([]) == []


def test_token_strings_give_the_text_back(folder: Path) -> None:
    from tokenizers import decoders

    tokenizer = loaded(folder, add_special_tokens=False)
    for text in TEXTS[:4]:
        [tokens] = tokenizer(examples([text]))
        strings = tokenizer.token_strings(tokens.ids)
        assert all(isinstance(string, str) for string in strings) and len(strings) == tokens.num_tokens
        assert decoders.ByteLevel().decode(strings) == text
    assert tokenizer.token_strings([0, 1]) == ["<s>", "</s>"]


def test_no_warnings_about_length(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        loaded(folder)(examples(["long " * 500]))
    assert caplog.records == []
    assert "longer than" not in capfd.readouterr().err


# ---- loading


def test_the_tokenizer_may_be_another_than_the_models(folder: Path, tmp_path: Path) -> None:
    other = save_tokenizer(tmp_path / "other", special=False, vocabulary=300)
    model = ModelConfig(name=str(folder), gguf_file="none.gguf", tokenizer=TokenizerConfig(name=str(other)))
    tokenizer = load_tokenizer(model)
    assert tokenizer.name == str(other) and tokenizer.commit is None
    [tokens] = tokenizer(examples(["a"]))
    assert tokens.num_tokens == 1


def test_tokenizers_that_cannot_be_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def error(name: Path | str, **options: Any) -> str:
        with pytest.raises(SourceError) as caught:
            load_tokenizer(ModelConfig(name=str(name), **options))
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    text = error(tmp_path / "empty")
    assert str(tmp_path / "empty") in text and "model.tokenizer.name" in text
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{nope")
    assert str(tmp_path / "broken") in error(tmp_path / "broken")
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    auto_map = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (tmp_path / "remote" / "tokenizer_config.json").write_text(json.dumps(auto_map))
    assert "trust_remote_code" in error("./remote"), "the message of transformers is cut behind a long path"
    assert "no such folder" in error("./missing/folder")
    assert "none.gguf" in error(folder, gguf_file="none.gguf")
    offline = error("org/name", revision="v1")
    assert "org/name" in offline and "HF_HUB_OFFLINE=1" in offline and "v1" in offline


def test_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    one, two = "1" * 40, "2" * 40
    repository = tmp_path / "models--org--name"
    assert cached_commit("model", "org/name") is None
    (repository / "snapshots" / one).mkdir(parents=True)
    assert cached_commit("model", "org/name") == cached_commit("model", "org/name", "main") == one
    assert cached_commit("model", "org/name", "v1") is None
    assert cached_commit("dataset", "org/name") is None
    (repository / "snapshots" / two).mkdir()
    assert cached_commit("model", "org/name", "main") is None, "not guessed among several"
    assert cached_commit("model", "org/name", two) == two
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(one)
    assert cached_commit("model", "org/name", "v1") == one


def test_a_length_without_room_for_text_is_refused(folder: Path) -> None:
    # `tokenizers` would cut nothing at all.
    for max_length in (1, 2):
        with pytest.raises(SourceError, match="adds 2 special tokens"):
            loaded(folder, max_length)
    assert loaded(folder, 1, add_special_tokens=False)(examples(["two words"]))[0].num_tokens == 1
