"""Reads the rows of a capture from memory, by the methods of a dataset."""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.dataset.frames import column_of, pandas_frame, polars_frame
from qk_sniffer.dataset.head_vectors import HeadVectors
from qk_sniffer.dataset.recomputed_attention import Attention, Logits, attention_of, logits_of, unknown_logits
from qk_sniffer.errors import CaptureError, StoreError
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.memory import FinishedRows, MemoryStore, StoredRows
from qk_sniffer.notebook.statistics import PassStatistics
from qk_sniffer.notebook.tokens import Example
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import ATTENTION, KIND_NAMES, WIDTHS, HeadKey, examples_schema, schema
from qk_sniffer.store.row_filter import RowFilter, RowValues
from qk_sniffer.store.statistics import Part, PartKey, Statistics, paired, stages_of
from qk_sniffer.text import compact_ranges, counted, shortened

if TYPE_CHECKING:
    import pandas
    import polars


class MemoryReader:
    """The captured heads and their rows. A read shows the passes that have ended until it begins, each whole."""

    def __init__(
        self,
        facts: CaptureFacts,
        store: MemoryStore,
        examples: Sequence[Example],
        statistics: PassStatistics | None,
    ) -> None:
        self._facts = facts
        self._store = store
        self._all_examples = examples
        self._finished, self._num_examples = store.finished, 0
        self._statistics = statistics
        self._sampler = Sampler(facts.config.sampler)
        self._attention = AttentionTable.of(facts.config)
        self._heads = {(layer, kind): list(heads) for layer, kind, heads in facts.selection}
        self._layers = {layer.heads.layer: layer for layer in facts.layers}
        self.heads = [HeadKey(layer, head, kind) for (layer, kind), heads in self._heads.items() for head in heads]

    def now(self) -> "MemoryReader":
        """Returns a reader of the passes that have ended until now. Passes may end while it reads.

        Raises:
            CaptureError: the capture was interrupted in a change.
        """
        reader = copy(self)
        with self._store.changes.between():
            reader._finished, reader._num_examples = self._store.finished, len(self._all_examples)
        return reader

    def whole(self) -> tuple[FinishedRows, list[ExampleRecord], dict[PartKey, Part] | None]:
        """Returns the rows, the records of all examples that have a token, and any statistics, of one moment.

        Examples that a later pass can continue are among them.

        Raises:
            CaptureError: the capture was interrupted in a change.
        """
        with self._store.changes.between():
            parts = None if self._statistics is None else self._statistics.parts()
            finished, examples = self._store.finished, [example.copy() for example in self._all_examples]
        return finished, [example.record() for example in examples if example.stop], parts

    @property
    def examples(self) -> pa.Table:
        """See `Captured.examples`."""
        described = examples_schema(from_python=True)
        with self._store.changes.between():
            examples = [example.copy() for example in self._all_examples]
        records = [example.record() for example in examples]
        columns = {name: [getattr(record, name) for record in records] for name in described.names}
        return pa.Table.from_pydict(columns, schema=described)

    def key_head(self, layer: int, head: int) -> int:
        """See `Captured.key_head`."""
        of_layer = self._layers.get(layer)
        if of_layer is None:
            raise CaptureError(f"the model has no layer {layer}; it has layers {compact_ranges(self._layers)}")
        if not 0 <= head < of_layer.heads.num_q_heads:
            raise CaptureError(
                f"layer {layer} has no query head {head}; it has heads 0-{of_layer.heads.num_q_heads - 1}"
            )
        return of_layer.heads.key_head(head)

    def tensor(self, layer: int, kind: str) -> torch.Tensor:
        """See `Captured.tensor`."""
        if (layer, kind) not in self._heads:
            raise self._not_captured(HeadKey(layer, 0, kind))
        return self._rows(layer, kind).vectors.transpose(0, 1)

    def vectors(self, layer: int, head: int, kind: str, **rows: Unpack[RowValues]) -> HeadVectors:
        """See `Captured.vectors`."""
        found, kept = self._chosen(HeadKey(layer, head, kind), rows)
        vectors = self._of_head(found, layer, head, kind, kept)
        return HeadVectors(vectors, found.position[kept], found.example[kept])

    def table(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> pa.Table:
        """See `Captured.table`."""
        found, kept = self._chosen(HeadKey(layer, head, kind), rows)
        described = schema(found.vectors.shape[-1], self._facts.config.capture)
        if unknown := {*(columns or ())} - {*described.names}:
            raise CaptureError(
                f"there is no column {', '.join(sorted(unknown))}; a head has {', '.join(described.names)}"
            )
        vectors = self._of_head(found, layer, head, kind, kept)
        window = self._layers[layer].heads.sliding_window
        values = {
            "bucket": self._sampler.bucket(kind, found.position[kept]),
            "example_id": found.example[kept],
            "position": found.position[kept],
            "vector": column_of(vectors),
            "sliding_window": pa.nulls(len(vectors), pa.int32())
            if window is None
            else np.full(len(vectors), window, np.int32),
        }
        table = pa.Table.from_arrays([pa.array(values[name]) for name in described.names], schema=described)
        return table if columns is None else table.select([*columns])

    def to_pandas(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> "pandas.DataFrame":
        """See `Captured.to_pandas`."""
        return pandas_frame(self.table(layer, head, kind, columns, **rows))

    def to_polars(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> "polars.DataFrame":
        """See `Captured.to_polars`."""
        return polars_frame(self.table(layer, head, kind, columns, **rows))

    def attention_summary(self, layer: int, head: int, **rows: Unpack[RowValues]) -> AttentionSummary:
        """See `Captured.attention_summary`."""
        if self._attention is None:
            raise CaptureError("there are no attention summaries: capture with attention=True")
        key = HeadKey(layer, head, "q")
        self._check(key)
        found = self._rows(layer, ATTENTION, self._attention.width, "q")
        kept = self._filter(key, found, rows)
        records = self._of_head(found, layer, head, "q", kept)
        keys = {
            "bucket": self._sampler.bucket("q", found.position[kept]),
            "example_id": found.example[kept],
            "position": found.position[kept],
        }
        columns = {**keys, **self._attention.columns(records)}
        described = self._attention.schema
        return AttentionSummary.of(
            pa.Table.from_arrays([pa.array(columns[name]) for name in described.names], schema=described)
        )

    def logits(self, layer: int, head: int, example_id: int) -> Logits:
        """See `Captured.logits`."""
        key_head, described = self.key_head(layer, head), self._layers[layer].to_dict()
        if (reason := unknown_logits(described, pre_rope=self._facts.config.capture.capture_pre_rope)) is not None:
            raise CaptureError(f"the logits of layer {layer} cannot be computed: {reason}")
        if without := [KIND_NAMES[kind] for kind in "qk" if self._sampler.keeps_none(kind)]:
            raise CaptureError(
                f"no rows of kind {' and '.join(without)} are captured, as the sampler is 'none': capture with another "
                "one, such as sampler='all'"
            )
        if not 0 <= example_id < self._num_examples:
            seen = counted(self._num_examples, "example")
            raise CaptureError(f"there is no example {example_id}: {seen} captured so far, from 0 on (`.examples`)")
        if (first := self._all_examples[example_id].first) > 0:
            raise CaptureError(
                f"the logits of example {example_id} cannot be computed: the capture began at its position {first}"
            )
        queries = self.vectors(layer, head, "q", example_id=example_id)
        keys = self.vectors(layer, key_head, "k", example_id=example_id)
        return logits_of(described, head, queries[:2], keys[:2])

    def attention(self, layer: int, head: int, example_id: int) -> Attention:
        """See `Captured.attention`."""
        found = self.logits(layer, head, example_id)
        summary = None if self._attention is None else self.attention_summary(layer, head, example_id=example_id)
        try:
            return attention_of(found, summary)
        except StoreError as error:
            raise CaptureError(
                f"the attention of layer {layer}, head {head} in example {example_id} is not known: not all keys are "
                "captured that its queries see. Capture all (sampler='all'), or summaries (attention=True)"
            ) from error

    def statistics(self, layer: int, kind: str, stage: str | None = None) -> Statistics:
        """See `Captured.statistics`."""
        settings = self._facts.config.capture.statistics
        if self._statistics is None:
            raise CaptureError("there are no statistics: capture with statistics=True")
        of_kind = stages_of(kind, settings.stages)
        if stage is None and len(of_kind) > 1:
            raise CaptureError(f"there are statistics of the stages {', '.join(of_kind)}: name one")
        key = PartKey(layer, kind, (of_kind or settings.stages)[0] if stage is None else stage)
        if (layer, kind) not in self._heads or key.stage not in of_kind:
            raise CaptureError(
                f"there are no statistics of layer {layer}, kind {kind!r}, stage {key.stage!r}; there are those of "
                f"layers {compact_ranges(sorted({each.layer for each in self.heads}))}, kinds "
                f"{', '.join(sorted({each.kind for each in self.heads}))}, stages {', '.join(settings.stages)}"
            )
        part = self._statistics.part(key)
        if part is None:
            raise CaptureError(f"there are no statistics of layer {layer} yet: no forward pass has ended")
        pairs = paired(self._layers[layer].rotation, part.modulus.shape[1])
        return Statistics.of(self._heads[layer, kind], part, pairs)

    def _chosen(self, key: HeadKey, rows: RowValues) -> tuple[StoredRows, npt.NDArray[np.intp] | slice]:
        """Returns the rows of the layer and kind of a head, and which of them have the values in `rows`."""
        self._check(key)
        found = self._rows(key.layer, key.kind)
        return found, self._filter(key, found, rows)

    def _rows(self, layer: int, kind: str, width: int | None = None, of: str | None = None) -> StoredRows:
        """Returns the rows of a layer and kind; none if no pass has ended. `width` and `of` are those of summaries."""
        if (found := self._finished.rows(layer, kind)) is not None:
            return found
        size = width or self._layers[layer].to_dict()[WIDTHS[kind]]
        dtype = self._facts.backbone.dtype if width is None else torch.float32
        empty = torch.empty(len(self._heads[layer, of or kind]), 0, size, dtype=dtype)
        return StoredRows(empty, np.empty(0, np.int32), np.empty(0, np.int32))

    def _filter(self, key: HeadKey, found: StoredRows, rows: RowValues) -> npt.NDArray[np.intp] | slice:
        only = RowFilter.of(rows)
        if "segment" in only.wanted:
            raise CaptureError("a capture in Python has no segments; choose rows by bucket, example_id and position")
        if not only.wanted:
            return slice(None)
        columns = {"example_id": found.example, "position": found.position}
        if "bucket" in only.wanted:
            columns["bucket"] = self._sampler.bucket(key.kind, found.position)
        return np.flatnonzero(only.mask(pa.table(columns)))

    def _of_head(
        self, found: StoredRows, layer: int, head: int, kind: str, kept: npt.NDArray[np.intp] | slice
    ) -> npt.NDArray[np.float32]:
        """Returns the numbers of a head in float32; a copy."""
        with torch.inference_mode(mode=False):
            of_head = found.vectors[self._heads[layer, kind].index(head)]
            some = of_head if isinstance(kept, slice) else of_head[torch.from_numpy(kept)]
            numbers: npt.NDArray[np.float32] = some.to(torch.float32, copy=True).numpy()
        return numbers

    def _check(self, key: HeadKey) -> None:
        if key not in self.heads:
            raise self._not_captured(key)

    def _not_captured(self, key: HeadKey) -> CaptureError:
        names = [each.name for each in self.heads]
        return CaptureError(
            f"layer {key.layer}, head {key.head}, kind {key.kind!r} was not captured; there are {shortened(names, 6)} "
            "(`.heads`)"
        )
