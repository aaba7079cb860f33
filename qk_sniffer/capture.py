"""Capture: the planned positions of a batch are gathered from each attention call and handed to the journal.

What is gathered is decided before the forward: the sampler's positions of every (layer, kind) are sent to the
device in one tensor. In the forward each (layer, kind) costs one gather over the whole batch, cut into pieces
only where it would outgrow the journal's queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qk_sniffer.attention import AttentionCall, ForwardDone
from qk_sniffer.backbone import Backbone
from qk_sniffer.corpus import Tokens
from qk_sniffer.errors import CaptureError
from qk_sniffer.heads import Selection
from qk_sniffer.progress import Stages
from qk_sniffer.sampling import Sampler
from qk_sniffer.store.journal import JournalWriter, Rows

PIECE_BYTES = 64 * 2**20
"""The most that one gather takes; larger ones are cut by rows, so that memory stays bounded."""


@dataclass(frozen=True)
class BatchPlan:
    """A batch of B examples before its forward: padded token ids and the rows to take from it."""

    examples: Sequence[Tokens]
    ids: torch.Tensor
    """(B, n) int64, padded on the right with token 0, which no valid position can see."""
    rows: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]
    """By (layer, kind): the place in the batch and the position of each row, int32 (rows,) each."""

    @property
    def num_rows(self) -> int:
        """Rows of one head of each (layer, kind), summed."""
        return sum(len(positions) for _, positions in self.rows.values())


class Capture:
    """Takes the selected heads' vectors out of each batch's forward, to `writer`."""

    def __init__(
        self,
        backbone: Backbone,
        selection: Selection,
        sampler: Sampler,
        writer: JournalWriter,
        *,
        token_ids: bool,
        stages: Stages,
    ) -> None:
        self._backbone = backbone
        self._heads = {(layer, kind): heads for layer, kind, heads in selection}
        self._sampler = sampler
        self._writer = writer
        self._token_ids = token_ids
        self._stages = stages
        self._last_layer = max(layer for layer, _ in self._heads)

    def plan(self, examples: Sequence[Tokens]) -> BatchPlan:
        """The batch of `examples` with the rows that the sampler keeps; nothing runs yet."""
        lengths = [example.num_tokens for example in examples]
        ids = np.zeros((len(examples), max(lengths)), dtype=np.int64)
        for row, example in zip(ids, examples, strict=True):
            row[: example.num_tokens] = example.ids
        rows = self._sampler.plan([example.example_id for example in examples], lengths, list(self._heads))
        return BatchPlan(examples, torch.from_numpy(ids), rows)

    def run(self, plan: BatchPlan) -> None:
        """One forward, left once the last selected layer was seen; all its rows go to the writer.

        Raises:
            CaptureError: a selected layer did not call attention in this forward.
        """
        flat = [torch.from_numpy(array) for pair in plan.rows.values() for array in pair]
        indices = torch.cat(flat).to(self._backbone.device, torch.int64)
        pieces = iter(indices.split([len(array) for array in flat]))
        wanted = {key: (next(pieces), next(pieces)) for key in plan.rows}

        def take(call: AttentionCall) -> None:
            for kind, states in (("q", call.query), ("k", call.key)):
                if (where := wanted.pop((call.layer, kind), None)) is not None:
                    with self._stages("gather"):
                        self._take(plan, call.layer, kind, states, *where)
            if call.layer == self._last_layer:
                raise ForwardDone

        with self._stages("forward"):
            self._backbone.forward(plan.ids, take)
        if wanted:
            layers = sorted({layer for layer, _ in wanted})
            raise CaptureError(
                f"layers {layers} did not call attention in this forward, though they did in the first"
            )

    def _take(
        self,
        plan: BatchPlan,
        layer: int,
        kind: str,
        states: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        heads = torch.tensor(self._heads[layer, kind], device=states.device)[:, None]
        rows, positions = rows.to(states.device), positions.to(states.device)
        row_of, position_of = plan.rows[layer, kind]
        source_index = np.array([example.index for example in plan.examples])[row_of]
        bytes_per_row = len(heads) * states.shape[-1] * states.element_size()
        step = max(1, PIECE_BYTES // bytes_per_row)
        for start in range(0, len(row_of), step):
            piece = slice(start, start + step)
            vectors = states[rows[None, piece], heads, positions[None, piece]]
            with self._stages("transfer"):
                vectors = vectors.cpu()
            token_id = (
                plan.ids.numpy()[row_of[piece], position_of[piece]].astype(np.int32)
                if self._token_ids
                else None
            )
            with self._stages("queue"):
                self._writer.put(
                    Rows(layer, kind, vectors, source_index[piece], position_of[piece], token_id)
                )
