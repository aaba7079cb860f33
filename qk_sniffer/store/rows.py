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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, eq=False)
class Rows:
    """Sampled rows of one (layer, kind) of a batch, or of a part of it. Not to be changed once they were put.

    `vectors` (num_heads, num_rows, head_dim): on the CPU, in the model's own dtype, which is bfloat16, float16 or
    float32; the heads in the order that `HeadSpec.row` refers to. `index` (num_rows,): where each row's example
    stands in the source, equal ones together. `position` (num_rows,): ascending within an example.
    `token_id` (num_rows,), or None.
    """

    layer: int
    kind: str
    vectors: "torch.Tensor"
    index: npt.NDArray[np.integer[Any]]
    position: npt.NDArray[np.integer[Any]]
    token_id: npt.NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class Form:
    """What the rows of a (layer, kind) have in common throughout a journal."""

    num_heads: int
    head_dim: int
    dtype: str
    token_ids: bool


@dataclass(frozen=True, eq=False)
class Piece:
    """Checked rows with the number of their batch.

    Raises:
        ValueError: the rows are not as `Rows` says.
    """

    rows: Rows
    batch: int

    def __post_init__(self) -> None:
        rows = self.rows
        if str(rows.vectors.dtype) not in DTYPES:
            raise ValueError(f"vectors of {rows.vectors.dtype} cannot be stored; {', '.join(DTYPES)} can")
        if rows.vectors.device.type != "cpu":
            raise ValueError(f"vectors on {rows.vectors.device} cannot be stored; move them to the CPU")
        if rows.kind not in KINDS:
            raise ValueError(f"the kind is {rows.kind!r}; it must be one of {KINDS}")
        columns = [rows.index, rows.position] + ([] if rows.token_id is None else [rows.token_id])
        if any(column.shape != (self.num_rows,) for column in columns):
            raise ValueError(f"{self.num_rows} vectors a head come with columns of {[c.shape for c in columns]}")
        assert self.runs is not None

    @property
    def num_rows(self) -> int:
        return int(self.rows.vectors.shape[1])

    @property
    def nbytes(self) -> int:
        return self.rows.vectors.numel() * self.rows.vectors.element_size() + 12 * self.num_rows

    @property
    def form(self) -> Form:
        num_heads, _, head_dim = self.rows.vectors.shape
        return Form(num_heads, head_dim, DTYPES[str(self.rows.vectors.dtype)], self.rows.token_id is not None)

    @property
    def indices(self) -> set[int]:
        """The examples that the rows are of."""
        return set(self.runs[:, RUN_COLUMNS.index("index")].tolist())

    @cached_property
    def runs(self) -> Int64:
        """(num_runs, 6), the starts counted from the piece's first row."""
        index, position = self.rows.index.astype(np.int64), self.rows.position.astype(np.int64)
        if not self.num_rows:
            return np.empty((0, len(RUN_COLUMNS)), np.int64)
        starts = np.flatnonzero(np.concatenate([[True], index[1:] != index[:-1]]))
        stops = np.append(starts[1:], self.num_rows)
        ascends = position[1:] > position[:-1]
        ascends[starts[1:] - 1] = True
        if not ascends.all():
            raise ValueError(f"positions of layer {self.rows.layer} {self.rows.kind} do not ascend within an example")
        batch = np.full(len(starts), self.batch)
        return np.stack([batch, index[starts], starts, stops - starts, position[starts], position[stops - 1]], axis=1)


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
    first = pieces[0].rows
    name = block_name(first.layer, first.kind)
    num_heads, _, head_dim = first.vectors.shape
    num_rows = sum(piece.num_rows for piece in pieces)
    runs = np.concatenate([piece.runs for piece in pieces])
    before = np.cumsum([0] + [piece.num_rows for piece in pieces[:-1]])
    runs[:, RUN_COLUMNS.index("start")] += np.repeat(before, [len(piece.runs) for piece in pieces])

    def column(values: Iterable[npt.NDArray[Any]], title: str) -> Tensor:
        joined = np.concatenate(list(values)).astype(np.int32)
        return Tensor(f"{name}.{title}", "I32", (num_rows,), lambda: [joined])

    tensors = [
        Tensor(f"{name}.runs", "I64", runs.shape, lambda: [runs]),
        column((piece.rows.position for piece in pieces), "position"),
    ]
    if first.token_id is not None:
        tensors.append(column((p.rows.token_id for p in pieces if p.rows.token_id is not None), "token_id"))
    dtype, shape = DTYPES[str(first.vectors.dtype)], (num_heads, num_rows, head_dim)
    return [*tensors, Tensor(f"{name}.vectors", dtype, shape, lambda: _joined(pieces))]


def _joined(pieces: Sequence[Piece]) -> Iterator[npt.NDArray[Any]]:
    # Head by head all pieces' rows; a few heads at a time, where they are small, because every chunk costs a call.
    arrays = [_bits(piece.rows.vectors) for piece in pieces]
    num_heads = len(arrays[0])
    step = max(1, _JOIN_BYTES * num_heads // sum(array.nbytes for array in arrays))
    for head in range(0, num_heads, step):
        part = [array[head : head + step] for array in arrays]
        yield part[0] if len(part) == 1 else np.concatenate(part, axis=1)


def _bits(vectors: "torch.Tensor") -> npt.NDArray[Any]:
    """The tensor's memory as numpy sees it; bfloat16, which numpy lacks, as integers."""
    import torch  # here, so that readers of a journal need not load it

    return vectors.detach().view(torch.int16 if vectors.element_size() == 2 else torch.int32).numpy()
