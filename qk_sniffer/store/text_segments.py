"""Describes the segments of examples: the runs of tokens of one name, such as the messages of a conversation.

The list of examples has them as JSON, `[["user",0],["assistant",12]]`: the name and the first position of each run. The
first run begins at position 0, neighbours have different names, and a run ends where the next one begins, or with the
example. The segment of a row follows from its example and its position, so the journal has no column of it.
"""

import json
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

MOST_NAME = 200
"""The most characters of a segment's name."""

_Runs = list[
    tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_NAME)], Annotated[int, msgspec.Meta(ge=0)]]
]

_DECODER = msgspec.json.Decoder(_Runs)

_POSITION_BITS = 32

Int64 = npt.NDArray[np.int64]


def encode(names: Sequence[str], codes: npt.NDArray[np.integer[Any]]) -> str:
    """Returns the segments of an example as the list of examples has them.

    `codes` (num_tokens,) are indices into `names`, at least one.
    """
    starts = np.flatnonzero(np.diff(codes.astype(np.int64), prepend=-1))
    runs = [[names[code], start] for code, start in zip(codes[starts].tolist(), starts.tolist(), strict=True)]
    return json.dumps(runs, ensure_ascii=False, separators=(",", ":"))


def decode(text: str, num_tokens: int) -> list[tuple[str, int]]:
    """Returns the name and the first position of each run in an example of `num_tokens` tokens.

    Raises:
        ValueError: `encode` never returns such a text.
    """
    runs = _decoded(text)
    ascends = all(one[1] < other[1] and one[0] != other[0] for one, other in pairwise(runs))
    if not (runs and ascends and runs[0][1] == 0 and runs[-1][1] < num_tokens):
        raise ValueError(f"segments of an example of {num_tokens} tokens do not begin at 0, ascend and alternate")
    return runs


def _decoded(text: str) -> _Runs:
    try:
        return _DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"segments are not a list of names and positions: {error}") from error


def num_tokens_in(text: str | None, num_tokens: int, names: Collection[str] | None, start: int = 0) -> int:
    """Returns the number of an example's first `num_tokens` tokens from position `start` on that are in segments of
    `names`; None for any segment, or none. `text` has the segments."""
    if names is None:
        return max(0, num_tokens - start)
    assert text is not None, "an example without segments"
    runs = [run for run in _decoded(text) if run[1] < num_tokens]
    stops = [*(first for _, first in runs[1:]), num_tokens]
    return sum(
        max(0, stop - max(first, start)) for (name, first), stop in zip(runs, stops, strict=True) if name in names
    )


@dataclass(frozen=True, eq=False)
class TextSegments:
    """The segments of several examples, run by run in their order. Arrays are (runs,)."""

    names: tuple[str, ...]
    """Every name once, in the order in which the examples have them."""
    place: Int64
    """The example's place among the examples."""
    start: Int64
    """The first position."""
    stop: Int64
    """The position after the last one."""
    code: Int64
    """The index of the name in `names`."""

    @classmethod
    def of(cls, texts: Sequence[str], num_tokens: Sequence[int]) -> "TextSegments":
        """Returns the segments in `texts`, one for each example, which has `num_tokens`.

        Raises:
            ValueError: `encode` never returns such a text.
        """
        codes: dict[str, int] = {}
        place, start, stop, code = (array("q") for _ in range(4))  # a list takes several times the memory
        for number, (text, length) in enumerate(zip(texts, num_tokens, strict=True)):
            runs = decode(text, length)
            place.extend([number] * len(runs))
            start.extend(first for _, first in runs)
            stop.extend([*(first for _, first in runs[1:]), length])
            code.extend(codes.setdefault(name, len(codes)) for name, _ in runs)
        return cls(tuple(codes), *(np.array(values, np.int64) for values in (place, start, stop, code)))

    def codes(self, place: npt.NDArray[np.integer[Any]], position: npt.NDArray[np.integer[Any]]) -> Int64:
        """Returns the indices in `names` of tokens (n,), by the places of their examples and their positions."""
        runs, tokens = self.place << _POSITION_BITS | self.start, place.astype(np.int64) << _POSITION_BITS | position
        return self.code[np.searchsorted(runs, tokens, side="right") - 1]

    def are_in(self, names: Collection[str]) -> npt.NDArray[np.bool_]:
        """Returns which of `self.names` (names,) are among `names`."""
        return np.array([name in names for name in self.names], np.bool_)

    def num_tokens(self, start: int = 0, stop: int | None = None) -> dict[str, int]:
        """Returns the number of tokens in the segments of each name, at positions from `start` on and below `stop`."""
        ends = self.stop if stop is None else np.minimum(self.stop, stop)
        counts = np.bincount(self.code, np.maximum(0, ends - np.maximum(self.start, start)), len(self.names))
        return {name: int(count) for name, count in zip(self.names, counts.tolist(), strict=True)}
