"""Tests examples that are token ids: they are taken as they are, and checked against the embedding."""

import numpy as np
import pytest

from qk_sniffer.corpus.contents import TokenIds, ids_hash
from qk_sniffer.corpus.examples import Example
from qk_sniffer.corpus.segments import Segments
from qk_sniffer.corpus.token_ids import GivenTokens
from qk_sniffer.errors import SourceError

SEGMENTS = Segments(("a", "b"), np.array([0, 0, 1, 1], np.int32))


def example(ids: list[int], segments: Segments | None = None) -> Example:
    return Example(3, 103, "id 3", TokenIds(np.array(ids, np.int32), segments))


def test_ids_are_taken_as_they_are_and_cut_at_the_end() -> None:
    whole = example([5, 0, 9, 5], SEGMENTS)
    for max_length in (1, 3, 4, 100):
        [tokens] = GivenTokens(max_length, segments=True)([whole])
        assert (tokens.index, tokens.example_id, tokens.source_id) == (3, 103, "id 3")
        assert tokens.ids.tolist() == [5, 0, 9, 5][:max_length] and tokens.ids.dtype == np.int32
        assert tokens.left_out == max(0, 4 - max_length)
        assert tokens.segments is not None and tokens.segments.names == SEGMENTS.names
        assert tokens.segments.codes.tolist() == [0, 0, 1, 1][:max_length]
        assert tokens.text_hash == GivenTokens(1).content_hash(whole)
    assert GivenTokens(4, segments=True)([example([1])])[0].segments is None
    assert GivenTokens(4)([whole])[0].segments is None, "they are not asked for"


def test_the_hash_is_of_the_ids() -> None:
    assert ids_hash(np.array([1, 2], np.int32)) == ids_hash(np.array([1, 2], np.int64))
    hashes = [ids_hash(np.array(ids, np.int32)) for ids in ([1, 2], [2, 1], [1], [513], [1, 2, 0])]
    assert len({*hashes}) == 5 and all(len(each) == 32 for each in hashes)


def test_an_id_without_a_row_of_the_embedding_is_refused() -> None:
    tokens = GivenTokens(100)
    tokens.check_fits(10, "the model")
    tokens.check_fits(None, "the model")
    tokens([example([9, 0])])
    with pytest.raises(
        SourceError, match=r"example 3 of the dataset \(id id 3\) has the token id 10 at place 1 .* 10 rows"
    ):
        tokens([example([9, 10])])


def test_no_tokenizer_is_needed() -> None:
    tokens = GivenTokens(100)
    assert tokens.facts() == {"class": "none"} and tokens.largest_id == -1 and tokens.skipped == 0
