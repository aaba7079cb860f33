"""From a layer's query or key states to the journal's memory: the planned tokens of the chosen heads, in one pass.

Tokens are gathered by their indices; on a processor, those that stand together in great numbers, as all of a text do
with `sampler=all`, are copied as blocks, which takes a tenth of the time. On CUDA they are gathered on the stream that
computes, into one of two buffers on the device, and a stream of its own copies from there to the journal's pinned
memory: nobody waits but the journal's thread, which must read what arrives.

Shapes: B batch, H heads of the states, n tokens, d head_dim.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.backbone.backbone import on_device
from qk_sniffer.capture.sampling import Picks

Key = TypeVar("Key", bound=Hashable)

MIN_RANGE = 64
"""Tokens that stand together are copied as blocks when there are so many on average; below, gathering is as fast.
A block is a kernel on CUDA, which gathers as fast as it copies: there is none there."""

NUM_BUFFERS = 2
"""On a CUDA device: one is filled while the other is copied to the host."""

Ranges = Sequence[tuple[int, int, int, int]]
"""(place of the first among the rows that are taken, row of the batch, first position, number of tokens)."""


@dataclass(frozen=True, eq=False)
class TokenIndices:
    """Tokens of a batch: their rows and positions, each (num_tokens,), and perhaps as ranges."""

    row: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    ranges: Ranges | None

    @classmethod
    def of(cls, picks: Picks, device: torch.device) -> "TokenIndices":
        row, position = picks.row, picks.position
        if device.type == "cuda":
            return cls(row, position, None)
        breaks = (row[1:] != row[:-1]) | (position[1:] != position[:-1] + 1)
        starts = np.flatnonzero(np.concatenate([[len(row) > 0], breaks]))
        if len(starts) * MIN_RANGE > len(row):
            return cls(row, position, None)
        counts = np.diff(starts, append=len(row))
        columns = (starts, row[starts], position[starts], counts)
        return cls(row, position, list(zip(*(column.tolist() for column in columns), strict=True)))

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, eq=False)
class DeviceIndices:
    """`Places` as a forward uses them. `index` (2, num_tokens) int32: rows and positions on the device; None with
    ranges."""

    places: TokenIndices
    index: torch.Tensor | None


def send(places: Mapping[Key, TokenIndices], device: torch.device) -> dict[Key, DeviceIndices]:
    """Brings the indices of all `places` to the device in one tensor, in turn with what it computes.

    An object that is there several times is sent once.
    """
    distinct = {id(each): each for each in places.values()}
    gathered = [each for each in distinct.values() if each.ranges is None]
    parts: Iterator[torch.Tensor] = iter(())
    if gathered:
        flat = np.concatenate([np.stack([each.row, each.position]) for each in gathered], axis=1)
        parts = iter(on_device(torch.from_numpy(flat), device).split([len(each) for each in gathered], dim=1))
    sent = {key: DeviceIndices(each, next(parts) if each.ranges is None else None) for key, each in distinct.items()}
    return {key: sent[id(each)] for key, each in places.items()}


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads to take, ascending."""

    numbers: Sequence[int]
    ranges: Sequence[tuple[int, int, int]] = field(init=False)
    """(place of the first among those that are taken, first head, number of heads)."""
    _index: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        starts = [0] + [at for at in range(1, len(self.numbers)) if self.numbers[at] != self.numbers[at - 1] + 1]
        counts = np.diff(starts, append=len(self.numbers)).tolist()
        ranges = [(at, self.numbers[at], count) for at, count in zip(starts, counts, strict=True)]
        object.__setattr__(self, "ranges", ranges)

    def index(self, device: torch.device) -> torch.Tensor:
        """(num_heads, 1) int64 on the device, sent once."""
        if device not in self._index:
            self._index[device] = on_device(torch.tensor(self.numbers), device)[:, None]
        return self._index[device]


@dataclass(frozen=True, eq=False)
class PendingGather:
    """The vectors of tokens `start` to `stop` of those sent, to be taken from `states` (B, H, n, d).

    `shape`: (num_heads, num_tokens, d).
    """

    states: torch.Tensor
    heads: Heads
    sent: DeviceIndices
    start: int
    stop: int
    lanes: "DeviceCopiers"

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.heads.numbers), self.stop - self.start, self.states.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.states.dtype

    def copy_to(self, memory: torch.Tensor) -> Callable[[], None] | None:
        """Fills `memory`, which has this shape and dtype, or begins to; what is returned waits for the end."""
        return self.lanes.fill(memory, self.states.device, self.take)

    def take(self, out: torch.Tensor) -> None:
        """Copies the vectors into `out`, on the device of the states."""
        if self.sent.index is not None:
            # Layers may be on several devices.
            row, position = self.sent.index[:, None, self.start : self.stop].to(self.states.device, torch.int64)
            indices = [row, self.heads.index(self.states.device), position]
            torch.ops.aten.index.Tensor_out(self.states, indices, out=out)
            return
        assert self.sent.places.ranges is not None
        for at, row, first, count in _part(self.sent.places.ranges, self.start, self.stop):
            for place, head, num_heads in self.heads.ranges:
                block = self.states[row, head : head + num_heads, first : first + count]
                out[place : place + num_heads, at : at + count].copy_(block)


def _part(ranges: Ranges, start: int, stop: int) -> list[tuple[int, int, int, int]]:
    """The ranges of the tokens `start` to `stop`, which are counted from `start`."""
    part = []
    for at, row, first, count in ranges:
        low, high = max(at, start), min(at + count, stop)
        if low < high:
            part.append((low - start, row, first + low - at, high - low))
    return part


class DeviceCopiers:
    """The ways from each device to the host's memory."""

    def __init__(self) -> None:
        self._cuda: dict[torch.device, _CudaLane] = {}

    def fill(
        self, memory: torch.Tensor, device: torch.device, take: Callable[[torch.Tensor], None]
    ) -> Callable[[], None] | None:
        """Lets `take` fill a tensor on `device` that is, or goes to, `memory`; what is returned waits for the end."""
        if device.type == "cpu":
            take(memory)
            return None
        if device.type == "cuda":
            if device not in self._cuda:
                self._cuda[device] = _CudaLane(device)
            return self._cuda[device].fill(memory, take)
        staged = torch.empty_like(memory, device=device)
        take(staged)
        memory.copy_(staged)
        return None


class _CudaLane:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * NUM_BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self._next = 0

    def fill(self, memory: torch.Tensor, take: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        turn, self._next = self._next, (self._next + 1) % NUM_BUFFERS
        computing = torch.cuda.current_stream(self._device)
        if (before := self._copied[turn]) is not None:
            computing.wait_event(before)  # also before the allocator gives a smaller buffer's memory to others
        if self._buffers[turn].nbytes < memory.nbytes:
            size = 1 << (memory.nbytes - 1).bit_length()
            self._buffers[turn] = torch.empty(size, dtype=torch.uint8, device=self._device)
        staged = self._buffers[turn][: memory.nbytes].view(memory.dtype).view(memory.shape)
        take(staged)
        self._stream.wait_stream(computing)
        copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        with torch.cuda.stream(self._stream):
            memory.copy_(staged, non_blocking=True)
            copied.record(self._stream)
        self._copied[turn] = copied
        return copied.synchronize
