"""Captures the chosen rows of each batch: gathers them from the attention calls into the journal's memory.

The rows are chosen before the forward pass: the indices of the sampled tokens of every (layer, kind) go to the device
in one tensor. In the forward pass, each (layer, kind) costs one gather over the whole batch, into memory that the
journal's writer reserves (`row_writer.py`). The forward pass blocks only when the buffer is full.

The forward pass over the longest text so far also checks the attention kernels (`backbone/attention_check.py`). With
`capture.attention`, the attention of the sampled queries is summarized (`attention_summary.py`), and its records are
rows next to those of the queries. With `capture.statistics`, each forward pass also adds all its tokens to the
statistics of the heads (`moments.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.backbone.attention_check import AttentionCheck
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.tap import AttentionCall, ForwardDone, KernelRun
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.gather import TokenIndices, send
from qk_sniffer.capture.moments import Moments, Spans, states_by_stage
from qk_sniffer.capture.row_counts import picks_of
from qk_sniffer.capture.row_writer import BatchRows, RowWriter, other_states_by_kind, states_by_kind
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import Selection
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.errors import CaptureError
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import KIND_NAMES, KINDS, OFFSET_COLUMNS
from qk_sniffer.store.rows import NO_CHARACTER
from qk_sniffer.store.segment import Tensor
from qk_sniffer.store.statistics import part_tensors
from qk_sniffer.text import compact_ranges
from qk_sniffer.timing import Stages


@dataclass(frozen=True)
class BatchPlan:
    """A batch of B examples before its forward pass: padded token ids and the tokens to capture."""

    examples: Sequence[Tokens]
    ids: torch.Tensor
    """(B, n) int64, padded on the right with token 0, which no valid position can see."""
    tokens: dict[tuple[int, str], TokenIndices]
    """The tokens to capture, by (layer, kind); one object where several capture the same."""
    ends_group: bool
    """Whether this is the last batch of its group: the batches of a group become durable together."""
    columns: Mapping[str, npt.NDArray[np.integer[Any]]]
    """(B, n) each: the columns of the journal that tokens have, by name."""
    spans: Sequence[Spans]
    """The tokens of each example that statistics are of; empty without statistics."""


class Capture:
    """Writes the selected heads' vectors of each batch to `writer`."""

    def __init__(
        self,
        backbone: Backbone,
        selection: Selection,
        sampler: Sampler,
        writer: JournalWriter | None,
        *,
        columns: Sequence[str],
        stages: Stages,
        attention: AttentionCheck | None = None,
        moments: Moments | None = None,
        summary: Summarizer | None = None,
    ) -> None:
        """`columns` are the `TOKEN_COLUMNS` of the rows of vectors.

        `attention` checks the kernels, `moments` takes statistics of all tokens, and `summary` summarizes the
        attention of the queries; None for neither.

        Without `writer`, no row is written: `sampler` keeps none, there is no `attention`, and no batch is finished.
        """
        self._backbone = backbone
        self._heads = {(layer, kind): heads for layer, kind, heads in selection}
        self._rows = None if writer is None else RowWriter(selection, writer, stages)
        self._sampler = sampler
        self._writer = writer
        self._columns = columns
        self._stages = stages
        self._attention = attention
        self._moments = moments
        self._summary = summary

    def plan(self, examples: Sequence[Tokens], *, ends_group: bool = True) -> BatchPlan:
        """Returns the batch of `examples` with the tokens that the sampler keeps. Runs no forward pass."""
        lengths = [example.num_tokens for example in examples]
        ids = np.zeros((len(examples), max(lengths)), dtype=np.int64)
        for row, example in zip(ids, examples, strict=True):
            row[: example.num_tokens] = example.ids
        in_segments = self._in_segments(examples)
        picks = picks_of(self._sampler, examples, list(self._heads), in_segments)
        distinct = {id(each): each for each in picks.values()}
        tokens = {key: TokenIndices.of(each, self._backbone.device) for key, each in distinct.items()}
        planned = {key: tokens[id(each)] for key, each in picks.items()}
        columns = {name: ids if name == "token_id" else _offsets(examples, name) for name in self._columns}
        spans = [] if self._moments is None else self._moments.spans(lengths, in_segments)
        return BatchPlan(examples, torch.from_numpy(ids), planned, ends_group, columns, spans)

    def _in_segments(self, examples: Sequence[Tokens]) -> list[npt.NDArray[np.bool_]] | None:
        """Returns which tokens of each example are in `sampler.segments`; None without that setting."""
        names = self._sampler.config.segments
        return None if names is None else [example.are_in(names) for example in examples]

    def num_rows(self, plan: BatchPlan) -> int:
        """Returns the number of rows that the batch adds to the dataset, over all heads."""
        return sum(len(self._heads[key]) * len(tokens) for key, tokens in plan.tokens.items())

    def run(self, plan: BatchPlan) -> None:
        """Runs one forward pass, up to the last selected layer, and writes all rows of the batch.

        `finish` ends the batch.

        Raises:
            CaptureError: a selected layer did not call attention in this forward pass.
        """
        wanted = send(plan.tokens, self._backbone.device)
        index, part = (np.array([getattr(example, name) for example in plan.examples]) for name in ("index", "part"))
        rows = BatchRows(index, part, plan.columns)
        check = None if self._attention is None else self._attention.of(plan.examples[0].num_tokens)

        def write(layer: int, states_of: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
            for kind, states in states_of.items():
                if (tokens := wanted.pop((layer, kind), None)) is not None:
                    if self._rows is not None:
                        self._rows.write(rows, layer, kind, states, tokens)
                    if self._moments is not None:
                        with self._stages("statistics"):
                            stages = states_by_stage(self._stage, kind, states, others.get(kind))
                            self._moments.add_stages(layer, kind, stages, plan.spans)

        def end_if_done() -> None:
            if not wanted and (check is None or not check.waits):
                raise ForwardDone

        def capture(call: AttentionCall) -> None:
            queries = wanted.get((call.layer, "q"))
            write(call.layer, states_by_kind(call), other_states_by_kind(call))
            if queries is not None and self._summary is not None and self._rows is not None:
                self._rows.write_summary(rows, call, queries, self._summary)
            end_if_done()

        def capture_output(call: AttentionCall, output: torch.Tensor | None) -> None:
            write(call.layer, {} if output is None else {"o": output}, {})
            end_if_done()

        def see(run: KernelRun) -> None:
            assert check is not None
            with self._stages("check attention"):
                check.see(run)
            end_if_done()

        with self._stages("forward"):
            self._backbone.forward(
                plan.ids,
                capture,
                None if check is None else see,
                capture_output if any(kind == "o" for _, kind in self._heads) else None,
                both_stages=self._both_stages,
            )
        if check is not None:
            assert self._writer is not None
            self._writer.add_checks(check.finish())
        if wanted:
            layers = compact_ranges({layer for layer, _ in wanted})
            raise CaptureError(
                f"layers {layers} did not call attention in this forward pass as they did in the first: it showed no "
                f"{' and no '.join(KIND_NAMES[kind] for kind in KINDS if any(kind == each for _, each in wanted))}"
            )

    def finish(self, plan: BatchPlan) -> None:
        """Ends the batch, and with it its group if it is the last one: then its statistics become durable too."""
        assert self._writer is not None
        statistics: list[Tensor] = []
        if self._moments is not None and plan.ends_group:
            with self._stages("statistics"):
                statistics = part_tensors(self._moments.take())
        records = [example.record() for example in plan.examples]
        self._writer.complete(records, ends_group=plan.ends_group, statistics=statistics)

    @property
    def _both_stages(self) -> bool:
        return self._moments is not None and {*self._moments.config.stages} != {self._stage}

    @property
    def _stage(self) -> str:
        return "pre" if self._backbone.pre_rope else "post"


def _offsets(examples: Sequence[Tokens], name: str) -> npt.NDArray[np.int32]:
    """Returns the first character of each token, or the one after its last, (B, n); `name` is that of the column."""
    found = np.full((len(examples), max(example.num_tokens for example in examples)), NO_CHARACTER, np.int32)
    for row, example in zip(found, examples, strict=True):
        assert example.offsets is not None, "an example without the characters of its tokens"
        row[: example.num_tokens] = example.offsets[:, OFFSET_COLUMNS.index(name)]
    return found
