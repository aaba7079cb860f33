"""Cuts a long text to what a tokenizer needs of it, where the tokens are provably those of the whole text.

A tokenizer takes about 160 bytes of memory and a microsecond for each character, also for those whose tokens are cut
off.
"""

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

_ENDING = 1 << 16
"""The most characters of the ending of a text."""


@dataclass(frozen=True)
class Ending:
    """The last tokens of a text: those of the tokenizer's result `encoded` from `first` on."""

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
    """The beginnings and endings of long texts for one tokenizer of transformers."""

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

    def last(self, text: str, number: int) -> Ending:
        """Returns the last tokens of a text, at least `number`, without special tokens that the tokenizer adds."""
        cut = self._cuts.last(text, len(text) - 1)
        before = None if cut is None else self._cuts.last(text, cut - 1)
        if cut is None or before is None or len(text) - before > _ENDING or not self._agrees(text, before):
            return Ending(self._encoded(text), 0, 0)
        # What the tokenizer does at the start of a text changes no token behind the next cut.
        ending = Ending(self._encoded(text[before:]), len(self._ids(text[before:cut])), before)
        return ending if len(ending.ids) >= number else Ending(self._encoded(text), 0, 0)

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
