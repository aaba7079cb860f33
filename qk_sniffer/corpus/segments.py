"""Names the part of an example that each of its tokens belongs to, such as a message of a conversation."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OF_CONVERSATIONS = ("template", "system", "user", "assistant", "tool", "thinking")
"""The segments of conversations: the roles of messages, the text that no message holds, and the text in which an
assistant thinks."""


@dataclass(frozen=True)
class Segments:
    """The segment of each token of an example."""

    names: tuple[str, ...]
    """The names of segments, each once. The example may have no token of some of them."""
    codes: NDArray[np.int32]
    """(num_tokens,): the place of each token's segment in `names`."""

    def first(self, count: int) -> "Segments":
        """Returns the segments of the first `count` tokens."""
        return self.between(0, count)

    def between(self, start: int, stop: int) -> "Segments":
        """Returns the segments of the tokens from place `start` on and before `stop`."""
        return Segments(self.names, self.codes[start:stop])

    def are_in(self, names: Collection[str]) -> NDArray[np.bool_]:
        """Returns which tokens (num_tokens,) are in segments of `names`."""
        found: NDArray[np.bool_] = np.array([name in names for name in self.names], np.bool_)[self.codes]
        return found
