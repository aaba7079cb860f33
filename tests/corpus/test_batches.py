"""Tests windows and batches by their properties."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qk_sniffer.config import InferenceConfig
from qk_sniffer.corpus import batches as batching
from qk_sniffer.corpus.batches import batches, check_unchanged, lookahead_windows, open_windows, windows
from qk_sniffer.corpus.contents import text_hash
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokens import Tokens, plain_hash
from qk_sniffer.errors import SourceError
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.timing import Stages

pytestmark = pytest.mark.floor

lengths_lists = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 5000)), max_size=120)


def examples(count: int) -> list[Example]:
    return [Example(index, index, str(index), f"text {index}") for index in range(count)]


@given(st.integers(0, 50), st.integers(1, 12))
def test_windows_keep_every_example_in_order(count: int, size: int) -> None:
    every = examples(count)
    cut = list(windows(iter(every), size))
    assert [example for window in cut for example in window] == every
    assert all(len(window) == size for window in cut[:-1]) and all(0 < len(window) <= size for window in cut)


def test_a_window_takes_no_example_of_the_next() -> None:
    taken = []

    def source() -> Any:
        for example in examples(10):
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
def test_batches_keep_every_limit(lengths: list[int], tokens: int, size: int | None, padding: float) -> None:
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


def test_an_id_that_is_read_otherwise_than_before_is_told_from_another_text() -> None:
    def record(source_id: str, text: str) -> ExampleRecord:
        return ExampleRecord(
            index=3, example_id=12, source_id=source_id, num_tokens=2, truncated=False, text_hash=text_hash(text)
        )

    example = Example(3, 12, "12", "text")
    check_unchanged(example, None)
    check_unchanged(example, record("12", "text"))
    with pytest.raises(
        SourceError, match=r"example 3 of the dataset has the id 12 now, and had 12\.0 .*output\.overwrite=true"
    ):
        check_unchanged(example, record("12.0", "text"))
    for other in (record("12", "other"), record("12.0", "other")):
        with pytest.raises(SourceError, match=r"example 3 of the dataset \(id 12\) is not the text"):
            check_unchanged(example, other)


class Split:
    """Stands for a tokenizer that splits texts at commas, without special tokens."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.content_hash = plain_hash

    def parts(self, examples: list[Example]) -> Iterator[Iterator[Tokens]]:
        for example in examples:
            yield self._parts(example)

    def _parts(self, example: Example) -> Iterator[Tokens]:
        self.made.append(example.index)
        assert isinstance(example.content, str)
        pieces = example.content.split(",") if example.content != "empty" else []
        for number, piece in enumerate(pieces):
            ids = np.zeros(len(piece), np.int32)
            is_last = number == len(pieces) - 1
            yield Tokens(
                example.index,
                example.example_id,
                example.source_id,
                ids,
                0,
                plain_hash(example),
                part=number,
                is_last=is_last,
            )


def of_windows(texts: list[str], done: list[ExampleRecord], lookahead: int | None = 4) -> tuple[list[Any], list[int]]:
    """The windows of texts, each with the lengths and the (index, part) of its batches; and the tokenized texts."""
    tokenizer = Split()
    given = [Example(index, index, str(index), text) for index, text in enumerate(texts)]
    inference = InferenceConfig(lookahead=lookahead, batch_size=2, max_batch_tokens=9)
    found = open_windows(given, cast(Any, tokenizer), done, inference, boundary=None, stages=Stages())
    return [
        (window.lengths, [[(each.index, each.part) for each in batch] for batch in window.batches]) for window in found
    ], tokenizer.made


SPLIT_TEXTS = ["aaa,aaa,aa", "a", "empty", "aaa,aaa,aaa,aaa,aaa,aaa,aaa,a", "aaa,aa"]


def test_windows_are_cut_from_parts() -> None:
    found, made = of_windows(SPLIT_TEXTS, [])
    assert [lengths for lengths, _ in found] == [[3, 3, 2, 1], [3, 3, 3], [3, 3, 3, 3], [1, 3, 2]]
    assert found[0][1] == [[(0, 0), (0, 1)], [(0, 2)], [(1, 0)]]
    assert made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("full_batches", [1, 2, 3])
@given(st.sets(st.integers(0, 13)), st.one_of(st.none(), st.integers(1, 6)))
def test_finished_parts_change_no_batch(full_batches: int, finished: set[int], lookahead: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "FEWEST_TEXTS", 1)
        patch.setattr(batching, "FULL_BATCHES", full_batches)
        finished_parts_change_no_batch(finished, lookahead)


def finished_parts_change_no_batch(finished: set[int], lookahead: int | None) -> None:
    whole, _ = of_windows(SPLIT_TEXTS, [], lookahead)
    assert lookahead is not None or len(whole) > 1
    every = [Example(index, index, str(index), text) for index, text in enumerate(SPLIT_TEXTS)]
    tokens = [part for parts in Split().parts(every) for part in parts]
    done = [tokens[number].record() for number in sorted(finished)]
    keys = {(each.index, each.part) for each in done}
    found, made = of_windows(SPLIT_TEXTS, done, lookahead)
    expected = [
        (lengths, [left for batch in batches if (left := [each for each in batch if each not in keys])])
        for lengths, batches in whole
    ]
    assert found == [window for window in expected if window[1]]
    whole_texts = {index for index in range(5) if {(t.index, t.part) for t in tokens if t.index == index} <= keys}
    assert not {*made} & (whole_texts - {2})


def tokens_of(lengths: list[int]) -> list[Tokens]:
    return [Tokens(at, at, str(at), np.zeros(length, np.int32), 0, "") for at, length in enumerate(lengths)]


def window_lengths(lengths: list[int], **settings: Any) -> list[list[int]]:
    """The lengths of texts in each window of the default look-ahead."""
    found = lookahead_windows(tokens_of(lengths), InferenceConfig(**settings))
    return [[0 if part is None else part.num_tokens for part in window] for window in found]


def test_batches_of_short_texts_are_full() -> None:
    lengths = [5 + 7 * at % 46 for at in range(40_000)]
    found = window_lengths(lengths)
    assert [length for window in found for length in window] == lengths
    areas = []
    for window in found:
        cut = [[window[place] for place in batch] for batch in batches(window, max_batch_tokens=16384)]
        areas += [max(batch) * len(batch) for batch in cut]
    assert sum(areas) <= 1.05 * sum(lengths)
    assert np.mean(areas) > 0.7 * 16384, "256 texts at a time give batches of 400 tokens"


@pytest.mark.parametrize(
    ("length", "settings", "expected"),
    [
        (4096, {}, 256),
        (100_000, {}, 256),
        (1024, {}, 1024),
        (1024, {"max_batch_tokens": 8192}, 512),
        (1, {}, 1 << 15),
        (1024, {"max_batch_tokens": 1 << 20}, 1 << 14),
        (25, {"batch_size": 1}, 256),
        (25, {"batch_size": 8}, 512),
        (25, {"batch_size": 8, "lookahead": 3}, 3),
    ],
)
def test_a_window_has_texts_for_several_batches(length: int, settings: dict[str, Any], expected: int) -> None:
    found = window_lengths([length] * (2 * expected + 1), **settings)
    assert [len(window) for window in found] == [expected, expected, 1]


def test_texts_without_tokens_end_a_window_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MOST_TEXTS", 300)
    assert [len(window) for window in lookahead_windows([None] * 700, InferenceConfig())] == [300, 300, 100]
