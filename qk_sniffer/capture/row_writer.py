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
from qk_sniffer.capture.gather import DeviceCopiers, DeviceIndices, Heads, TokenIndices, take
from qk_sniffer.store.layout import ATTENTION
from qk_sniffer.store.rows import Rows, RowSink, RowTokens
from qk_sniffer.timing import Stages

PIECE_BYTES = 64 * 2**20
"""The most bytes that one gather takes; larger ones are cut by rows, so that memory stays bounded."""

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
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
    _recent: list[tuple[TokenIndices, bool, RowTokens]] = field(default_factory=list, init=False, repr=False)

    def of(self, tokens: TokenIndices, *, with_columns: bool) -> RowTokens:
        """Returns the description of rows of these tokens, with or without the columns of vectors.

        The last two are kept: those of queries and of keys, which most layers share.
        """
        for known, has_columns, described in self._recent:
            if known is tokens and has_columns == with_columns:
                return described
        row, place = tokens.row, tokens.position
        described = RowTokens(
            self.index[row],
            place if self.position is None else self.position[row, place],
            {name: values[row, place] for name, values in self.columns.items()} if with_columns else {},
            self.part[row],
        )
        self._recent[:] = [*self._recent[-1:], (tokens, with_columns, described)]
        return described


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
        self._write(batch, block, states.device, tokens, "gather", partial(take, states, heads), with_columns=True)

    def write_summary(
        self, batch: BatchRows, call: AttentionCall, tokens: DeviceIndices, summarizer: Summarizer
    ) -> None:
        """Writes the attention summaries of the queries `tokens` of a call."""
        heads = self.heads[call.layer, "q"]
        block = _Block(call.layer, ATTENTION, len(heads.numbers), summarizer.table.width, torch.float32)
        fill = partial(summarizer.write, call)
        self._write(batch, block, call.query.device, tokens, "attention", fill, with_columns=False)

    def _write(
        self,
        batch: BatchRows,
        block: "_Block",
        device: torch.device,
        tokens: DeviceIndices,
        stage: str,
        fill: Callable[[DeviceIndices, torch.Tensor], None],
        *,
        with_columns: bool,
    ) -> None:
        """Writes rows of `tokens` piece by piece. `fill` fills (heads, tokens, width) on the device for a piece."""
        if not len(tokens):
            return
        sink = self._sink
        row_bytes = block.num_heads * block.width * block.dtype.itemsize
        step = max(1, min(PIECE_BYTES, sink.piece_bytes) // row_bytes)
        for start in range(0, len(tokens), step):
            piece = tokens.part(start, start + step)
            described = batch.of(piece.tokens, with_columns=with_columns)
            rows = Rows(block.layer, block.kind, block.num_heads, block.width, block.dtype, described)
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
