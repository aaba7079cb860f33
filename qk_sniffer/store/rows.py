"""Describes rows on their way to the journal, and defines their form in its segments.

Vectors take this path: `JournalWriter.reserve` takes `Rows`, which describe the rows without their vectors, and gives a
`Slot` with memory for the vectors. The capture fills it and commits it. A thread of the writer writes it to a segment.

A segment has, for each (layer, kind) in it, one block of rows, which consists of these tensors:

    l00q.runs      int64 (num_runs, 7)    see `RUN_COLUMNS`
    l00q.position  int32 (num_rows,)
    l00q.token_id  int32 (num_rows,)      this and the other `TOKEN_COLUMNS`: only where they were captured
    l00q.vectors   (num_heads, num_rows, head_dim), in the model's own dtype

A run is consecutive rows of one example. The runs list the rows of a block in a few bytes, so that a compaction is
prepared without reading the rows. The rows of one head are contiguous in a block.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from qk_sniffer.config import CaptureConfig
from qk_sniffer.store.buffer import Region
from qk_sniffer.store.layout import FILE_KINDS, OFFSET_COLUMNS
from qk_sniffer.store.segment import Tensor

if TYPE_CHECKING:
    import torch

RUN_COLUMNS = ("batch", "index", "start", "count", "first", "last", "part")
"""The columns of a run, int64: its batch, the index of its example in the source, its first row in the block, the
number of its rows, the positions of its first and last row, and the part of the text that its example is. Journals of
earlier versions have no `part`."""

BATCH, INDEX, START, COUNT, FIRST, LAST, PART = range(len(RUN_COLUMNS))

MOST_PARTS = 1 << 24
"""The most parts of a text."""

MOST_INDEX = 1 << 38
"""The most rows of a source."""

TOKEN_COLUMNS = ("token_id", *OFFSET_COLUMNS)
"""The columns of a row's token: its id, and its first character and the one after its last, or `NO_CHARACTER`."""

NO_CHARACTER = -1
"""The `char_start` and `char_end` of a token that no character belongs to."""

DTYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
"""The dtypes that vectors may have: torch's name to that of safetensors."""

_JOIN_BYTES = 1 << 23

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """The properties that all rows of a (layer, kind) share throughout a journal."""

    num_heads: int
    head_dim: int
    dtype: str
    columns: tuple[str, ...]
    """Those of `TOKEN_COLUMNS` that are stored."""


@dataclass(frozen=True, eq=False)
class RowTokens:
    """The tokens of sampled rows: those of one (layer, kind) of a batch, or of several that share them.

    `index` (num_rows,) is the index of each row's example in the source, and `part` (num_rows,) the part of its text
    that it is, None for part 0; rows of an example are consecutive. `position` (num_rows,) ascends within an example.
    `columns` are further columns by name, of `TOKEN_COLUMNS`, each (num_rows,).
    """

    index: npt.NDArray[np.integer[Any]]
    position: npt.NDArray[np.integer[Any]]
    columns: Mapping[str, npt.NDArray[np.integer[Any]]] = field(default_factory=dict)
    part: npt.NDArray[np.integer[Any]] | None = None

    def __len__(self) -> int:
        return len(self.position)

    @property
    def stored(self) -> list[npt.NDArray[np.integer[Any]]]:
        """The int32 columns that are stored next to the vectors."""
        return [self.position, *self.columns.values()]

    def runs(self, batch: int) -> Int64:
        """Returns the runs (num_runs, 7) of these rows, in a new array: see `RUN_COLUMNS`.

        Raises:
            ValueError: there are no rows, or the columns are not as this class says.
        """
        runs = self._runs.copy()
        runs[:, BATCH] = batch
        return runs

    @cached_property
    def _runs(self) -> Int64:
        # Made once: all layers of a step of decoding have the same few tokens, and this takes longer than their gather.
        num_rows = len(self)
        part = np.zeros(self.index.shape, np.int64) if self.part is None else self.part.astype(np.int64)
        shapes = [column.shape for column in (self.index, part, *self.stored)]
        if not num_rows or any(shape != (num_rows,) for shape in shapes):
            raise ValueError(f"the columns must have one value a row and at least one row; their shapes are {shapes}")
        index, position = self.index.astype(np.int64), self.position.astype(np.int64)
        changes = (index[1:] != index[:-1]) | (part[1:] != part[:-1])
        starts = np.flatnonzero(np.concatenate([[True], changes]))
        stops = np.append(starts[1:], num_rows)
        ascends = position[1:] > position[:-1]
        ascends[starts[1:] - 1] = True
        if not ascends.all():
            raise ValueError("positions do not ascend within an example")
        of_batch = np.zeros(len(starts), np.int64)
        first, last = position[starts], position[stops - 1]
        return np.stack([of_batch, index[starts], starts, stops - starts, first, last, part[starts]], axis=1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Describes sampled rows of one (layer, kind) of a batch, or of a part of it, without their vectors.

    `num_heads`, `head_dim` and `dtype` are those of the vectors. The dtype is the model's own: bfloat16, float16 or
    float32.
    """

    layer: int
    kind: str
    num_heads: int
    head_dim: int
    dtype: "torch.dtype"
    tokens: RowTokens

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @cached_property
    def form(self) -> Form:
        """The form of the rows.

        Raises:
            ValueError: the kind or a column is unknown, vectors of this dtype cannot be stored, or no head is captured.
        """
        columns = self.tokens.columns
        if self.kind not in FILE_KINDS:
            raise ValueError(f"the kind is {self.kind!r}; it must be one of {FILE_KINDS}")
        if (dtype := DTYPES.get(str(self.dtype))) is None:
            raise ValueError(f"vectors of {self.dtype} cannot be stored; {', '.join(DTYPES)} can")
        if strangers := columns.keys() - {*TOKEN_COLUMNS}:
            raise ValueError(f"the columns {sorted(strangers)} cannot be stored; {TOKEN_COLUMNS} can")
        if not self.num_heads:
            raise ValueError("there are no heads")
        return Form(self.num_heads, self.head_dim, dtype, tuple(columns))

    @property
    def nbytes(self) -> int:
        """The bytes that the rows take in a buffer."""
        vector_bytes = self.num_heads * self.head_dim * self.dtype.itemsize
        return self.num_rows * (vector_bytes + 4 * len(self.tokens.stored))


def example_key(index: int, part: int) -> int:
    """Returns the number that names an example in its source. Numbers ascend by index, then by part."""
    return index * MOST_PARTS + part


def index_of(key: int) -> int:
    """Returns the index of the example with this key."""
    return key // MOST_PARTS


def keys_of(runs: Int64) -> Int64:
    """Returns the key of the example of each run, (num_runs,)."""
    return runs[:, INDEX] * MOST_PARTS + runs[:, PART]


def with_parts(runs: Int64) -> Int64:
    """Returns `runs` (num_runs, 7), as read from a segment; those of earlier versions are of part 0."""
    return np.pad(runs, ((0, 0), (0, len(RUN_COLUMNS) - runs.shape[1])))


class Event(Protocol):
    """The end of a copy, such as a `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Waits for the end."""


@dataclass(eq=False)
class Slot:
    """Rows in a region of the writer's buffer.

    `vectors` (num_heads, num_rows, head_dim) is the memory to fill. `bits` is the same memory as integers of the same
    size. `event` is the end of the copy that fills it; None for a copy that is done. `committed`: whether the rows are
    the writer's.
    """

    layer: int
    kind: str
    form: Form
    runs: Int64
    region: Region
    vectors: "torch.Tensor"
    bits: npt.NDArray[Any]
    position: npt.NDArray[np.int32]
    tokens: Mapping[str, npt.NDArray[np.int32]]
    event: Event | None = None
    committed: bool = False

    @classmethod
    def of(cls, rows: Rows, runs: Int64, region: Region) -> "Slot":
        """Copies the columns of `rows` into `region`, which has their size; `runs` are those of `rows`."""
        import torch  # here, so that readers of a journal need not load it

        columns = rows.tokens.stored
        end = 4 * len(columns) * rows.num_rows
        stored = region.memory[:end].view(np.int32).reshape(len(columns), rows.num_rows)
        for row, column in zip(stored, columns, strict=True):
            row[:] = column
        raw, shape = region.memory[end:], (rows.num_heads, rows.num_rows, rows.head_dim)
        return cls(
            layer=rows.layer,
            kind=rows.kind,
            form=rows.form,
            runs=runs,
            region=region,
            vectors=torch.from_numpy(raw).view(rows.dtype).view(shape),
            bits=raw.view(f"u{rows.dtype.itemsize}").reshape(shape),
            position=stored[0],
            tokens=dict(zip(rows.tokens.columns, stored[1:], strict=True)),
        )

    def wait(self) -> None:
        """Returns when the copy into the memory has ended."""
        if self.event is not None:
            self.event.synchronize()

    @property
    def batches(self) -> set[int]:
        """The batches of the rows."""
        return set(self.runs[:, BATCH].tolist())

    @property
    def num_rows(self) -> int:
        return len(self.position)

    @property
    def nbytes(self) -> int:
        return len(self.region.memory)


class RowSink(Protocol):
    """Takes rows on their way from the forward pass: reserves memory for them, and keeps them once they are filled."""

    @property
    def piece_bytes(self) -> int:
        """The size up to which rows are reserved at a time. Cut larger ones into parts."""

    @property
    def wait_s(self) -> float:
        """Seconds that `reserve` has waited for memory."""

    def reserve(self, rows: Rows) -> AbstractContextManager[Slot]:
        """Reserves memory for the vectors of `rows`. A block that ends before `commit` gives the memory back.

        Raises:
            ValueError: the rows are not as `Rows` says, or not like earlier ones of the same (layer, kind).
        """

    def commit(self, slot: Slot, event: Event | None) -> None:
        """Keeps a filled slot. `event` is the end of the copy that fills it; None for a copy that is done."""


def token_columns(capture: CaptureConfig) -> list[str]:
    """Returns the `TOKEN_COLUMNS` that the journal of a job with the settings `capture` has."""
    has_ids = capture.capture_token_ids or capture.capture_token_strings
    return [*(["token_id"] if has_ids else []), *(OFFSET_COLUMNS if capture.capture_offsets else ())]


def block_name(layer: int, kind: str) -> str:
    """Returns the prefix of the names of a block's tensors: `l00q`."""
    return f"l{layer:02d}{kind}"


def parse_tensor_name(name: str) -> tuple[int, str, str] | None:
    """Returns the layer, kind and column of a tensor in a segment; None for a name that `block_tensors` never gives."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None or f"{block_name(int(match[1]), match[2])}.{match[3]}" != name:
        return None
    return int(match[1]), match[2], match[3]


_TENSOR_NAME = re.compile(rf"l([0-9]{{2,6}})([{''.join(FILE_KINDS)}])\.([a-z_]{{1,20}})")


def block_tensors(slots: Sequence[Slot]) -> list[Tensor]:
    """Returns the tensors of the block of `slots`, which are of one (layer, kind), in this order."""
    first = slots[0]
    name = block_name(first.layer, first.kind)
    num_rows = sum(slot.num_rows for slot in slots)
    runs = np.concatenate([slot.runs for slot in slots])
    before = np.cumsum([0] + [slot.num_rows for slot in slots[:-1]])
    runs[:, START] += np.repeat(before, [len(slot.runs) for slot in slots])

    columns = {"position": [slot.position for slot in slots]}
    columns |= {name: [slot.tokens[name] for slot in slots] for name in first.tokens}
    tensors = [Tensor(f"{name}.runs", "I64", runs.shape, lambda: [runs])]
    tensors += [Tensor(f"{name}.{title}", "I32", (num_rows,), partial(iter, parts)) for title, parts in columns.items()]
    shape = (first.form.num_heads, num_rows, first.form.head_dim)
    return [*tensors, Tensor(f"{name}.vectors", first.form.dtype, shape, lambda: _joined(slots))]


def _joined(slots: Sequence[Slot]) -> Iterator[npt.NDArray[Any]]:
    # The rows of all slots, head by head. Every chunk costs a call, so small heads are joined a few at a time.
    arrays = [slot.bits for slot in slots]
    num_heads = len(arrays[0])
    step = max(1, _JOIN_BYTES * num_heads // sum(array.nbytes for array in arrays))
    for head in range(0, num_heads, step):
        part = [array[head : head + step] for array in arrays]
        yield part[0] if len(part) == 1 else np.concatenate(part, axis=1)
