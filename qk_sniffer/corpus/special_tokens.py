"""Adds a tokenizer's special tokens to a text that may have them already, and cuts or splits the text to a length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import SourceError
from qk_sniffer.store.rows import NO_CHARACTER

Offsets = npt.NDArray[np.int32]

Piece = tuple[Sequence[int], Offsets | None]
"""Ids of consecutive tokens, and their characters (num_tokens, 2); None if they were not asked for."""

_PROBES = ("a", "the", "1", "漢")
"""Texts without special tokens. A tokenizer may have no token for some of them."""


class Encoded(NamedTuple):
    """The tokens of a text, or of a part of it."""

    ids: list[int]
    """(num_tokens,)"""
    left_out: int | None = 0
    """Tokens at the end of the text that were cut off; None if some were, and their number is not known."""
    begins_special: bool = False
    """Whether the text itself begins with special tokens, which were not added again."""
    ends_special: bool = False
    """Whether the text itself ends with special tokens, which were not added again."""
    offsets: Offsets | None = None
    """(num_tokens, 2): the first character of each token and the one after its last, `NO_CHARACTER` for special tokens
    without characters; None if they were not asked for."""
    first_token: int = 0
    """The number of the text's tokens before the part, without special tokens that were not added again."""
    is_last: bool = True
    """Whether no part of the text follows."""


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that a tokenizer adds `before` and `after` a text, such as those of BOS and EOS."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, name: str, way_out: str) -> "SpecialTokens":
        """Finds the special tokens of a tokenizer of transformers. `name` and `way_out` are for errors.

        Raises:
            SourceError: it does not add them before and after a text.
        """
        for probe in _PROBES:
            bare, whole = (tokenizer(probe, add_special_tokens=added)["input_ids"] for added in (False, True))
            for start in range(len(whole) - len(bare) + 1) if bare or not whole else ():
                stop = start + len(bare)
                if whole[start:stop] == bare:
                    return cls(tuple(whole[:start]), tuple(whole[stop:]))
        raise SourceError(
            f"the tokenizer of {name} does not add its special tokens before and after a text, so those that a text "
            f"has already are not found: {way_out}"
        )

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, ids: Sequence[int], max_length: int, offsets: Offsets | None = None) -> Encoded:
        """Returns at most `max_length` tokens: `ids` of a text, cut at the right end, between the special tokens.

        The special tokens that the text begins or ends with take the place of those that would be added. `max_length`
        is larger than their number. `offsets` are those of `ids`.
        """
        first = _overlap(self.before, ids)
        last = _overlap(ids[first:], self.after)
        text = ids[first : len(ids) - last]
        kept = text[: max_length - len(self)]
        if offsets is not None:
            added = [_no_characters(len(self.before) - first), _no_characters(len(self.after) - last)]
            offsets = np.concatenate([added[0], offsets[: first + len(kept)], offsets[len(ids) - last :], added[1]])
        return Encoded([*self.before, *kept, *self.after], len(text) - len(kept), first > 0, last > 0, offsets)

    def parts(self, pieces: Iterable[Piece], max_length: int, *, always: bool) -> Iterator[Encoded]:
        """Yields the consecutive parts of a text, each of at most `max_length` tokens and between the special tokens.

        `pieces` are the ids of the text and their offsets, in any pieces. The special tokens that the text begins or
        ends with take the place of those of its first and last part, unless `always` adds them. A text without an id is
        a part of the special tokens alone. `max_length` is larger than their number.
        """
        room = max_length - len(self)
        before, after = ((), ()) if always else (self.before, self.after)
        rest = _Queue()
        first: int | None = None  # the special tokens that the text begins with, once they are known
        number = 0
        for ids, offsets in chain.from_iterable(_slices(piece, 4 * max_length) for piece in pieces):
            rest.add(ids, offsets)
            if first is None:
                if len(rest.ids) < len(before):
                    continue
                first = _overlap(before, rest.ids)
            # The special tokens that the text ends with may be among the last ids.
            while len(rest.ids) - first > room + len(after):
                yield self._part(rest.take(first + room), first, 0, number)
                number, first = number + room, 0
        if first is None:
            first = _overlap(before, rest.ids)
        last = _overlap(rest.ids[first:], after)
        while (left := len(rest.ids) - first - last) > room:
            yield self._part(rest.take(first + room), first, 0, number)
            number, first = number + room, 0
        yield self._part(rest.take(first + left + last), first, last, number)._replace(is_last=True)

    def _part(self, taken: Piece, first: int, last: int, first_token: int) -> Encoded:
        """Returns a part: `taken` are its tokens, and `first` and `last` of them are special tokens of the text."""
        ids, offsets = taken
        if offsets is not None:
            added = [_no_characters(len(self.before) - first), _no_characters(len(self.after) - last)]
            offsets = np.concatenate([added[0], offsets, added[1]])
        whole = [*self.before, *ids[first : len(ids) - last], *self.after]
        return Encoded(whole, 0, first > 0, last > 0, offsets, first_token, is_last=False)

    def own_after(self, ids: Sequence[int]) -> int:
        """Returns the number of special tokens at the end of `ids` that would be added after a text."""
        return _overlap(ids, self.after)


class _Queue:
    """The tokens of a text that are in no part yet."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._offsets: Offsets | None = None

    def add(self, ids: Sequence[int], offsets: Offsets | None) -> None:
        """Adds the tokens of a piece."""
        self.ids += ids
        if offsets is not None:
            self._offsets = offsets if self._offsets is None else np.concatenate([self._offsets, offsets])

    def take(self, number: int) -> Piece:
        """Removes the first tokens and returns them."""
        ids, self.ids = self.ids[:number], self.ids[number:]
        offsets = None
        if self._offsets is not None:
            offsets, self._offsets = self._offsets[:number], self._offsets[number:]
        return ids, offsets


def _slices(piece: Piece, number: int) -> Iterator[Piece]:
    """Yields a piece in pieces of at most `number` tokens, because each part copies those that are left."""
    ids, offsets = piece
    for start in range(0, max(1, len(ids)), number):
        place = slice(start, start + number)
        yield ids[place], None if offsets is None else offsets[place]


def _no_characters(number: int) -> Offsets:
    return np.full((number, 2), NO_CHARACTER, np.int32)


def _overlap(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns the largest number of tokens that end `left` and begin `right`."""
    most = min(len(left), len(right))
    return next((n for n in range(most, 0, -1) if list(left[-n:]) == list(right[:n])), 0)
