"""Keeps the memory between forward pass and disk: one block of a fixed size that rows are copied into.

Memory that an allocator gives for each row lies scattered among the activations when it is freed, and the process
then holds far more than it uses. A block avoids that. Its pages take no memory until something is written to them, and
the lowest free region is taken first. A job with few rows therefore needs little memory.
"""

from bisect import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a `Buffer`, from byte `start` to `stop`.

    `memory` (nbytes,) is that part. A region larger than the buffer has memory of its own.
    """

    start: int
    stop: int
    memory: npt.NDArray[np.uint8]


class Buffer:
    """Memory of `size` bytes that is taken and given back in regions; page-locked if `pinned`. Not thread-safe.

    `taken` counts the bytes in regions now.
    """

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self.taken = 0
        self._memory = _pinned(size) if pinned else np.empty(size, np.uint8)
        self._gaps = [(0, size)]  # the free parts; ascending, never adjacent

    def fits(self, nbytes: int) -> bool:
        """Returns whether `take` returns a region of `nbytes` now."""
        if nbytes > len(self._memory):
            return not self.taken
        return any(stop - start >= nbytes for start, stop in self._gaps)

    def take(self, nbytes: int) -> Region | None:
        """Returns the lowest free region of `nbytes`, or None while no free part is large enough.

        A region larger than the whole buffer is allocated separately, and only while nothing else is taken.
        """
        size = len(self._memory)
        if nbytes > size:
            if self.taken:
                return None
            region = Region(0, size, np.empty(nbytes, np.uint8))
            self._gaps.clear()
            self.taken = nbytes
            return region
        for place, (start, stop) in enumerate(self._gaps):
            if stop - start >= nbytes:
                end = min(stop, start + -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
                self._gaps[place : place + 1] = [(end, stop)] if end < stop else []
                self.taken += nbytes
                return Region(start, end, self._memory[start : start + nbytes])
        return None

    def give_back(self, region: Region) -> None:
        """Frees a region. The caller no longer uses its memory."""
        self.taken -= len(region.memory)
        start, stop = region.start, region.stop
        place = bisect(self._gaps, (start, stop))
        if place < len(self._gaps) and self._gaps[place][0] == stop:
            stop = self._gaps.pop(place)[1]
        if place and self._gaps[place - 1][1] == start:
            place -= 1
            start = self._gaps.pop(place)[0]
        self._gaps.insert(place, (start, stop))


def _pinned(size: int) -> npt.NDArray[np.uint8]:
    import torch  # here, so that readers of the store need not load it

    memory: npt.NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memory
