"""Compares the characters of tokens with those that the tokenizers library gives, of whole texts and of cut ones."""

from typing import Any

import numpy as np
import pytest
from support.tokenizers_of_kinds import PARTS, tokenizer_of
from transformers import ByT5Tokenizer

from qk_sniffer.config import TokenizerConfig
from qk_sniffer.corpus import long_texts
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.errors import SourceError

pytestmark = pytest.mark.floor

TEXTS = (
    "a statement of the nai\u0308ve zoo: \U0001f600 of 漢字, the end of the\n\nstraße  a z",
    "<s>the statement</s>",
    "  the   end</s></s>",
    "x",
)


def tokens_of(tokenizer: Any, text: str, how: bool | str = "auto", max_length: int = 4096) -> Tokens:
    config = TokenizerConfig(max_length=max_length, add_special_tokens=how)
    [tokens] = TextTokenizer(tokenizer, config, name="the test", offsets=True)([Example(0, 0, "0", text)])
    return tokens


@pytest.mark.parametrize("how", ["auto", True, False])
@pytest.mark.parametrize("kind", PARTS)
def test_offsets_are_those_of_the_library(kind: str, how: bool | str) -> None:
    tokenizer = tokenizer_of(kind)
    wholes = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    for text, whole in zip(TEXTS, wholes, strict=True):
        for max_length in (4096, 6):
            tokens = tokens_of(tokenizer, text, how, max_length)
            assert tokens.offsets is not None and tokens.offsets.shape == (tokens.num_tokens, 2)
            known = tokens.offsets[:, 0] >= 0
            expected = dict(zip(whole.offsets, whole.ids, strict=True))
            found = tokens.offsets[known].tolist()
            assert {tuple(each) for each in found} <= expected.keys()
            assert (np.diff(tokens.offsets[known][:, 0]) >= 0).all()
            if max_length == 4096:
                assert [tuple(each) for each in found] == whole.offsets
                assert tokens.ids[known].tolist() == whole.ids
            assert set(tokens.ids[~known].tolist()) <= {1, 2}, "tokens without characters are those that are added"


def test_a_character_of_several_tokens_is_in_each_of_them() -> None:
    tokens = tokens_of(tokenizer_of("bpe-bytes"), "a \U0001f600", False)
    assert tokens.offsets is not None
    assert tokens.offsets[-4:].tolist() == [[2, 3]] * 4 and tokens.num_tokens >= 5


@pytest.mark.parametrize("kind", ["bpe-bytes", "bpe-metaspace", "wordpiece", "unigram"])
@pytest.mark.parametrize("ending", ["", "</s>"])
def test_a_long_text_has_the_offsets_of_the_whole_text(kind: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    text = "the statement of a zoo " * 400 + ending
    whole = tokens_of(tokenizer, text, max_length=64)
    monkeypatch.setattr(long_texts, "WHOLE_CHARACTERS", 100)
    monkeypatch.setattr(long_texts, "WHOLE_CHARACTERS_PER_TOKEN", 1)
    cut = tokens_of(tokenizer, text, max_length=64)
    assert (whole.left_out or 0) > 0 and cut.left_out is None
    assert cut.ids.tolist() == whole.ids.tolist()
    assert cut.offsets is not None and whole.offsets is not None
    assert cut.offsets.tolist() == whole.offsets.tolist()
    assert (cut.offsets[-1].tolist() == [len(text) - 4, len(text)]) == bool(ending)


def test_a_tokenizer_that_does_not_know_them_is_refused() -> None:
    with pytest.raises(SourceError, match=r"the tokenizer of the test, ByT5Tokenizer, does not tell the characters"):
        TextTokenizer(ByT5Tokenizer(), TokenizerConfig(), name="the test", offsets=True)
    assert tokens_of_plain(ByT5Tokenizer()).offsets is None


def tokens_of_plain(tokenizer: Any) -> Tokens:
    [tokens] = TextTokenizer(tokenizer, TokenizerConfig(), name="the test")([Example(0, 0, "0", "text")])
    return tokens
