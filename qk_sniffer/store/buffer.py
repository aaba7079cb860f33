"""The memory between the forward and the disk: one piece of a fixed size that rows are copied into.

Were each row's memory the allocator's, what the rows leave behind would lie scattered among the activations, and a
process would hold far more than it uses. Pages that were never written to take no memory, and the lowest free place
is taken first, so that a job which holds little needs little.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Slot:
    """A part of a `Buffer`. `memory` (nbytes,)."""

    start: int
    stop: int
    memory: npt.NDArray[np.uint8]


class Buffer:
    """Memory of `size` bytes that is taken and given back in slots. Not thread-safe."""

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size, np.uint8)
        self._taken: list[Slot] = []  # by start

    def take(self, nbytes: int) -> Slot | None:
        """A slot of `nbytes` at the lowest place; None where there is none now.

        More than the whole buffer is memory of its own, given while nothing else is taken.
        """
        size = len(self._memory)
        if nbytes > size:
            slot = Slot(0, size, np.empty(nbytes, np.uint8))
            return None if self._taken else self._insert(0, slot)
        start = 0
        for place, taken in enumerate(self._taken):
            if start + nbytes <= taken.start:
                return self._insert(place, self._slot(start, nbytes))
            start = -(-taken.stop // _ALIGNMENT) * _ALIGNMENT
        if start + nbytes <= size:
            return self._insert(len(self._taken), self._slot(start, nbytes))
        return None

    def give_back(self, slot: Slot) -> None:
        """Frees a slot; nothing may use its memory any more."""
        self._taken.remove(slot)

    def _slot(self, start: int, nbytes: int) -> Slot:
        return Slot(start, start + nbytes, self._memory[start : start + nbytes])

    def _insert(self, place: int, slot: Slot) -> Slot:
        self._taken.insert(place, slot)
        return slot
