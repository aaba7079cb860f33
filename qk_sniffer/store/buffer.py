"""The memory between the forward and the disk: one piece of a fixed size that rows are copied into.

Were each row's memory the allocator's, what the rows leave behind would lie scattered among the activations, and a
process would hold far more than it uses. Pages that were never written to take no memory, and the lowest free place
is taken first, so that a job which holds little needs little.
"""

from bisect import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Slot:
    """A part of a `Buffer`, from byte `start` to `stop`. `memory` (nbytes,): of it, or its own if larger."""

    start: int
    stop: int
    memory: npt.NDArray[np.uint8]


class Buffer:
    """Memory of `size` bytes that is taken and given back in slots; page-locked if `pinned`. Not thread-safe.

    `taken`: bytes in slots now.
    """

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self.taken = 0
        self._memory = _pinned(size) if pinned else np.empty(size, np.uint8)
        self._gaps = [(0, size)]  # what is free; ascending, never adjacent

    def take(self, nbytes: int) -> Slot | None:
        """A slot of `nbytes` at the lowest place; None where there is none now.

        More than the whole buffer is memory of its own, given while nothing else is taken.
        """
        size = len(self._memory)
        if nbytes > size:
            if self.taken:
                return None
            slot = Slot(0, size, np.empty(nbytes, np.uint8))
            self._gaps.clear()
            self.taken = nbytes
            return slot
        for place, (start, stop) in enumerate(self._gaps):
            if stop - start >= nbytes:
                end = min(stop, start + -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
                self._gaps[place : place + 1] = [(end, stop)] if end < stop else []
                self.taken += nbytes
                return Slot(start, end, self._memory[start : start + nbytes])
        return None

    def give_back(self, slot: Slot) -> None:
        """Frees a slot; nothing may use its memory any more."""
        self.taken -= len(slot.memory)
        start, stop = slot.start, slot.stop
        place = bisect(self._gaps, (start, stop))
        if place < len(self._gaps) and self._gaps[place][0] == stop:
            stop = self._gaps.pop(place)[1]
        if place and self._gaps[place - 1][1] == start:
            place -= 1
            start = self._gaps.pop(place)[0]
        self._gaps.insert(place, (start, stop))


def _pinned(size: int) -> npt.NDArray[np.uint8]:
    import torch  # here, so that the store's readers need not load it

    memory: npt.NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memory
