"""Tests the segments of examples against the name of each token."""

import itertools

import numpy as np
import pytest

from qk_sniffer.store.text_segments import MOST_NAME, TextSegments, decode, encode, num_tokens_in

NAMES = ("user", "assistant", 'é "quoted"', "template")


def drawn(number: int) -> list[np.ndarray]:
    """Returns the codes of the tokens of several examples, in runs of different lengths."""
    rng = np.random.default_rng(number)
    return [
        np.repeat(rng.integers(0, len(NAMES), 20), rng.integers(1, 5, 20))[: rng.integers(1, 40)] for _ in range(12)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_every_token_has_its_segment(seed: int) -> None:
    codes = drawn(seed)
    texts, lengths = [encode(NAMES, each) for each in codes], [len(each) for each in codes]
    for text, each in zip(texts, codes, strict=True):
        runs = decode(text, len(each))
        stops = [start for _, start in runs[1:]] + [len(each)]
        found = [name for (name, start), stop in zip(runs, stops, strict=True) for _ in range(start, stop)]
        assert found == [NAMES[code] for code in each]
    segments = TextSegments.of(texts, lengths)
    place = np.repeat(np.arange(len(codes)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    found = np.array(segments.names)[segments.codes(place, position)]
    assert found.tolist() == [NAMES[code] for each in codes for code in each]
    is_assistant = segments.are_in(["assistant"])[segments.codes(place, position)]
    assert is_assistant.tolist() == [name == "assistant" for name in found]


@pytest.mark.parametrize(("start", "stop"), list(itertools.product([0, 3, 30], [None, 4, 17])))
def test_tokens_are_counted_by_segment(start: int, stop: int | None) -> None:
    codes = drawn(5)
    texts = [encode(NAMES, each) for each in codes]
    segments = TextSegments.of(texts, [len(each) for each in codes])
    within = [NAMES[code] for each in codes for code in each[start:stop]]
    assert segments.num_tokens(start, stop) == {name: within.count(name) for name in segments.names}
    for text, each in zip(texts, codes, strict=True):
        length = min(len(each), stop or len(each))
        of_one = [NAMES[code] for code in each[start:stop]]
        assert num_tokens_in(text, length, ["user", "template"], start) == sum(
            of_one.count(name) for name in ("user", "template")
        )
        assert num_tokens_in(None, length, None, start) == len(of_one)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        "{}",
        '["user",0]',
        '[["user"]]',
        '[["user",0,1]]',
        '[["user",1]]',
        '[["user",-1]]',
        '[["user",0.5]]',
        "[[0,0]]",
        '[["",0]]',
        f'[["{"a" * (MOST_NAME + 1)}",0]]',
        '[["user",0],["user",2]]',
        '[["user",0],["assistant",0]]',
        '[["user",0],["assistant",3],["user",2]]',
        '[["user",0],["assistant",5]]',
        '[["user",0]] ]',
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="segments"):
        decode(text, 5)


def test_a_run_of_equal_names_is_one_segment() -> None:
    assert encode(["user", "assistant"], np.array([1, 1, 0, 0, 0], np.uint8)) == '[["assistant",0],["user",2]]'
    assert decode('[["assistant",0],["user",2]]', 5) == [("assistant", 0), ("user", 2)]
