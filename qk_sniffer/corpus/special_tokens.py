"""Adds a tokenizer's special tokens to a text that may have them already, and cuts the text to a length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import SourceError
from qk_sniffer.store.rows import NO_CHARACTER

Offsets = npt.NDArray[np.int32]

_PROBES = ("a", "the", "1", "漢")
"""Texts without special tokens. A tokenizer may have no token for some of them."""


class Encoded(NamedTuple):
    """The tokens of a text."""

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


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that a tokenizer adds `before` and `after` a text, such as those of BOS and EOS."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> "SpecialTokens":
        """Finds the special tokens of a tokenizer of transformers. `name` is its name in errors.

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
            "has already are not found: set model.tokenizer.add_special_tokens=true or false"
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

    def own_after(self, ids: Sequence[int]) -> int:
        """Returns the number of special tokens at the end of `ids` that would be added after a text."""
        return _overlap(ids, self.after)


def _no_characters(number: int) -> Offsets:
    return np.full((number, 2), NO_CHARACTER, np.int32)


def _overlap(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns the largest number of tokens that end `left` and begin `right`."""
    most = min(len(left), len(right))
    return next((n for n in range(most, 0, -1) if list(left[-n:]) == list(right[:n])), 0)
