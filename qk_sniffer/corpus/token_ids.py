"""Takes the token ids of examples as they are."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qk_sniffer.corpus.contents import ContentError, TokenIds
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.tokenizer import TextTokenizer
from qk_sniffer.corpus.tokens import Tokens, check_part, content_error, plain_hash

NO_TOKENIZER = "none"
"""Takes the place of a tokenizer's class."""


class GivenTokens:
    """Takes ids as they are. Cuts them at the right end to `max_length` tokens, or splits them into parts of so many.

    Adds no special tokens.

    Needs a tokenizer only for the strings of tokens.
    """

    skipped = 0
    """An example has at least one id."""

    def __init__(
        self, max_length: int, strings: TextTokenizer | None = None, *, segments: bool = False, split: bool = False
    ) -> None:
        """`strings` is the tokenizer whose vocabulary spells the tokens; None if no strings are asked for.

        `segments` says whether segments are, and `split` whether ids are split.
        """
        self._max_length = max_length
        self._strings = strings
        self._segments = segments
        self._splits = split
        self._num_embeddings: int | None = None

    @property
    def class_name(self) -> str:
        """The class of the tokenizer that spells tokens."""
        return NO_TOKENIZER if self._strings is None else self._strings.class_name

    @property
    def kind(self) -> type:
        """The class of the tokenizer that spells tokens; of this object without one."""
        return type(self) if self._strings is None else self._strings.kind

    @property
    def libraries(self) -> Sequence[str]:
        """Those of the tokenizer that spells tokens."""
        return () if self._strings is None else self._strings.libraries

    @property
    def largest_id(self) -> int:
        """The largest id of the vocabulary; -1 without one."""
        return -1 if self._strings is None else self._strings.largest_id

    def check_fits(self, num_embeddings: int | None, model: str) -> None:
        """Checks that the embedding of `model` has a row for each token of the vocabulary. That of each id follows.

        Raises:
            SourceError: it has not.
        """
        if self._strings is not None:
            self._strings.check_fits(num_embeddings, model)
        self._num_embeddings = num_embeddings or self._num_embeddings

    def __call__(self, examples: Sequence[Example]) -> list[Tokens]:
        """Returns the tokens of each example, in their order.

        Raises:
            SourceError: an id is not one of the model's embedding.
        """
        return [*chain.from_iterable(self.parts(examples))]

    def parts(self, examples: Sequence[Example]) -> Iterator[Iterator[Tokens]]:
        """Yields the parts of each example, in their order: see `Tokenizer`."""
        return map(self._parts, examples)

    def content_hash(self, example: Example) -> str:
        """Returns the `text_hash` of the example's tokens: that of all its ids."""
        return plain_hash(example)

    def token_strings(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """Returns the tokens as the vocabulary spells them; empty strings for ids without a token."""
        assert self._strings is not None
        return self._strings.token_strings(ids)

    def facts(self) -> dict[str, Any]:
        """Returns what the record of a job holds of the tokenizer."""
        return {"class": self.class_name}

    def _parts(self, example: Example) -> Iterator[Tokens]:
        content = example.content
        assert isinstance(content, TokenIds)
        if self._num_embeddings is not None and (largest := int(content.ids.max())) >= self._num_embeddings:
            place = int(content.ids.argmax())
            raise content_error(
                example,
                ContentError(
                    f"has the token id {largest} at place {place} (from 0), and the embedding of the model has "
                    f"{self._num_embeddings} rows, for ids up to {self._num_embeddings - 1}: the ids are of another "
                    "model's tokenizer. Set dataset.tokens_column to ids of this model"
                ),
            )
        segments = content.segments if self._segments else None
        hashed, number = plain_hash(example), len(content.ids)
        for part, start in enumerate(range(0, number if self._splits else 1, self._max_length)):
            stop = min(start + self._max_length, number)
            if self._splits:
                check_part(example, part, self._max_length)
            yield Tokens(
                example.index,
                example.example_id,
                example.source_id,
                content.ids[start:stop],
                0 if self._splits else number - stop,
                hashed,
                segments=None if segments is None else segments.between(start, stop),
                part=part,
                first_token=start,
                is_last=stop == number or not self._splits,
            )
