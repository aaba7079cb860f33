"""Encodes texts with a tokenizer of transformers: as their first tokens, or in parts of some tokens each."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from qk_sniffer.corpus.long_texts import LongTexts
from qk_sniffer.corpus.special_tokens import Encoded, Offsets, Piece, SpecialTokens
from qk_sniffer.store.rows import NO_CHARACTER

_OPTIONS: dict[str, Any] = {"padding": False, "return_attention_mask": False}


class Encoder:
    """Encodes texts as their first `max_length` tokens, or with `split` as consecutive parts of so many; never pads.

    Of a long text that is cut, only the beginning is tokenized. One that is split is tokenized in pieces. Both need
    places in the text where the tokens are provably those of the whole: see `text_cuts.py`.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: SpecialTokens | None,
        max_length: int,
        *,
        split: bool,
        always: bool,
        offsets: bool,
    ) -> None:
        """Takes a tokenizer of transformers.

        Args:
            special: the special tokens to add; None if the tokenizer adds them, and texts are not split.
            max_length: the most tokens of a text or a part, special ones included.
            split: whether texts are split.
            always: whether parts get special tokens that the text has already.
            offsets: whether the characters of tokens are found.
        """
        tokenizer.truncation_side = "right"
        self._added = tokenizer.num_special_tokens_to_add(pair=False) if special is None else len(special)
        self._tokenizer, self._special, self._max_length = tokenizer, special, max_length
        self._splits, self._adds_always, self._offsets = split, always, offsets
        self._long = LongTexts(tokenizer, max_length + self._added + 1)

    def is_made_in_pieces(self, text: str) -> bool:
        """Whether a text is long, and its parts can be made one after another."""
        return self._splits and self._long.is_long(text)

    def pieces(self, text: str) -> Iterator[Encoded]:
        """Yields the parts of a text, which is tokenized in pieces."""
        pieces = self._long.pieces(text)
        return self._split((piece.ids, piece.offsets if self._offsets else None) for piece in pieces)

    def __call__(self, texts: Sequence[str]) -> Iterator[Sequence[Encoded]]:
        """Yields the parts of each text: one if it is not split."""
        if not texts:
            return
        if self._splits:
            yield from ([*self._split([whole])] for whole in self._whole(texts))
        else:
            yield from ([encoded] for encoded in self._encode_beginnings(texts))

    def _split(self, pieces: Iterable[Piece]) -> Iterator[Encoded]:
        assert self._special is not None
        return self._special.parts(pieces, self._max_length, always=self._adds_always)

    def _encode_beginnings(self, texts: Sequence[str]) -> Iterator[Encoded]:
        parts = [self._long.beginning(text) for text in texts]
        for text, part, encoded in zip(texts, parts, self._encode_whole(parts), strict=True):
            if len(part) == len(text):
                yield encoded
                continue
            own, offsets = 0, encoded.offsets
            if self._special is not None and (number := len(self._special.after)):
                ending = self._long.last(text, number)
                own = self._special.own_after(ending.ids)
                if own and offsets is not None:
                    start = len(offsets) - number
                    offsets[start : start + own] = ending.offsets[-own:]
            yield encoded._replace(left_out=None, ends_special=own > 0, offsets=offsets)

    def _encode_whole(self, texts: list[str]) -> Iterator[Encoded]:
        if self._special is not None:
            for ids, offsets in self._whole(texts):
                yield self._special.around(ids, self._max_length, offsets)
            return
        options = {**_OPTIONS, "truncation": True, "max_length": self._max_length}
        if getattr(self._tokenizer, "is_fast", False):
            for encoding in self._tokenizer(texts, **options).encodings:
                left_out = sum(len(part.ids) - self._added for part in encoding.overflowing)
                yield Encoded(encoding.ids, left_out, offsets=_offsets_of(encoding) if self._offsets else None)
            return
        for text in texts:  # for a batch, a tokenizer in Python does not report which texts overflowed
            encoded = self._tokenizer(text, return_overflowing_tokens=True, **options)
            yield Encoded(encoded["input_ids"], len(encoded.get("overflowing_tokens", ())))

    def _whole(self, texts: Sequence[str]) -> Iterator[Piece]:
        """Yields the tokens of texts, without special tokens that the tokenizer adds."""
        # verbose=False: no warning about texts that are longer than the tokenizer's own limit.
        found = self._tokenizer([*texts], add_special_tokens=False, truncation=False, verbose=False, **_OPTIONS)
        offsets = map(_offsets_of, found.encodings) if self._offsets else repeat(None, len(texts))
        yield from zip(found["input_ids"], offsets, strict=True)


def _offsets_of(encoding: Any) -> Offsets:
    """Returns the characters of the tokens (num_tokens, 2) in an encoding of the tokenizers library."""
    found = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    found[np.array(encoding.special_tokens_mask, np.bool_)] = NO_CHARACTER
    return found
