"""Keeps captured rows in the memory of the host, in the dtype of the model, until they are read or saved.

Rows are of an example, which has a number. The examples of a forward pass may go on in later passes, as in generation,
or be complete after it. The rows of a pass that fails are dropped.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.notebook.interrupts import Changes
from qk_sniffer.store.buffer import Region
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import ATTENTION
from qk_sniffer.store.rows import COUNT, INDEX, Event, Form, Rows, RowSink, Slot

BUNDLE = 64
"""The parts of a layer and kind that are joined when there are as many. A step of decoding gives one of a few rows,
whose objects take as much memory as its numbers."""


class PassSink(RowSink, Protocol):
    """Takes the rows of forward passes that someone else runs. In `Rows`, `index` is the number of an example."""

    changes: Changes
    """Ends and drops passes, and completes examples, inside a change."""

    def end_pass(self) -> None:
        """Ends a forward pass: the rows that were committed since the last one are all that it gives."""

    def drop_pass(self, examples: Collection[int]) -> None:
        """Drops the rows that were committed since the last pass ended: those of a pass that failed.

        `examples` are those of the pass. No later pass continues them. The numbers of those that began in the failed
        pass are given again to other examples.
        """

    def complete(self, records: Sequence[ExampleRecord]) -> None:
        """Completes examples, in any order: no later pass continues them."""


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The rows of a (layer, kind), by the number of the example and then by position."""

    vectors: torch.Tensor
    """(num_heads, num_rows, d), on the host, in the dtype of the model."""
    example: npt.NDArray[np.int32]
    """(num_rows,): the number of the example."""
    position: npt.NDArray[np.int32]
    """(num_rows,)"""


@dataclass(frozen=True, eq=False)
class _Parts:
    """The rows of a (layer, kind) in parts."""

    joined: tuple[StoredRows, ...] = ()
    recent: tuple[StoredRows, ...] = ()
    """The latest parts, each of a gather."""

    def with_recent(self, rows: StoredRows) -> "_Parts":
        """Returns the parts with those of another gather."""
        recent = (*self.recent, rows)
        return _Parts((*self.joined, _joined(recent))) if len(recent) == BUNDLE else _Parts(self.joined, recent)


class FinishedRows:
    """The rows of the passes that have ended by a moment. No later pass changes them."""

    def __init__(self, parts: dict[tuple[int, str], _Parts]) -> None:
        """`parts` are those of each (layer, kind)."""
        self._parts = parts

    def with_passes(self, slots: Sequence[Slot]) -> "FinishedRows":
        """Returns these rows and those of filled slots."""
        parts = {**self._parts}
        # A tensor that is made in inference mode cannot be used for training.
        with torch.inference_mode(mode=False):
            for slot in slots:
                slot.wait()
                key = slot.layer, slot.kind
                parts[key] = parts.get(key, _Parts()).with_recent(_rows_of(slot))
        return FinishedRows(parts)

    def rows(self, layer: int, kind: str) -> StoredRows | None:
        """Returns the rows of all captured heads of a (layer, kind); None if no pass has given any.

        The rows are joined and sorted in the first call, and kept so.
        """
        found = self._parts.get((layer, kind), _Parts())
        parts = [*found.joined, *found.recent]
        if not parts:
            return None
        joined = parts[0] if len(parts) == 1 else _joined(parts)
        self._parts[layer, kind] = _Parts((joined,))
        return joined


class MemoryStore:
    """A `PassSink` in the memory of the host. The rows of finished passes can be read at any time.

    Attributes:
        changes: see `PassSink`.
        finished: the rows of the passes that have ended until now.
        records: the complete examples by number.
        num_rows: the rows of vectors of finished passes, over all heads and kinds.
        nbytes: the bytes that these take, and those of attention summaries.
    """

    def __init__(self, *, piece_bytes: int) -> None:
        self.changes = Changes()
        self.piece_bytes = piece_bytes
        self.wait_s = 0.0
        self.records: dict[int, ExampleRecord] = {}
        self.num_rows = 0
        self.nbytes = 0
        self._forms: dict[tuple[int, str], Form] = {}
        self._of_pass: list[Slot] = []
        self.finished = FinishedRows({})

    @contextmanager
    def reserve(self, rows: Rows) -> Iterator[Slot]:
        """Takes new memory for the vectors of `rows`; see `RowSink.reserve`."""
        form, runs = rows.form, rows.tokens.runs(0)
        if (earlier := self._forms.get((rows.layer, rows.kind), form)) != form:
            raise ValueError(f"rows of layer {rows.layer} {rows.kind} are {form}, earlier ones {earlier}")
        yield Slot.of(rows, runs, Region(0, rows.nbytes, np.empty(rows.nbytes, np.uint8)))

    def commit(self, slot: Slot, event: Event | None) -> None:
        """Keeps a slot until its pass ends; see `RowSink.commit`."""
        slot.event = event
        slot.committed = True
        self._of_pass.append(slot)

    def end_pass(self) -> None:
        """See `PassSink.end_pass`."""
        # All that can fail comes before the first change.
        finished = self.finished.with_passes(self._of_pass)
        forms, num_rows, nbytes = {**self._forms}, self.num_rows, self.nbytes
        for slot in self._of_pass:
            forms[slot.layer, slot.kind] = slot.form
            if slot.kind != ATTENTION:
                num_rows += slot.vectors.shape[0] * slot.vectors.shape[1]
            nbytes += slot.nbytes
        self.finished, self._forms, self.num_rows, self.nbytes = finished, forms, num_rows, nbytes
        self._of_pass.clear()

    def drop_pass(self, examples: Collection[int]) -> None:
        """See `PassSink.drop_pass`."""
        for slot in self._of_pass:
            with suppress(Exception):
                slot.wait()  # until then the copy still writes to the memory
        self._of_pass.clear()

    def complete(self, records: Sequence[ExampleRecord]) -> None:
        """See `PassSink.complete`."""
        self.records |= {record.index: record for record in records}


def _rows_of(slot: Slot) -> StoredRows:
    example = np.repeat(slot.runs[:, INDEX], slot.runs[:, COUNT]).astype(np.int32)
    return StoredRows(_tensor(slot.bits, slot.vectors.dtype), example, slot.position)


def _tensor(bits: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """Returns the memory of `bits` as a tensor of `dtype`, whose numbers have the same size."""
    return torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype)


@torch.inference_mode(mode=False)
@torch.no_grad()
def _joined(parts: Sequence[StoredRows]) -> StoredRows:
    """Returns the rows of all parts, sorted."""
    example = np.concatenate([part.example for part in parts])
    position = np.concatenate([part.position for part in parts])
    vectors = torch.cat([part.vectors for part in parts], dim=1)
    key = example.astype(np.int64) << 32 | position
    if (np.diff(key) < 0).any():
        order = np.argsort(key, kind="stable")
        example, position, vectors = example[order], position[order], vectors[:, torch.from_numpy(order)]
    return StoredRows(vectors, example, position)
