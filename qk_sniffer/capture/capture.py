"""Capture: the planned positions of a batch are gathered from each attention call and handed to the journal.

What is gathered is decided before the forward: the sampler's positions of every (layer, kind) are sent to the
device in one tensor. In the forward each (layer, kind) costs one gather over the whole batch, straight into the
memory that the journal writes from, cut into pieces only where it would outgrow the journal's queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.tap import AttentionCall, ForwardDone
from qk_sniffer.capture.gather import DeviceCopiers, DeviceIndices, Heads, PendingGather, TokenIndices, send
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import Selection
from qk_sniffer.corpus.tokenizer import Tokens
from qk_sniffer.errors import CaptureError
from qk_sniffer.store.journal import JournalWriter, Rows
from qk_sniffer.timing import Stages

PIECE_BYTES = 64 * 2**20
"""The most that one gather takes; larger ones are cut by rows, so that memory stays bounded."""


@dataclass(frozen=True)
class BatchPlan:
    """A batch of B examples before its forward: padded token ids and the rows to take from it."""

    examples: Sequence[Tokens]
    ids: torch.Tensor
    """(B, n) int64, padded on the right with token 0, which no valid position can see."""
    places: dict[tuple[int, str], TokenIndices]
    """The rows to take, by (layer, kind); one object where several take the same."""


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
        self._heads = {(layer, kind): Heads(heads) for layer, kind, heads in selection}
        self._lanes = DeviceCopiers()
        self._sampler = sampler
        self._writer = writer
        self._token_ids = token_ids
        self._stages = stages

    def plan(self, examples: Sequence[Tokens]) -> BatchPlan:
        """The batch of `examples` with the rows that the sampler keeps; nothing runs yet."""
        lengths = [example.num_tokens for example in examples]
        ids = np.zeros((len(examples), max(lengths)), dtype=np.int64)
        for row, example in zip(ids, examples, strict=True):
            row[: example.num_tokens] = example.ids
        picks = self._sampler.plan([example.example_id for example in examples], lengths, list(self._heads))
        distinct = {id(each): each for each in picks.values()}
        places = {key: TokenIndices.of(each, self._backbone.device) for key, each in distinct.items()}
        return BatchPlan(examples, torch.from_numpy(ids), {key: places[id(each)] for key, each in picks.items()})

    def num_rows(self, plan: BatchPlan) -> int:
        """Rows that the batch adds to the dataset, over all heads."""
        return sum(len(self._heads[key].numbers) * len(places) for key, places in plan.places.items())

    def run(self, plan: BatchPlan) -> None:
        """One forward, left once the last selected layer was seen; all its rows go to the writer.

        Raises:
            CaptureError: a selected layer did not call attention in this forward.
        """
        wanted = send(plan.places, self._backbone.device)

        def take(call: AttentionCall) -> None:
            for kind, states in (("q", call.query), ("k", call.key)):
                if (where := wanted.pop((call.layer, kind), None)) is not None:
                    self._take(plan, call.layer, kind, states, where)
            if not wanted:
                raise ForwardDone

        with self._stages("forward"):
            self._backbone.forward(plan.ids, take)
        if wanted:
            layers = sorted({layer for layer, _ in wanted})
            raise CaptureError(f"layers {layers} did not call attention in this forward, though they did in the first")

    def _take(self, plan: BatchPlan, layer: int, kind: str, states: torch.Tensor, sent: DeviceIndices) -> None:
        places, heads = sent.places, self._heads[layer, kind]
        row_bytes = len(heads.numbers) * states.shape[-1] * states.element_size()
        source_index = np.array([example.index for example in plan.examples])[places.row]
        step = max(1, min(PIECE_BYTES, self._writer.piece_bytes) // row_bytes)
        for start in range(0, len(places), step):
            stop = min(start + step, len(places))
            piece = slice(start, stop)
            token_id = None
            if self._token_ids:
                token_id = plan.ids.numpy()[places.row[piece], places.position[piece]]
            vectors = PendingGather(states, heads, sent, start, stop, self._lanes)
            waited_s = self._writer.wait_s
            with self._stages("gather"):
                self._writer.put(Rows(layer, kind, vectors, source_index[piece], places.position[piece], token_id))
            self._stages.move(self._writer.wait_s - waited_s, "gather", "queue")
