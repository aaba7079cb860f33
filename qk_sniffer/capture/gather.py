"""Gathers the vectors of chosen tokens and heads from a layer's states into given memory, in one pass.

Tokens are gathered by their indices. On the CPU, long ranges of consecutive tokens, such as the whole examples of
`sampler=all`, are copied as blocks, which takes a tenth of the time. On CUDA the computing stream gathers them into one
of two buffers on the device, and a separate stream copies from there to page-locked memory. The forward pass does
not wait for that copy: the reader of the memory waits for its event.

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
"""The average length from which consecutive tokens are copied as blocks; below it, gathering is as fast. On CUDA each
block costs a kernel, and gathering is as fast as copying, so there are no ranges."""

NUM_BUFFERS = 2
"""Gather buffers on a CUDA device: one is filled while the other is copied to the host."""

Ranges = Sequence[tuple[int, int, int, int]]
"""(index of the first token among those that are taken, row of the batch, first position, number of tokens)."""


@dataclass(frozen=True, eq=False)
class TokenIndices:
    """Tokens of a batch: their rows and positions, each (num_tokens,). `ranges` are the same tokens as ranges, or None
    where gathering is as fast."""

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

    def part(self, start: int, stop: int) -> "TokenIndices":
        """Returns tokens `start` to `stop`."""
        ranges = None if self.ranges is None else _part(self.ranges, start, stop)
        return TokenIndices(self.row[start:stop], self.position[start:stop], ranges)

    def __len__(self) -> int:
        return len(self.row)


def _part(ranges: Ranges, start: int, stop: int) -> list[tuple[int, int, int, int]]:
    part = []
    for at, row, first, count in ranges:
        low, high = max(at, start), min(at + count, stop)
        if low < high:
            part.append((low - start, row, first + low - at, high - low))
    return part


@dataclass(frozen=True, eq=False)
class DeviceIndices:
    """`TokenIndices` with their copy on the device.

    `index` (2, num_tokens) int32 holds rows and positions. It is None for tokens with ranges.
    """

    tokens: TokenIndices
    index: torch.Tensor | None
    _split: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    def part(self, start: int, stop: int) -> "DeviceIndices":
        """Returns tokens `start` to `stop`; views of these, without a copy, or these themselves if they are all."""
        if start == 0 and stop >= len(self):
            return self
        return DeviceIndices(self.tokens.part(start, stop), None if self.index is None else self.index[:, start:stop])

    def rows_and_positions(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows and the positions (1, num_tokens) int64 on the device of a layer; `index` must not be None.

        They are made in the first call for a device: most layers share them.
        """
        assert self.index is not None
        if device not in self._split:
            # Layers may be on several devices.
            rows, positions = self.index[:, None].to(device, torch.int64)
            self._split[device] = rows, positions
        return self._split[device]

    def __len__(self) -> int:
        return len(self.tokens)


def send(tokens: Mapping[Key, TokenIndices], device: torch.device) -> dict[Key, DeviceIndices]:
    """Copies the indices of all `tokens` to the device in one tensor, in the order of its stream.

    An object that several keys share is sent once.
    """
    distinct = {id(each): each for each in tokens.values()}
    gathered = [each for each in distinct.values() if each.ranges is None]
    parts: Iterator[torch.Tensor] = iter(())
    if gathered:
        flat = np.concatenate([np.stack([each.row, each.position]) for each in gathered], axis=1)
        parts = iter(on_device(torch.from_numpy(flat), device).split([len(each) for each in gathered], dim=1))
    sent = {key: DeviceIndices(each, next(parts) if each.ranges is None else None) for key, each in distinct.items()}
    return {key: sent[id(each)] for key, each in tokens.items()}


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads to gather, ascending."""

    numbers: Sequence[int]
    ranges: Sequence[tuple[int, int, int]] = field(init=False)
    """(index of the first head among `numbers`, first head, number of consecutive heads)."""
    _index: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        starts = [0] + [at for at in range(1, len(self.numbers)) if self.numbers[at] != self.numbers[at - 1] + 1]
        counts = np.diff(starts, append=len(self.numbers)).tolist()
        ranges = [(at, self.numbers[at], count) for at, count in zip(starts, counts, strict=True)]
        object.__setattr__(self, "ranges", ranges)

    def index(self, device: torch.device) -> torch.Tensor:
        """Returns the numbers (num_heads, 1) int64 on the device; sends them on the first call."""
        if device not in self._index:
            self._index[device] = on_device(torch.tensor(self.numbers), device)[:, None]
        return self._index[device]


def take(states: torch.Tensor, heads: Heads, sent: DeviceIndices, out: torch.Tensor) -> None:
    """Copies the vectors of `sent` and `heads` from `states` (B, H, n, d) to `out` (num_heads, num_tokens, d).

    `out` has the dtype of the states and is on their device.
    """
    assert out.shape == (len(heads.numbers), len(sent), states.shape[-1])
    assert out.dtype == states.dtype
    if sent.index is not None:
        row, position = sent.rows_and_positions(states.device)
        torch.ops.aten.index.Tensor_out(states, [row, heads.index(states.device), position], out=out)
        return
    assert sent.tokens.ranges is not None
    for at, of_row, first, count in sent.tokens.ranges:
        for number, head, num_heads in heads.ranges:
            block = states[of_row, head : head + num_heads, first : first + count]
            out[number : number + num_heads, at : at + count].copy_(block)


class DeviceCopiers:
    """Copies from any device into the host's memory; keeps the streams and buffers of CUDA devices."""

    def __init__(self) -> None:
        self._cuda: dict[torch.device, _CudaCopier] = {}

    def fill(
        self, memory: torch.Tensor, device: torch.device, write: Callable[[torch.Tensor], None]
    ) -> torch.cuda.Event | None:
        """Fills `memory`, on the host, by `write`, which fills a tensor of its shape and dtype on `device`.

        Returns the event of the copy's end on CUDA; None where the memory is filled already.
        """
        if device.type == "cpu":
            write(memory)
            return None
        if device.type == "cuda":
            if device not in self._cuda:
                self._cuda[device] = _CudaCopier(device)
            return self._cuda[device].fill(memory, write)
        staged = torch.empty_like(memory, device=device)
        write(staged)
        memory.copy_(staged)
        return None


class _CudaCopier:
    """Copies from one CUDA device by its own stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * NUM_BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self._next = 0

    def fill(self, memory: torch.Tensor, take: Callable[[torch.Tensor], None]) -> torch.cuda.Event:
        """Lets `take` fill a buffer on the computing stream, then starts its copy to `memory`.

        Returns the event of the copy's end.
        """
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
        copied = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
        with torch.cuda.stream(self._stream):
            memory.copy_(staged, non_blocking=True)
            copied.record(self._stream)
        self._copied[turn] = copied
        return copied
