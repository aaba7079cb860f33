"""Cuts long texts where the tokens are provably those of the whole text: to a beginning, or into pieces.

A tokenizer takes about 160 bytes of memory and a microsecond for each character, also for those whose tokens are cut
off.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.corpus.text_cuts import TextCuts

WHOLE_CHARACTERS = 1 << 17
"""Shorter texts are tokenized whole, and the tokens that are cut off are counted."""

WHOLE_CHARACTERS_PER_TOKEN = 32
"""The same for each token that is kept."""

_CHARACTERS_PER_TOKEN = 5
"""A first guess: about that of English with a large vocabulary."""

_MARGIN = 512
"""The characters on both sides of a cut whose tokens are compared, in case that a part of the library has changed."""

PIECE_CHARACTERS = 1 << 17
"""The characters of a long text that are tokenized at once where all of its tokens are used."""

_ENDING = 1 << 16
"""The most characters of the ending of a text."""


@dataclass(frozen=True)
class Piece:
    """Some tokens of a text: those of the tokenizer's result `encoded` from `first` on."""

    encoded: Any
    first: int
    start: int
    """The character of the text at which the tokenized part begins."""

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.encoded["input_ids"][self.first :]
        return ids

    @property
    def offsets(self) -> npt.NDArray[np.int32]:
        """(num_tokens, 2): the first character of each token in the text, and the one after its last."""
        return np.array(self.encoded.encodings[0].offsets[self.first :], np.int32).reshape(-1, 2) + self.start


class LongTexts:
    """The beginnings, endings and pieces of long texts for one tokenizer of transformers."""

    def __init__(self, tokenizer: Any, needed: int) -> None:
        """`needed` tokens, special ones aside, decide which ones are kept, and that others are not."""
        self._tokenizer = tokenizer
        self._needed = needed

    @cached_property
    def _cuts(self) -> TextCuts:
        return TextCuts(self._tokenizer)

    def beginning(self, text: str) -> str:
        """Returns the beginning of a long text, with at least the needed tokens: they are the first of the whole text.

        Returns the text itself if it is not long, or if no cut of it is known to be safe.
        """
        if len(text) <= max(WHOLE_CHARACTERS, WHOLE_CHARACTERS_PER_TOKEN * self._needed) or not self._cuts:
            return text
        stop = _CHARACTERS_PER_TOKEN * self._needed
        while stop < len(text):
            cut = self._cuts.last(text, stop)
            if cut is not None and (count := len(self._ids(text[:cut]))) >= self._needed:
                return text[:cut] if self._agrees(text, cut) else text
            # A text of few cuts is searched again from the new end, so the steps are large.
            stop = 2 * stop if cut is None or not count else max(3 * stop // 2, 5 * cut * self._needed // (4 * count))
        return text

    @cached_property
    def _joints(self) -> TextCuts:
        return TextCuts(self._tokenizer, both_sides=True)

    def is_long(self, text: str) -> bool:
        """Whether `pieces` may cut the text."""
        return len(text) > PIECE_CHARACTERS and bool(self._joints)

    def pieces(self, text: str) -> Iterator[Piece]:
        """Yields the tokens of a text without special tokens, those of a piece of it at a time.

        A piece has about `PIECE_CHARACTERS`, and ends at a cut. Where no cut of a text is known to be safe, it is
        longer, up to the whole text.
        """
        start = 0  # of the piece
        context = 0  # a cut before the piece, from which the tokenizer reads
        left: list[int] = []  # the ids of the piece before
        number = 0  # of the ids so far
        while True:
            stop = self._end_of_piece(text, start)
            before = self._ids(text[context:start]) if start else []
            piece = Piece(self._encoded(text[context:stop]), len(before), context)
            if not self._fit(text, left, context, start, before, piece):
                yield Piece(self._encoded(text), number, 0)
                return
            left = piece.ids
            number += len(left)
            yield piece
            if stop == len(text):
                return
            context = self._joints.last(text, stop - _MARGIN) or self._joints.last(text, stop) or 0
            start = stop

    def _end_of_piece(self, text: str, start: int) -> int:
        size = PIECE_CHARACTERS
        while start + size < len(text):
            cut = self._joints.last(text, start + size, start)
            if cut is not None:
                return cut
            size *= 2
        return len(text)

    def _fit(self, text: str, left: list[int], context: int, start: int, before: list[int], piece: Piece) -> bool:
        """Whether two pieces agree about the text between them, in case that a part of the library has changed.

        `left` are the ids of the piece that ends at `start`. `piece` begins there, and `before` are the ids of the text
        between `context` and `start`.
        """
        if not start:
            return True
        middle = self._joints.last(text, start, context) or context
        shared = before[len(self._ids(text[context:middle])) if middle > context else len(before) :]
        return bool(piece.encoded["input_ids"][: len(before)] == before) and left[len(left) - len(shared) :] == shared

    def last(self, text: str, number: int) -> Piece:
        """Returns the last tokens of a text, at least `number`, without special tokens that the tokenizer adds."""
        cut = self._cuts.last(text, len(text) - 1)
        before = None if cut is None else self._cuts.last(text, cut - 1)
        if cut is None or before is None or len(text) - before > _ENDING or not self._agrees(text, before):
            return Piece(self._encoded(text), 0, 0)
        # What the tokenizer does at the start of a text changes no token behind the next cut.
        ending = Piece(self._encoded(text[before:]), len(self._ids(text[before:cut])), before)
        return ending if len(ending.ids) >= number else Piece(self._encoded(text), 0, 0)

    def _agrees(self, text: str, cut: int) -> bool:
        start = max(0, cut - _MARGIN)
        left = self._ids(text[start:cut])
        return self._ids(text[start : cut + _MARGIN])[: len(left)] == left

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encoded(text)["input_ids"]
        return ids

    def _encoded(self, text: str) -> Any:
        return self._tokenizer(
            text,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,  # no warning about texts that are longer than the tokenizer's own limit
        )
