"""Cuts long texts to what is used of them, and compares their tokens with those of the whole texts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.odd_texts import ids_of, parts_of, safe
from support.tokenizers_of_kinds import PARTS, SEPARATORS, TEXTS, tokenizer_of
from transformers import ByT5Tokenizer

from qk_sniffer.config import TokenizerConfig
from qk_sniffer.corpus import long_texts
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.long_texts import LongTexts
from qk_sniffer.corpus.split_patterns import SplitPattern, UnknownPatternError
from qk_sniffer.corpus.text_cuts import TextCuts
from qk_sniffer.corpus.tokenizer import TextTokenizer
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.store.compact_examples import truncated_tokens

pytestmark = pytest.mark.floor

CUTTABLE = [kind for kind in PARTS if SEPARATORS[kind]]


def tokens_of(tokenizer: Any, text: str, max_length: int, how: bool | str = "auto") -> Tokens:
    config = TokenizerConfig(max_length=max_length, add_special_tokens=how)
    [tokens] = TextTokenizer(tokenizer, config, name="the test")([Example(0, 0, "0", text)])
    return tokens


# ---- cuts


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", PARTS)
def test_separators_are_those_that_no_token_takes(kind: str) -> None:
    _, cuts = parts_of(kind)
    assert {sign for sign in " \n、。\uff0c" if cuts.last(f"aa{sign}aa", 5) == 2} == {*SEPARATORS[kind]}
    assert bool(cuts) == bool(SEPARATORS[kind])
    for text in ("aa  aa", "aa1 aa", "aa. aa", "a", "", " a", "aa ", "aa 1"):
        assert cuts.last(text, len(text)) is None


@pytest.mark.parametrize("kind", CUTTABLE)
@settings(max_examples=25, deadline=None)
@given(text=safe)
@example(text="a statement of the nai\u0308ve zoo: of a zebra, 漢字、the end of the\nstraße a z")
def test_the_tokens_before_a_cut_are_those_of_the_whole_text(kind: str, text: str) -> None:
    tokenizer, cuts = parts_of(kind)
    whole = ids_of(tokenizer, text)
    stop = len(text)
    while (cut := cuts.last(text, stop)) is not None:
        before = ids_of(tokenizer, text[:cut])
        assert whole[: len(before)] == before
        stop = cut


def test_the_last_cut_of_a_text_is_found_wherever_it_is() -> None:
    _, cuts = parts_of("bpe-bytes")
    for number in (1, 4094, 4095, 4096, 4097, 4098, 8191, 8192, 8193, 20_000):
        text = "a" * number + " a" + "b" * 9_000
        assert [cuts.last(text, stop) for stop in (len(text), number + 2, number + 1)] == [number, number, None]


def test_tokenizers_that_are_not_known_have_no_cuts() -> None:
    class Own(type(tokenizer_of("bpe-bytes"))):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
            return super()._encode_plus(text, *args, **options)

    own = Own(tokenizer_object=tokenizer_of("bpe-bytes").backend_tokenizer)
    dropping = tokenizer_of("bpe-bytes")
    dropping.backend_tokenizer.model.dropout = 0.1
    for tokenizer in (own, dropping, ByT5Tokenizer()):
        assert not TextCuts(tokenizer)
        assert TextCuts(tokenizer).last("a a", 3) is None


# ---- patterns


@pytest.mark.parametrize(
    ("pattern", "crosses", "stops"),
    [
        (r"\s+", False, True),
        (r" ?\p{L}+|\s", False, True),
        (r"[^\r\n\p{L}\p{N}]?+\p{L}++|\s++", False, True),
        (r"\s+(?!\S)", False, False),
        (r"\s{2,}|[a-z]+", False, False),
        (r" ?\s+", False, False),
        (r"\p{L}+ ?", True, False),
        (r"(?:\p{L}| )+", True, True),
        (r"(?: ?\p{L})+|\s+", True, True),
        (r"\p{L}(?:x|1 )", True, False),
        (r"\P{N}", True, True),
        (r".", True, True),
        (r"[^a]+", True, True),
        (r"[a[\s]]", True, True),
        (r"(?i:[^a-z])|\s+", True, True),
        (r"\S*", True, False),
        (r"\S+(?!\S)|\s+", False, True),
    ],
)
def test_what_a_pattern_does_at_a_space(pattern: str, crosses: bool, stops: bool) -> None:
    found = SplitPattern.of(pattern, " ")
    assert (found.crosses, found.stops) == (crosses, stops)


def test_a_condition_on_what_follows_counts_at_other_separators() -> None:
    assert SplitPattern.of(r"\S+?(?!\S)|,", ",").crosses
    assert SplitPattern.of(r"\p{L}+(?!\S)|,", ",").crosses
    assert SplitPattern.of(r"\s+(?!\S)|[^\p{L}]", ",") == SplitPattern(False, False, True)


@pytest.mark.parametrize(
    "pattern",
    [
        r"a(?=b)",
        r"(?<!a)b",
        r"^a",
        r"a$",
        r"\ba",
        r"(a)\1",
        r"a(?!b)",
        r"[]a]",
        "(a",
        "a)",
        "[a",
        r"\p{L",
        "(?i)a",
        "*a",
    ],
)
def test_patterns_that_are_not_analysed(pattern: str) -> None:
    with pytest.raises(UnknownPatternError):
        SplitPattern.of(pattern, " ")


# ---- beginnings and endings


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every text a long one."""
    monkeypatch.setattr(long_texts, "WHOLE_CHARACTERS", 0)
    monkeypatch.setattr(long_texts, "WHOLE_CHARACTERS_PER_TOKEN", 0)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, "auto") for kind in PARTS), ("bpe-bytes", True), ("unigram", False)]
)
def test_a_long_text_has_the_tokens_of_the_whole(kind: str, how: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = parts_of(kind)
    prose = " ".join(TEXTS)[:8_000]
    given_texts = [
        prose,
        "<s>" + prose + "</s>",
        " " * 1000 + prose,
        prose[:500] + " " * 1000 + prose,
        "x" * 1000 + prose,
        "x" * 2000,
        " " * 2000 + "x",
        "漢字かな、漢字。" * 200,
    ]
    whole = [tokens_of(tokenizer, text, 100, how) for text in given_texts]
    assert all(each.left_out for each in whole[:2])
    monkeypatch.setattr(long_texts, "WHOLE_CHARACTERS", 0)
    monkeypatch.setattr(long_texts, "WHOLE_CHARACTERS_PER_TOKEN", 0)
    cut = [tokens_of(tokenizer, text, 100, how) for text in given_texts]
    for one, other in zip(cut, whole, strict=True):
        assert (one.ids.tolist(), one.truncated, one.text_hash) == (
            other.ids.tolist(),
            other.truncated,
            other.text_hash,
        )
        assert (one.begins_special, one.ends_special) == (other.begins_special, other.ends_special)
        assert one.left_out in (None, other.left_out) and one.record().left_out in (0, other.left_out)
    assert [each.left_out is None for each in cut[:5]] == [bool(SEPARATORS[kind])] * 5


@settings(max_examples=50, deadline=None)
@given(text=safe, kind=st.sampled_from(CUTTABLE), max_length=st.integers(3, 40), how=st.sampled_from([True, "auto"]))
def test_any_text_has_the_tokens_of_the_whole(text: str, kind: str, max_length: int, how: bool | str) -> None:
    tokenizer, _ = parts_of(kind)
    whole = tokens_of(tokenizer, text, max_length, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "WHOLE_CHARACTERS", 0)
        patch.setattr(long_texts, "WHOLE_CHARACTERS_PER_TOKEN", 0)
        cut = tokens_of(tokenizer, text, max_length, how)
    assert (cut.ids.tolist(), cut.truncated) == (whole.ids.tolist(), whole.truncated)
    assert (cut.begins_special, cut.ends_special) == (whole.begins_special, whole.ends_special)


@pytest.mark.usefixtures("short")
def test_a_wrong_cut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = parts_of("bpe-bytes")
    text = "statement " * 1000
    assert len(LongTexts(tokenizer, 100).beginning(text)) < 2000
    monkeypatch.setattr(TextCuts, "last", lambda self, text, stop: stop - 4)
    assert LongTexts(tokenizer, 100).beginning(text) == text


def test_texts_of_usual_length_are_counted_whole() -> None:
    tokenizer, _ = parts_of("bpe-bytes")
    text = "statement " * (long_texts.WHOLE_CHARACTERS // 10)
    assert tokens_of(tokenizer, text, 100).left_out == len(ids_of(tokenizer, text)) - 98
    long = tokens_of(tokenizer, text + "statement", 100)
    assert long.left_out is None and long.truncated and truncated_tokens(None, [long.record()]) is None
    kept = 2 * len(text) // long_texts.WHOLE_CHARACTERS_PER_TOKEN
    assert tokens_of(tokenizer, text + "statement", kept).left_out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe-bytes", "bpe-metaspace", "unigram", "wordpiece"])
def test_a_megabyte_of_spaces_or_one_word(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = parts_of(kind)
    prose = " ".join(TEXTS)
    given_texts = [" " * 2**20 + prose, "x" * 2**20 + " " + prose, "x" * 2**20, " " * 2**20 + "x"]
    cut = [tokens_of(tokenizer, text, 4096) for text in given_texts]
    monkeypatch.setattr(long_texts, "WHOLE_CHARACTERS", 2**30)
    for text, one in zip(given_texts, cut, strict=True):
        assert one.ids.tolist() == tokens_of(tokenizer, text, 4096).ids.tolist()


MEASURE = """
import resource, sys
sys.path.insert(0, {tests!r})
from pydoc_data.topics import topics
from support.odd_texts import ids_of, parts_of, safe
from support.tokenizers_of_kinds import tokenizer_of
from qk_sniffer.config import TokenizerConfig
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer

tokenizer = TextTokenizer(tokenizer_of("bpe-bytes"), TokenizerConfig(), name="the test")
prose = " ".join(topics.values())
tokenizer([Example(0, 0, "0", prose[:{first}])])
text = prose * (1 + 20_000_000 // len(prose))
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[tokens] = tokenizer([Example(0, 0, "0", text)])
print(tokens.num_tokens, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024)
"""


@pytest.mark.slow
def test_a_text_of_20_mb_takes_memory_for_its_first_tokens() -> None:
    tests = str(Path(__file__).parents[1])
    code = MEASURE.format(tests=tests, first=long_texts.WHOLE_CHARACTERS + 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    num_tokens, megabytes = done.stdout.split()
    assert int(num_tokens) == 4096 and int(megabytes) < 100
