"""Gathers rows of chosen tokens from the attention calls of a batch into the memory of a `RowSink`.

Each (layer, kind) costs one gather over the whole batch. A gather that is too large for the sink is cut into pieces.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.gather import DeviceCopiers, DeviceIndices, Heads, take
from qk_sniffer.store.layout import ATTENTION
from qk_sniffer.store.rows import Rows, RowSink
from qk_sniffer.timing import Stages

PIECE_BYTES = 64 * 2**20
"""The most bytes that one gather takes; larger ones are cut by rows, so that memory stays bounded."""

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class BatchRows:
    """Describes the tokens of a batch in its rows. B texts, n tokens with padding."""

    index: Integers
    """(B,): the index of each example in the source."""
    part: Integers
    """(B,): the part of its text that each example is."""
    columns: Mapping[str, Integers] = field(default_factory=dict)
    """(B, n) each: the `TOKEN_COLUMNS` of the rows of vectors, by name."""
    position: Integers | None = None
    """(B, n): the position of each token in its example; None where that is its place in the batch."""


class RowWriter:
    """Writes rows of the selected heads to `sink`."""

    def __init__(self, selection: Iterable[tuple[int, str, Sequence[int]]], sink: RowSink, stages: Stages) -> None:
        """`selection` has (layer, kind, heads), the heads ascending."""
        self.heads = {(layer, kind): Heads(heads) for layer, kind, heads in selection}
        self._sink = sink
        self._stages = stages
        self._copiers = DeviceCopiers()

    def write(self, batch: BatchRows, layer: int, kind: str, states: torch.Tensor, tokens: DeviceIndices) -> None:
        """Writes the vectors of `tokens` from `states` (B, heads of the layer, n, d)."""
        heads = self.heads[layer, kind]
        block = _Block(layer, kind, len(heads.numbers), states.shape[-1], states.dtype)
        self._write(batch, block, states.device, tokens, "gather", partial(take, states, heads), batch.columns)

    def write_summary(
        self, batch: BatchRows, call: AttentionCall, tokens: DeviceIndices, summarizer: Summarizer
    ) -> None:
        """Writes the attention summaries of the queries `tokens` of a call."""
        heads = self.heads[call.layer, "q"]
        block = _Block(call.layer, ATTENTION, len(heads.numbers), summarizer.table.width, torch.float32)
        self._write(batch, block, call.query.device, tokens, "attention", partial(summarizer.write, call), {})

    def _write(
        self,
        batch: BatchRows,
        block: "_Block",
        device: torch.device,
        tokens: DeviceIndices,
        stage: str,
        fill: Callable[[DeviceIndices, torch.Tensor], None],
        columns: Mapping[str, Integers],
    ) -> None:
        """Writes rows of `tokens` piece by piece. `fill` fills (heads, tokens, width) on the device for a piece."""
        if not len(tokens):
            return
        sink = self._sink
        row_bytes = block.num_heads * block.width * block.dtype.itemsize
        step = max(1, min(PIECE_BYTES, sink.piece_bytes) // row_bytes)
        for start in range(0, len(tokens), step):
            piece = tokens.part(start, start + step)
            row, place = piece.tokens.row, piece.tokens.position
            rows = Rows(
                block.layer,
                block.kind,
                block.num_heads,
                block.width,
                block.dtype,
                batch.index[row],
                place if batch.position is None else batch.position[row, place],
                {name: values[row, place] for name, values in columns.items()},
                batch.part[row],
            )
            waited_s = sink.wait_s
            with self._stages(stage), sink.reserve(rows) as slot:
                sink.commit(slot, self._copiers.fill(slot.vectors, device, partial(fill, piece)))
            self._stages.move(sink.wait_s - waited_s, stage, "queue")


@dataclass(frozen=True)
class _Block:
    """The rows of a (layer, kind): `num_heads` vectors or records of `width` numbers at each token."""

    layer: int
    kind: str
    num_heads: int
    width: int
    dtype: torch.dtype


def states_by_kind(call: AttentionCall) -> dict[str, torch.Tensor]:
    """Returns the states (B, H, n, d) of an attention call by kind."""
    states = {"q": call.query, "k": call.key}
    return states if call.value is None else states | {"v": call.value}


def other_states_by_kind(call: AttentionCall) -> dict[str, torch.Tensor]:
    """Returns the states of the other stage of an attention call by kind; an empty dict if it shows one stage alone."""
    return {} if call.other_stage is None else dict(zip(("q", "k"), call.other_stage, strict=True))
