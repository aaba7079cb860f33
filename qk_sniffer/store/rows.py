"""Rows on their way to the journal, and the form that they have in its segments.

A segment has, for each (layer, kind) in it, one block of rows: the tensors

    l00q.runs      int64 (num_runs, 6)    see `RUN_COLUMNS`
    l00q.position  int32 (num_rows,)
    l00q.token_id  int32 (num_rows,)      only where they were captured
    l00q.vectors   (num_heads, num_rows, head_dim), in the model's own dtype

A run is rows of one example that stand together. The runs say in a few bytes which rows a block holds, so that a
compaction can be planned without reading the rows, and each head's rows of a block lie together on the disk.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from qk_sniffer.store.buffer import Slot
from qk_sniffer.store.layout import KINDS
from qk_sniffer.store.segment import Tensor

if TYPE_CHECKING:
    import torch

RUN_COLUMNS = ("batch", "index", "start", "count", "first", "last")
"""Of a run: its batch, its example's index in the source, its first row in the block, the number of its rows, and
the positions of its first and last row. int64."""

DTYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
"""The dtypes that vectors may have, as torch and as safetensors name them."""

_JOIN_BYTES = 1 << 23

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """What the rows of a (layer, kind) have in common throughout a journal."""

    num_heads: int
    head_dim: int
    dtype: str
    token_ids: bool


class Vectors(Protocol):
    """Vectors that are somewhere: `shape` is (num_heads, num_rows, head_dim)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> "torch.dtype": ...

    def copy_to(self, memory: "torch.Tensor") -> Callable[[], None] | None:
        """Fills `memory`, a tensor of this shape and dtype, or begins to: what is returned waits for the end."""
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """Sampled rows of one (layer, kind) of a batch, or of a part of it.

    `vectors`: in the model's own dtype, which is bfloat16, float16 or float32; the heads in the order that
    `HeadSpec.row` refers to. `index` (num_rows,): where each row's example stands in the source, equal ones together.
    `position` (num_rows,): ascending within an example. `token_id` (num_rows,), or None.
    """

    layer: int
    kind: str
    vectors: Vectors
    index: npt.NDArray[np.integer[Any]]
    position: npt.NDArray[np.integer[Any]]
    token_id: npt.NDArray[np.integer[Any]] | None = None

    @property
    def num_rows(self) -> int:
        return self.vectors.shape[1]

    @property
    def form(self) -> Form:
        """
        Raises:
            ValueError: the kind is none, or vectors of this dtype cannot be stored.
        """
        if self.kind not in KINDS:
            raise ValueError(f"the kind is {self.kind!r}; it must be one of {KINDS}")
        if (dtype := DTYPES.get(str(self.vectors.dtype))) is None:
            raise ValueError(f"vectors of {self.vectors.dtype} cannot be stored; {', '.join(DTYPES)} can")
        num_heads, _, head_dim = self.vectors.shape
        if not num_heads:
            raise ValueError("there are no heads")
        return Form(num_heads, head_dim, dtype, self.token_id is not None)

    @property
    def nbytes(self) -> int:
        """What they take in a buffer."""
        columns = 1 if self.token_id is None else 2
        return prod(self.vectors.shape) * self.vectors.dtype.itemsize + 4 * columns * self.num_rows

    def runs(self, batch: int) -> Int64:
        """(num_runs, 6): see `RUN_COLUMNS`.

        Raises:
            ValueError: the columns are not as this class says.
        """
        columns = [self.index, self.position] + ([] if self.token_id is None else [self.token_id])
        if any(column.shape != (self.num_rows,) for column in columns):
            raise ValueError(f"{self.num_rows} vectors a head come with columns of {[c.shape for c in columns]}")
        if not self.num_rows:
            return np.empty((0, len(RUN_COLUMNS)), np.int64)
        index, position = self.index.astype(np.int64), self.position.astype(np.int64)
        starts = np.flatnonzero(np.concatenate([[True], index[1:] != index[:-1]]))
        stops = np.append(starts[1:], self.num_rows)
        ascends = position[1:] > position[:-1]
        ascends[starts[1:] - 1] = True
        if not ascends.all():
            raise ValueError(f"positions of layer {self.layer} {self.kind} do not ascend within an example")
        of_batch = np.full(len(starts), batch)
        first, last = position[starts], position[stops - 1]
        return np.stack([of_batch, index[starts], starts, stops - starts, first, last], axis=1)


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows in a slot of the writer's buffer. `vectors` (num_heads, num_rows, head_dim): their bits, as integers,
    which are there once `arrived`, unless that is None, has returned."""

    layer: int
    kind: str
    batch: int
    form: Form
    runs: Int64
    slot: Slot
    vectors: npt.NDArray[Any]
    position: npt.NDArray[np.int32]
    token_id: npt.NDArray[np.int32] | None
    arrived: Callable[[], None] | None

    @classmethod
    def copied(cls, rows: Rows, batch: int, runs: Int64, slot: Slot) -> "Piece":
        """Copies `rows` into `slot`, which has their size, or begins to; `runs` are those of `rows.runs(batch)`."""
        import torch  # here, so that readers of a journal need not load it

        columns = [rows.position] + ([] if rows.token_id is None else [rows.token_id])
        end = 4 * len(columns) * rows.num_rows
        stored = slot.memory[:end].view(np.int32).reshape(len(columns), rows.num_rows)
        for row, column in zip(stored, columns, strict=True):
            row[:] = column
        bits, shape = slot.memory[end:], rows.vectors.shape
        arrived = rows.vectors.copy_to(torch.from_numpy(bits).view(rows.vectors.dtype).view(shape))
        return cls(
            layer=rows.layer,
            kind=rows.kind,
            batch=batch,
            form=rows.form,
            runs=runs,
            slot=slot,
            vectors=bits.view(f"u{rows.vectors.dtype.itemsize}").reshape(shape),
            position=stored[0],
            token_id=None if rows.token_id is None else stored[1],
            arrived=arrived,
        )

    def wait(self) -> None:
        """Returns when nobody writes to the memory any more."""
        if self.arrived is not None:
            self.arrived()

    @property
    def num_rows(self) -> int:
        return len(self.position)

    @property
    def nbytes(self) -> int:
        return len(self.slot.memory)


def block_name(layer: int, kind: str) -> str:
    """What the names of a block's tensors begin with: `l00q`."""
    return f"l{layer:02d}{kind}"


def parse_tensor_name(name: str) -> tuple[int, str, str]:
    """Layer, kind and column of a tensor in a segment."""
    match = re.fullmatch(r"l(\d+)([qk])\.(\w+)", name)
    assert match is not None, f"{name} is not the name of a segment's tensor"
    return int(match[1]), match[2], match[3]


def block_tensors(pieces: Sequence[Piece]) -> list[Tensor]:
    """The block of `pieces`, which are of one (layer, kind), in this order."""
    first = pieces[0]
    name = block_name(first.layer, first.kind)
    num_rows = sum(piece.num_rows for piece in pieces)
    runs = np.concatenate([piece.runs for piece in pieces])
    before = np.cumsum([0] + [piece.num_rows for piece in pieces[:-1]])
    runs[:, RUN_COLUMNS.index("start")] += np.repeat(before, [len(piece.runs) for piece in pieces])

    columns = {"position": [piece.position for piece in pieces]}
    if first.token_id is not None:
        columns["token_id"] = [piece.token_id for piece in pieces if piece.token_id is not None]
    tensors = [Tensor(f"{name}.runs", "I64", runs.shape, lambda: [runs])]
    tensors += [Tensor(f"{name}.{title}", "I32", (num_rows,), partial(iter, parts)) for title, parts in columns.items()]
    shape = (first.form.num_heads, num_rows, first.form.head_dim)
    return [*tensors, Tensor(f"{name}.vectors", first.form.dtype, shape, lambda: _joined(pieces))]


def _joined(pieces: Sequence[Piece]) -> Iterator[npt.NDArray[Any]]:
    # Head by head all pieces' rows; a few heads at a time, where they are small, because every chunk costs a call.
    arrays = [piece.vectors for piece in pieces]
    num_heads = len(arrays[0])
    step = max(1, _JOIN_BYTES * num_heads // sum(array.nbytes for array in arrays))
    for head in range(0, num_heads, step):
        part = [array[head : head + step] for array in arrays]
        yield part[0] if len(part) == 1 else np.concatenate(part, axis=1)
