"""Declares the content of an example, before it is tokens: a text, the messages of a conversation, or token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qk_sniffer.corpus.segments import Segments

_HASHED_CHARACTERS = 1 << 20
"""Characters of a long text that are encoded at once."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation, each a mapping with a `role`. A chat template makes a text of them."""

    messages: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TokenIds:
    """The ids of an example's tokens."""

    ids: NDArray[np.int32]
    """(num_tokens,), none negative."""
    segments: Segments | None = None
    """The segment of each token; None if the dataset names none."""


Content = str | Conversation | TokenIds


class ContentError(ValueError):
    """A row has no content of the kind that is asked for. The message is what a sentence says of the row."""


def text_hash(text: str) -> str:
    """Returns the 128-bit Blake2b digest of the UTF-8 text, in hex. It identifies the text."""
    digest = blake2b(digest_size=16)
    for start in range(0, len(text), _HASHED_CHARACTERS):
        digest.update(text[start : start + _HASHED_CHARACTERS].encode())
    return digest.hexdigest()


def ids_hash(ids: NDArray[np.int32]) -> str:
    """Returns the 128-bit Blake2b digest of token ids, each as a little-endian int32, in hex."""
    return blake2b(ids.astype("<i4").tobytes(), digest_size=16).hexdigest()


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode a text: it has no half of a surrogate pair, which JSON can escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
