"""Tests the tokenizer: compares it with the `tokenizers` library, and loads it from folders and from the cache."""

import hashlib
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bpe import save_tokenizer
from tokenizers import Tokenizer

from qk_sniffer.config import ModelConfig, TokenizerConfig
from qk_sniffer.corpus.contents import text_hash
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.special_tokens import SpecialTokens
from qk_sniffer.corpus.tokenizer import TextTokenizer, load_tokenizer
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.revisions import cached_commit

pytestmark = pytest.mark.floor

TEXTS = ["hello world", "a", "naïve 漢字 \U0001f600\n\ttabs", "the statement " * 40, "x" * 300, "</s> in the text <s>"]


def examples(texts: list[str]) -> list[Example]:
    return [Example(3 * i, 100 + i, f"id {i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose own settings pad and cut on the left, and warn above 16 tokens."""
    return save_tokenizer(
        tmp_path_factory.mktemp("bpe"),
        model_max_length=16,
        truncation_side="left",
        padding_side="left",
        pad_token="<s>",
    )


def loaded(folder: Path, max_length: int = 4096, *, add_special_tokens: bool | str = True) -> TextTokenizer:
    tokenizer = TokenizerConfig(max_length=max_length, add_special_tokens=add_special_tokens)
    return load_tokenizer(ModelConfig(name=str(folder), tokenizer=tokenizer))


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
def test_truncation_is_reported_exactly(folder: Path, add_special_tokens: bool) -> None:
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


# ---- special tokens that a text has already

ENDS = [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>"), ("<s><s>", "</s></s>"), ("</s>", "<s>")]


@pytest.mark.parametrize("max_length", [3, 4, 17, 64, 4096])
def test_a_text_that_has_special_tokens_gets_no_second_ones(folder: Path, max_length: int) -> None:
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    given = [before + text + after for text in [*TEXTS, ""] for before, after in ENDS]
    auto = loaded(folder, max_length, add_special_tokens="auto")
    assert auto.added_tokens() == {"before": ["<s>"], "after": ["</s>"]}
    for text, each in zip(given, auto(examples(given)), strict=True):
        inner = reference.encode(text, add_special_tokens=False).ids
        begins = inner[:1] == [0]
        ends = inner[begins:][-1:] == [1]
        inner = inner[begins : len(inner) - ends]
        room = max_length - 2
        assert each.ids.tolist() == [0, *inner[:room], 1]
        assert (each.begins_special, each.ends_special) == (begins, ends)
        assert each.left_out == max(0, len(inner) - room) and each.truncated == (len(inner) > room)
        record = each.record()
        assert (record.left_out, record.begins_special, record.ends_special) == (each.left_out, begins, ends)


@pytest.mark.parametrize("max_length", [3, 4, 17, 64, 4096])
@pytest.mark.parametrize("special", [True, False])
def test_other_texts_have_the_tokens_of_the_tokenizer(max_length: int, special: bool, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, special=special)
    auto, same = (loaded(folder, max_length, add_special_tokens=how) for how in ("auto", True))
    for one, other in zip(auto(examples(TEXTS)), same(examples(TEXTS)), strict=True):
        assert (one.ids.tolist(), one.left_out) == (other.ids.tolist(), other.left_out)
        assert not one.begins_special and not one.ends_special
    assert same.added_tokens() is None and (auto.added_tokens() is None) == (not special)


@pytest.mark.parametrize("how", [True, False, "auto"])
def test_every_token_of_a_text_is_kept_or_counted_as_left_out(how: bool | str, folder: Path, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    for source in (folder, tmp_path):
        whole = loaded(source, 10**6, add_special_tokens=how)(examples(TEXTS))
        for max_length in (3, 7, 20):
            cut = loaded(source, max_length, add_special_tokens=how)(examples(TEXTS))
            assert [each.num_tokens + each.left_out for each in cut] == [each.num_tokens for each in whole]


def test_a_tokenizer_in_python_adds_no_second_end(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    auto = loaded(tmp_path, add_special_tokens="auto")
    [with_end, without] = auto(examples(["hello</s>", "hello"]))
    assert with_end.ids.tolist() == without.ids.tolist() == [byte + 3 for byte in b"hello"] + [1]
    assert (with_end.ends_special, without.ends_special) == (True, False)


def test_several_special_tokens_before_a_text() -> None:
    special = SpecialTokens((8, 9), (5,))
    for text, expected in (
        ([1, 2], [8, 9, 1, 2, 5]),
        ([8, 9, 1], [8, 9, 1, 5]),
        ([9, 1], [8, 9, 1, 5]),
        ([8, 1, 5], [8, 9, 8, 1, 5]),
        ([], [8, 9, 5]),
    ):
        assert special.around(text, 100).ids == expected
    one = SpecialTokens((7,), (7,))
    assert one.around([7], 100).ids == [7, 7] and one.around([7, 7], 100).ids == [7, 7]


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
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    settings = json.loads((elsewhere / "tokenizer_config.json").read_text())
    settings["fast_tokenizer_files"] = ["../tokenizer.4.0.0.json"]
    (elsewhere / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "names ../tokenizer.4.0.0.json in fast_tokenizer_files" in error(elsewhere)
    assert "no such folder" in error("./missing/folder")
    assert "none.gguf" in error(folder, gguf_file="none.gguf")
    offline = error("org/name", revision="v1")
    assert "org/name" in offline and "HF_HUB_OFFLINE=1" in offline and "v1" in offline


def of_class(folder: Path, copy: Path, name: str, *, unknown: bool) -> Path:
    """Copies a tokenizer under the name of a class of transformers; its first token becomes the `unknown` one."""
    copy.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text(encoding="utf-8")
        (copy / file).write_text(text.replace("<s>", "<unk>") if unknown else text, encoding="utf-8")
    settings = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}), encoding="utf-8")
    return copy


def test_a_class_that_splits_texts_otherwise_than_the_file_is_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer"):
        loaded(of_class(folder, tmp_path / name, name, unknown=True))
    assert not caplog.records
    wrong = loaded(of_class(folder, tmp_path / "wrong", "GemmaTokenizer", unknown=True))
    assert "as GemmaTokenizer, which does not split texts as its tokenizer.json says: the tokens [" in caplog.text
    assert 0 in wrong(examples(["a b"]))[0].ids[1:], "an unknown token for each space"


def test_a_tokenizer_that_fails_names_the_row(folder: Path, tmp_path: Path) -> None:
    wrong = loaded(of_class(folder, tmp_path / "wrong", "GemmaTokenizer", unknown=False))
    with pytest.raises(
        SourceError, match=r"wrong fails at example 3 of the dataset \(id id 1\): Unk token `<unk>` not found"
    ):
        wrong(examples(["", "a b", "a b"]))


def with_part(folder: Path, copy: Path, **parts: Any) -> Path:
    """Copies a tokenizer with other parts in its tokenizer.json."""
    shutil.copytree(folder, copy)
    file = copy / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | parts), encoding="utf-8")
    return copy


def test_a_text_for_which_the_library_panics_is_named(folder: Path, tmp_path: Path) -> None:
    slow = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tokenizer = loaded(with_part(folder, tmp_path / "slow", pre_tokenizer=slow))
    with pytest.raises(SourceError, match=r"slow fails at example 3 of the dataset .*: .*retry-limit-in-match"):
        tokenizer(examples(["a", "x" * 60 + "c"]))


def test_a_tokenizer_with_which_the_library_panics_is_refused(folder: Path, tmp_path: Path) -> None:
    second = [{"Sequence": {"id": "B", "type_id": 0}}]  # a single text has no second one
    part = {"type": "TemplateProcessing", "single": second, "pair": second, "special_tokens": {}}
    with pytest.raises(SourceError, match="cannot be loaded: index out of bounds"):
        load_tokenizer(ModelConfig(name=str(with_part(folder, tmp_path / "odd", post_processor=part))))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_tokenizer_is_named(folder: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole = (copy / file).read_bytes()
    for content, how in (
        (whole[: len(whole) // 2], "it is not JSON ("),
        (b"", "it is not JSON (Expecting value in line 1)"),
        (b"[]", "it holds list, not an object"),
        (b"\xff", "it is not UTF-8"),
    ):
        (copy / file).write_bytes(content)
        with pytest.raises(SourceError) as caught:
            load_tokenizer(ModelConfig(name=str(copy)))
        message = str(caught.value)
        assert f"the tokenizer of {copy} cannot be loaded: {file} is damaged: {how}" in message
        assert message.endswith("Restore the file, or set model.tokenizer.name to use another one")


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
    for odd in ("../../../private", "main", one + "0", ""):  # of a cache that comes from someone else
        (repository / "refs" / "v1").write_text(odd)
        (repository / "snapshots" / "odd").mkdir(exist_ok=True)
        assert cached_commit("model", "org/name", "v1") is cached_commit("model", "org/name", "odd") is None


def test_a_length_without_room_for_text_is_refused(folder: Path) -> None:
    # `tokenizers` would not cut the texts.
    for max_length in (1, 2):
        with pytest.raises(SourceError, match="adds 2 special tokens"):
            loaded(folder, max_length)
    assert loaded(folder, 1, add_special_tokens=False)(examples(["two words"]))[0].num_tokens == 1
