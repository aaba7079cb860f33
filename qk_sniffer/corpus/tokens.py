"""Declares the tokens of an example, and what makes them of its content."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qk_sniffer.corpus.contents import ContentError, TokenIds, ids_hash, text_hash
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.segments import Segments
from qk_sniffer.corpus.special_tokens import Offsets
from qk_sniffer.errors import SourceError
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.rows import MOST_PARTS, example_key, index_of
from qk_sniffer.store.text_segments import encode


@dataclass(frozen=True)
class Tokens:
    """The tokens of one example: of a text, or of a part of it."""

    index: int
    example_id: int
    """That of the text, also for its parts."""
    source_id: str
    ids: NDArray[np.int32]
    """(num_tokens,)"""
    left_out: int | None
    """Tokens at the end of the text that were cut off; None if some were, and their number is not known."""
    text_hash: str
    begins_special: bool = False
    ends_special: bool = False
    """Whether the text itself begins or ends with special tokens, which were not added again."""
    segments: Segments | None = None
    """The segment of each token; None if they are not known, or were not asked for."""
    offsets: Offsets | None = None
    """(num_tokens, 2): the first character of each token and the one after its last, or `NO_CHARACTER` for a special
    token without characters; None if they were not asked for."""
    part: int = 0
    first_token: int = 0
    """The number of the text's own tokens before the part: those without special tokens of the tokenizer."""
    is_last: bool = True
    """Whether no part of the text follows."""

    @property
    def key(self) -> int:
        """Names the example in its source: `store.rows.example_key` of its index and part."""
        return example_key(self.index, self.part)

    @property
    def num_tokens(self) -> int:
        """The length of `ids`, at least 1."""
        return len(self.ids)

    @property
    def truncated(self) -> bool:
        """Whether the end of the text was cut off."""
        return self.left_out != 0

    def first(self, count: int) -> "Tokens":
        """Returns the example with its first `count` tokens alone."""
        segments = None if self.segments is None else self.segments.first(count)
        offsets = None if self.offsets is None else self.offsets[:count]
        return replace(self, ids=self.ids[:count], segments=segments, offsets=offsets)

    def are_in(self, names: Collection[str]) -> NDArray[np.bool_]:
        """Returns which tokens (num_tokens,) are in segments of `names`. The example has segments."""
        assert self.segments is not None
        return self.segments.are_in(names)

    def record(self) -> ExampleRecord:
        """Returns the record of the example in the journal and in `examples/data.parquet`."""
        return ExampleRecord(
            index=self.index,
            example_id=self.example_id,
            source_id=self.source_id,
            num_tokens=self.num_tokens,
            truncated=self.truncated,
            text_hash=self.text_hash,
            left_out=self.left_out or 0,
            begins_special=self.begins_special,
            ends_special=self.ends_special,
            segments=None if self.segments is None else encode(self.segments.names, self.segments.codes),
            part=self.part,
            first_token=self.first_token,
            is_last=self.is_last,
        )


HashOf = Callable[[Example], str]
"""Returns the `text_hash` of the tokens of an example."""


class Tokenizer(Protocol):
    """Turns examples into tokens."""

    @property
    def kind(self) -> type:
        """The class whose code tokenizes."""

    @property
    def libraries(self) -> Sequence[str]:
        """The packages that it uses on texts or vocabularies, but `tokenizers`."""

    @property
    def skipped(self) -> int:
        """The number of examples so far that gave no token."""

    @property
    def largest_id(self) -> int:
        """The largest id that is known before the examples are read."""

    def check_fits(self, num_embeddings: int | None, model: str) -> None:
        """Checks that the embedding of `model`, of `num_embeddings` rows, has one for each token; None: not known yet.

        Raises:
            SourceError: it has not.
        """

    def __call__(self, examples: Sequence[Example]) -> list[Tokens]:
        """Returns the tokens of each example, in their order. An example without tokens is left out and counted.

        Raises:
            SourceError: an example has no valid tokens, or one that the model's embedding has no row for.
        """

    def parts(self, examples: Sequence[Example]) -> Iterator[Iterator[Tokens]]:
        """Yields the parts of each example, in their order: one if it is not split, none if it has no token.

        Iterate over the parts of an example before the next one. They are made one after another, so that those of a
        long text need not be in memory together.

        Raises:
            SourceError: as for a call.
        """

    def content_hash(self, example: Example) -> str:
        """Returns the `text_hash` of the example's tokens.

        Raises:
            SourceError: an example has no valid content.
        """

    def token_strings(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """Returns the tokens as the vocabulary spells them."""

    def facts(self) -> dict[str, Any]:
        """Returns what the record of a job holds of the tokenizer."""


def chosen(tokenizer: Tokenizer, examples: Sequence[Example], keys: Collection[int]) -> dict[int, Tokens]:
    """Returns the parts of `examples` that have these `keys`, by key. Makes no part after the last one of an example.

    Raises:
        SourceError: as for a call of the tokenizer.
    """
    found: dict[int, Tokens] = {}
    for example, parts in zip(examples, tokenizer.parts(examples), strict=True):
        last = max(key for key in keys if index_of(key) == example.index)
        number = last - example_key(example.index, 0) + 1
        found |= {part.key: part for part in islice(parts, number) if part.key in keys}
    return found


def plain_hash(example: Example) -> str:
    """Returns the `text_hash` of the tokens of an example of text or token ids, which needs no tokenizer."""
    if isinstance(example.content, TokenIds):
        return ids_hash(example.content.ids)
    assert isinstance(example.content, str)
    return text_hash(example.content)


def check_part(example: Example, part: int, max_length: int) -> None:
    """Checks that an example whose texts are split can have this part.

    Raises:
        SourceError: it cannot.
    """
    if part == MOST_PARTS:
        reason = f"has more than {MOST_PARTS:,} parts of {max_length} tokens: raise model.tokenizer.max_length"
        raise content_error(example, ContentError(reason))
    if example.example_id < 0:
        reason = (
            "has a negative number as its id, and these are the numbers of parts (model.tokenizer.overlong=split): use "
            "the example's number as the id, dataset.id_column=null"
        )
        raise content_error(example, ContentError(reason))


def content_error(example: Example, error: ContentError) -> SourceError:
    """Returns the error for an example whose content is refused."""
    return SourceError(f"example {example.index} of the dataset (id {example.source_id}) {error}")
