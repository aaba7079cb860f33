"""Splits texts into parts, and compares these with the tokens of the whole texts."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.odd_texts import ids_of, parts_of, safe
from support.tokenizers_of_kinds import PARTS, SEPARATORS, TEXTS, tokenizer_of
from transformers import ByT5Tokenizer

from qk_sniffer.config import TokenizerConfig
from qk_sniffer.corpus import long_texts
from qk_sniffer.corpus import tokens as tokens_module
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.long_texts import LongTexts, Piece
from qk_sniffer.corpus.special_tokens import SpecialTokens
from qk_sniffer.corpus.text_cuts import TextCuts
from qk_sniffer.corpus.tokenizer import TextTokenizer
from qk_sniffer.corpus.tokens import Tokens, chosen
from qk_sniffer.errors import SourceError
from qk_sniffer.store.rows import NO_CHARACTER, example_key

pytestmark = pytest.mark.floor

FOUR = ["bpe-bytes", "bpe-metaspace", "unigram", "wordpiece"]


def splitter(kind: str, max_length: int, how: bool | str = "auto") -> TextTokenizer:
    config = TokenizerConfig(max_length=max_length, add_special_tokens=how, overlong="split")
    return TextTokenizer(parts_of(kind)[0], config, name="the test")


def expected(kind: str, text: str, max_length: int, how: bool | str = "auto") -> list[list[int]]:
    """The parts of the tokens of the whole text."""
    tokenizer, _ = parts_of(kind)
    ids = ids_of(tokenizer, text)
    begin, end = ids_of(tokenizer, "<s>"), ids_of(tokenizer, "</s>")
    if how == "auto":
        ids = ids[ids[:1] == begin : len(ids)]
        ids = ids[: len(ids) - (ids[-1:] == end)]
    if not how:
        begin = end = []
    room = max_length - len(begin) - len(end)
    starts = range(0, max(1, len(ids)), room)
    return [whole for start in starts if (whole := [*begin, *ids[start : start + room], *end])]


def check(found: list[Tokens], parts: list[list[int]], max_length: int, special: int) -> None:
    assert [each.ids.tolist() for each in found] == parts
    assert [each.part for each in found] == [*range(len(parts))]
    assert [each.first_token for each in found] == [number * (max_length - special) for number in range(len(parts))]
    assert [each.is_last for each in found] == [False] * (len(parts) - 1) + [True] * bool(parts)
    assert not any(each.truncated for each in found) and len({each.text_hash for each in found}) <= 1
    assert [each.key for each in found] == [example_key(7, number) for number in range(len(parts))]


# ---- parts of ids


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), max_size=30),
    before=st.lists(st.integers(0, 1), max_size=2),
    after=st.lists(st.integers(0, 1), max_size=2),
    room=st.integers(1, 6),
    always=st.booleans(),
    cuts=st.sets(st.integers(0, 30)),
)
@example(ids=[0, 0, 1, 2, 2, 0], before=[0], after=[0], room=2, always=False, cuts={1, 5})
def test_parts_are_those_of_the_whole_whatever_the_pieces(
    ids: list[int], before: list[int], after: list[int], room: int, always: bool, cuts: set[int]
) -> None:
    special = SpecialTokens(tuple(before), tuple(after))
    bounds = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    characters = np.arange(2 * len(ids), dtype=np.int32).reshape(-1, 2)
    pieces = [(ids[start:stop], characters[start:stop]) for start, stop in pairwise(bounds)]
    found = list(special.parts(pieces, room + len(special), always=always))
    plain = list(special.parts([(ids, None)], room + len(special), always=always))
    assert [part._replace(offsets=None) for part in found] == plain
    whole = special.around(ids, 1000, characters)
    assert whole.offsets is not None
    text = ids if always else whole.ids[len(before) : len(whole.ids) - len(after)]
    starts = range(0, max(1, len(text)), room)
    assert [part.ids for part in found] == [[*before, *text[start : start + room], *after] for start in starts]
    assert [part.first_token for part in found] == [*starts]
    assert [part.is_last for part in found] == [*[False] * (len(starts) - 1), True]
    assert {part.left_out for part in found} == {0}
    own = [part.offsets[len(before) : len(part.ids) - len(after)] for part in found if part.offsets is not None]
    of_text = characters if always else whole.offsets[len(before) : len(whole.ids) - len(after)]
    assert np.concatenate(own).tolist() == of_text.tolist()
    if not always:
        assert found[0].offsets is not None and found[-1].offsets is not None
        assert found[0].offsets[: len(before)].tolist() == whole.offsets[: len(before)].tolist()
        assert found[-1].offsets[len(found[-1].ids) - len(after) :].tolist() == (
            whole.offsets[len(whole.ids) - len(after) :].tolist()
        )
    assert [part.begins_special for part in found] == [whole.begins_special and not always, *[False] * len(starts[1:])]
    assert [part.ends_special for part in found] == [*[False] * len(starts[1:]), whole.ends_special and not always]


# ---- parts of texts


@pytest.mark.parametrize(("kind", "how"), [*((kind, "auto") for kind in FOUR), ("bpe-bytes", True), ("unigram", False)])
def test_a_text_has_the_parts_of_its_tokens(kind: str, how: bool | str) -> None:
    prose = " ".join(TEXTS)[:3_000]
    for text in (prose, "<s>" + prose + "</s>", "one", "<s></s>", " " * 300 + prose[:300]):
        for max_length in (3, 50, 4096):
            special = 2 if how else 0
            parts = expected(kind, text, max_length, how)
            check(splitter(kind, max_length, how)([Example(7, 7, "7", text)]), parts, max_length, special)


def test_the_first_part_is_what_truncation_leaves() -> None:
    text = " ".join(TEXTS)[:3_000]
    cut = TextTokenizer(parts_of("bpe-bytes")[0], TokenizerConfig(max_length=60), name="the test")
    [whole] = cut([Example(7, 7, "7", text)])
    first, *_ = splitter("bpe-bytes", 60)([Example(7, 7, "7", text)])
    assert first.ids.tolist() == whole.ids.tolist() and first.text_hash == whole.text_hash


def test_a_tokenizer_in_python_splits_too() -> None:
    config = TokenizerConfig(max_length=4, overlong="split")
    found = TextTokenizer(ByT5Tokenizer(), config, name="the test")([Example(7, 7, "7", "hello</s>")])
    assert [each.ids.tolist() for each in found] == [[107, 104, 111, 1], [111, 114, 1]]
    assert [each.ends_special for each in found] == [False, True]


@pytest.mark.parametrize("how", [True, "auto"])
def test_special_tokens_elsewhere_than_before_and_after_a_text_cannot_be_split(how: bool | str) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of("bpe-bytes")
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A", special_tokens=ends
    )
    config = TokenizerConfig(add_special_tokens=how, overlong="split")
    assert TextTokenizer(tokenizer, config, name="the test").added_tokens() == (
        None if how is True else {"before": ["<s>", "</s>"], "after": []}
    )
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(tokenizer), "__call__", lambda *_, add_special_tokens, **__: {"input_ids": [add_special_tokens]}
        )
        with pytest.raises(SourceError, match=r"set model\.tokenizer\.add_special_tokens=false"):
            TextTokenizer(tokenizer, config, name="the test")


def test_a_negative_id_is_refused() -> None:
    with pytest.raises(
        SourceError, match=r"example 3 .*\(id -5\) has a negative number as its id.* dataset\.id_column=null"
    ):
        splitter("bpe-bytes", 50)([Example(3, -5, "-5", "a text")])


def test_a_text_of_too_many_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MOST_PARTS", 3)
    assert len(splitter("bpe-bytes", 4)([Example(0, 0, "0", "a" * 6)])) <= 3
    with pytest.raises(SourceError, match=r"more than 3 parts of 4 tokens: raise model\.tokenizer\.max_length"):
        splitter("bpe-bytes", 4)([Example(0, 0, "0", " ".join(TEXTS)[:300])])


def test_only_the_chosen_parts_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 100)
    tokenizer, prose = splitter("bpe-bytes", 50), " ".join(TEXTS)[:20_000]
    made: list[int] = []
    real = LongTexts.pieces

    def noting(self: LongTexts, text: str) -> Iterator[Piece]:
        for piece in real(self, text):
            made.append(len(piece.ids))
            yield piece

    monkeypatch.setattr(LongTexts, "pieces", noting)
    given_texts = [Example(2, 2, "2", prose), Example(5, 5, "5", "short")]
    whole = {each.key: each for each in tokenizer(given_texts)}
    total, keys = len(made), {example_key(2, 0), example_key(2, 3), example_key(5, 0)}
    made.clear()
    found = chosen(tokenizer, given_texts, keys)
    assert {key: each.ids.tolist() for key, each in found.items()} == {key: whole[key].ids.tolist() for key in keys}
    assert 0 < len(made) < total / 10


# ---- pieces of texts


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", PARTS)
def test_pieces_have_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 300)
    tokenizer, _ = parts_of(kind)
    long = LongTexts(tokenizer, 10)
    prose = " ".join(TEXTS)[:6_000]
    for text in (
        prose,
        " " * 1000 + prose,
        "x" * 1000 + prose,
        prose + " " * 1000,
        "x" * 900,
        "漢字かな、漢字。" * 200,
    ):
        pieces = list(long.pieces(text))
        assert [token for piece in pieces for token in piece.ids] == ids_of(tokenizer, text)
        assert long.is_long(text) == bool(TextCuts(tokenizer, both_sides=True))
    may_cut = bool(SEPARATORS[kind])
    assert (len(list(long.pieces(prose))) > 10) == may_cut


def test_scores_that_are_summed_over_the_whole_text_have_no_cut_of_both_sides() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    scores = [("<unk>", -9.0), ("a", -1.0), ("b", -1.5), (" ", -2.0), ("ab", -2.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, unk_id=0)))
    assert TextCuts(tokenizer) and not TextCuts(tokenizer, both_sides=True)
    assert [piece.ids for piece in LongTexts(tokenizer, 10).pieces("ab a")] == [ids_of(tokenizer, "ab a")]


@settings(max_examples=100, deadline=None)
@given(text=safe, kind=st.sampled_from(FOUR), size=st.integers(1, 40), max_length=st.integers(3, 40))
def test_any_text_has_the_parts_of_its_tokens(text: str, kind: str, size: int, max_length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "PIECE_CHARACTERS", size)
        found = splitter(kind, max_length)([Example(7, 7, "7", text)])
    check(found, expected(kind, text, max_length), max_length, 2)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None)
@given(text=safe, more=safe, kind=st.sampled_from([*PARTS]), size=st.integers(1, 60), margin=st.integers(1, 30))
def test_any_pieces_have_the_tokens_of_the_whole(text: str, more: str, kind: str, size: int, margin: int) -> None:
    tokenizer, _ = parts_of(kind)
    text += more
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "PIECE_CHARACTERS", size)
        patch.setattr(long_texts, "_MARGIN", margin)
        # Without the check of neighbours, which would hide a wrong cut.
        patch.setattr(LongTexts, "_fit", lambda *_: True)
        pieces = list(LongTexts(tokenizer, 10).pieces(text))
    assert [token for piece in pieces for token in piece.ids] == ids_of(tokenizer, text)


@pytest.mark.parametrize("shift", [-7, -4, -3, -2])
def test_pieces_with_wrong_cuts_end_in_the_whole_text(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 500)
    tokenizer, _ = parts_of("bpe-bytes")
    text = "statement " * 1000
    wrong = lambda _, text, stop, after=0: stop + shift if stop + shift > after else None  # noqa: E731
    monkeypatch.setattr(TextCuts, "last", wrong)
    pieces = list(LongTexts(tokenizer, 100).pieces(text))
    assert len(pieces) == 2 and sum(len(piece.ids) for piece in pieces) == len(ids_of(tokenizer, text))


MEASURE = """
import resource, sys, time
sys.path.insert(0, {tests!r})
from pydoc_data.topics import topics
from support.odd_texts import ids_of, parts_of, safe
from support.tokenizers_of_kinds import tokenizer_of
from qk_sniffer.config import TokenizerConfig
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer

tokenizer = TextTokenizer(tokenizer_of("bpe-bytes"), TokenizerConfig(overlong="split"), name="the test")
prose = " ".join(topics.values())
tokenizer([Example(0, 0, "0", prose[:300_000])])
text = prose * (1 + 20_000_000 // len(prose))
memory, count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
for parts in tokenizer.parts([Example(0, 0, "0", text)]):
    for part in parts:
        count += part.num_tokens - 2
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024)
"""


@pytest.mark.slow
def test_a_text_of_20_mb_takes_memory_for_one_piece() -> None:
    code = MEASURE.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    num_tokens, megabytes = map(int, done.stdout.split())
    assert num_tokens > 4_000_000 and megabytes < 100


@pytest.mark.parametrize("kind", FOUR)
def test_parts_have_the_characters_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 300)
    tokenizer, text = parts_of(kind)[0], "<s>" + " ".join(TEXTS)[:2_000] + "</s>"
    whole, split = (
        TextTokenizer(tokenizer, TokenizerConfig(max_length=length, overlong=how), name="the test", offsets=True)
        for length, how in ((4096, "truncate"), (40, "split"))
    )
    [expected], found = whole([Example(0, 0, "0", text)]), split([Example(0, 0, "0", text)])
    own = [part.offsets[1:-1] for part in found if part.offsets is not None]
    assert expected.offsets is not None and len(own) == len(found) > 5
    assert np.concatenate(own).tolist() == expected.offsets[1:-1].tolist()
    for each, row in ((found[0], 0), (found[-1], -1)):
        assert each.offsets is not None and each.offsets[row].tolist() == expected.offsets[row].tolist()
    for each in found[1:-1]:
        assert each.offsets is not None and each.offsets[[0, -1]].tolist() == [[NO_CHARACTER] * 2] * 2


def test_tokens_have_a_record_with_their_part() -> None:
    *_, last = splitter("bpe-bytes", 50)([Example(7, 8, "id", " ".join(TEXTS)[:1_000])])
    record: Any = last.record()
    assert (record.part, record.first_token, record.is_last) == (last.part, last.part * 48, True) and last.part > 2
    assert (record.index, record.example_id, record.source_id, record.left_out) == (7, 8, "id", 0)
