"""The memory of simulated CUDA devices, and page-locked memory of the host.

As in torch's caching allocator, a freed block can be taken at once by the stream that it was taken for: another stream
that still uses it then sees what that stream writes. New blocks are full of NaN.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from support.simulated_cuda.streams import Stream

UNWRITTEN = 0xFF
"""The bytes of new memory: NaN as floats, -1 as integers."""

_ROUNDING = 512

_pinned: list[torch.Tensor] = []
"""The page-locked memory. It is kept, so that no other memory has its addresses."""


@dataclass
class Pool:
    """The free blocks by stream and size."""

    free: dict[tuple[Stream, int], list[torch.UntypedStorage]] = field(default_factory=lambda: defaultdict(list))
    reused: int = 0
    """How many blocks were taken again."""

    def take(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, stream: Stream) -> "Block":
        """Returns a block for a tensor of this form."""
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if prod(size) else -1
        key = stream, -(-max(1, (last + 1) * dtype.itemsize) // _ROUNDING) * _ROUNDING
        if self.free[key]:
            self.reused += 1
            storage = self.free[key].pop()
        else:
            storage = torch.full(key[1:], UNWRITTEN, dtype=torch.uint8).untyped_storage()
        return Block(self, key, storage)


class Block:
    """Memory of a device; free once no tensor has it."""

    def __init__(self, pool: Pool, key: tuple[Stream, int], storage: torch.UntypedStorage) -> None:
        self._pool, self._key, self.storage = pool, key, storage

    def __del__(self) -> None:
        self._pool.free[self._key].append(self.storage)


def pinned_copy(values: torch.Tensor) -> torch.Tensor:
    """Returns a copy in page-locked memory, as `Tensor.pin_memory` does."""
    copied = values.clone()
    note_pinned(copied)
    return copied


def note_pinned(values: torch.Tensor) -> None:
    """Notes that the memory of `values` is page-locked."""
    _pinned.append(values)


def is_pinned(values: torch.Tensor) -> bool:
    """Whether the memory of `values`, on the host, is page-locked."""
    return any(0 <= values.data_ptr() - memory.data_ptr() < memory.nbytes for memory in _pinned)


def forget_pinned() -> None:
    _pinned.clear()
