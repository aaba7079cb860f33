"""Says which token each slot of a batch holds: the slots of a key-value cache, and then those of the running pass.

Padding takes slots and has no position. Positions count the tokens of a row, whatever its padding.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import CaptureError

PADDING = -1
"""The position of a slot without a token."""


@dataclass(frozen=True, eq=False)
class Slots:
    """The tokens of a forward pass over B rows, and those that their cache has from earlier passes.

    Raises:
        CaptureError: the positions of a row do not count on by one, as those of packed texts.
    """

    position: npt.NDArray[np.int64]
    """(B, s): the position of the token in each slot, or `PADDING`. The last slots are those of the pass."""
    passed: set[Hashable] = field(default_factory=set, init=False, repr=False)
    """The checks of attention without a mask that these slots have passed: see `masks.check_slots`."""

    def __post_init__(self) -> None:
        held = self.position >= 0
        count = held.cumsum(axis=1)
        expected = self.position[np.arange(len(held)), held.argmax(axis=1), None] + count - 1
        if (held & (self.position != expected)).any():
            row, slot = np.argwhere(held & (self.position != expected))[0]
            raise CaptureError(
                f"the positions of row {row} do not count on by one: {self.position[row, slot]} follows "
                f"{self.position[row, :slot][held[row, :slot]][-1]}. Packed texts cannot be captured: give each text a "
                "row of its own"
            )

    @property
    def total(self) -> int:
        """s: the slots of the cache and of the pass."""
        return int(self.position.shape[1])

    def last(self, count: int) -> npt.NDArray[np.int64]:
        """Returns the positions (B, count) of the last slots."""
        return self.position[:, self.total - count :]

    def check(self, name: str, batch: int, n: int, past: int) -> None:
        """Checks that attention of the module `name`, with n queries in each row after `past` slots, has these slots.

        Raises:
            CaptureError: it has not.
        """
        if self.position.shape != (batch, past + n):
            rows, total = self.position.shape
            raise CaptureError(
                f"{name} attends in {batch} rows with {n} queries after {past} slots of a cache, and the model was "
                f"called for {rows} rows of {total} slots. Either the cache or the attention mask is of other texts; "
                "or the layer computes only the tokens whose logits are wanted: then leave it out, or pass "
                "output_hidden_states=True, to generate with return_dict_in_generate=True, so that it computes all"
            )
