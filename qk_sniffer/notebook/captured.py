"""Captures the forward passes that the user runs on a model in memory.

with qk_sniffer.capture(model) as captured:
    model.generate(**tokenizer("Attention is", return_tensors="pt"))
queries, positions, example_ids = captured.vectors(0, 0, "q")
"""

import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import pyarrow as pa
import torch
from torch import nn

from qk_sniffer.backbone.family import Family
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.moments import Moments, rotary_pairs
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import AttentionConfig, SamplerConfig, StatisticsConfig
from qk_sniffer.dataset.array_facts import further_facts, head_facts
from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.dataset.head_vectors import HeadVectors
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.dataset.recomputed_attention import Attention, Logits
from qk_sniffer.errors import CaptureError, ConfigError
from qk_sniffer.logs import logger
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.memory import MemoryStore
from qk_sniffer.notebook.passes import PassRecorder
from qk_sniffer.notebook.reader import MemoryReader
from qk_sniffer.notebook.save import save
from qk_sniffer.notebook.settings import config_of, facts_of, folder_of, naming_arguments
from qk_sniffer.notebook.statistics import PassStatistics
from qk_sniffer.notebook.stream import FolderStream
from qk_sniffer.notebook.tokens import Examples
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.layout import HeadKey
from qk_sniffer.store.row_filter import RowValues
from qk_sniffer.store.statistics import Statistics
from qk_sniffer.text import counted, in_mb, printable

if TYPE_CHECKING:
    import pandas
    import polars

log = logger(__name__)

MAX_ROWS = 10_000_000
"""The default of `max_rows`: 2.6 GB of vectors of 128 numbers in 16 bits."""


def capture(
    model: nn.Module,
    *,
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | int | None = None,
    kinds: Iterable[str] = "qk",
    sampler: str | SamplerConfig = "all",
    pre_rope: bool = False,
    attention: bool | AttentionConfig = False,
    statistics: bool | StatisticsConfig = False,
    family: str | Family | None = None,
    max_rows: int | None = MAX_ROWS,
    to: str | Path | None = None,
) -> "Captured":
    """Returns a context that captures all forward passes of `model` inside it, in the thread that enters it.

    The passes give the same results as without it, bit for bit. Compiled models run uncompiled inside the context.

    All captured passes are of one state of the model. A pass raises an error if the adapters in effect, the weights,
    the buffers, the numbers and settings that modules compute with, the numbers of the config, the modules or their
    training mode, the hooks, the functions in the place of a module's own, autocast, or what the manifest tells of the
    model have changed since the first one. What a hook does is not compared.

    Each row of a batch is an example, numbered from 0 in order of appearance. A pass that continues a key-value cache,
    as in generation, adds its tokens to the examples of the cache; without a cache, every pass is of new examples. The
    rows that generation has stopped are not captured any more. Positions are those of `position_ids` if the pass has
    them; otherwise they count the tokens of the attention mask, and without a mask they go on from the length of the
    cache. Padding is not captured.

    Args:
        model: a model of transformers that is or has a decoder, or a module that wraps one, as of peft.
        layers: the layers to capture; None for all.
        heads: the query heads to capture in each layer, with the key heads that they attend with; None for all.
        kinds: the kinds of vectors: any of "q" (queries), "k" (keys), "v" (values) and "o" (outputs of attention).
        sampler: the tokens to keep: "all", "uniform", "log_uniform", "none", or the settings of a sampler. Examples are
            sampled by their number, as in jobs.
        pre_rope: captures queries and keys before the rotary embedding instead of after it.
        attention: summarizes the attention of each captured query over all its keys; True for the default settings.
        statistics: makes statistics of the captured heads over all tokens, sampled or not; True for the default
            settings, which measure after the rotary embedding also with `pre_rope`.
        family: the family of the model, if it needs one of its own: an object, or its class as "package.module:Class".
        max_rows: the most rows to keep in memory, over all heads and kinds; None for no limit but the memory itself. A
            pass that would exceed them raises an error before it runs. Without effect with `to`.
        to: a new folder, to which the rows are written instead of into memory. It is a dataset after the block.

    Raises:
        ConfigError: a setting is wrong, or names a layer or head that the model does not have.
        CaptureError: the model cannot be captured.
    """
    if max_rows is not None and (not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 0):
        raise ConfigError([f"max_rows is {max_rows!r}; give a number of rows, or None for no limit"])
    folder = None if to is None else folder_of("to", to)
    with naming_arguments():
        config = config_of(
            layers=layers,
            heads=heads,
            kinds=kinds,
            sampler=sampler,
            pre_rope=pre_rope,
            attention=attention,
            statistics=statistics,
        )
        facts = facts_of(model, config, family)
    return Captured(facts, max_rows=max_rows, to=folder)


_entering = threading.Lock()

_open: list["Captured"] = []
"""The captures that are open, in the order of their blocks. Each takes over what transformers calls from the one before
it, and gives it back."""


class Captured:
    """The rows of a capture: a context that captures inside and stays readable afterwards. `capture` makes one.

    The methods that return rows of a head take values of bucket, example_id and position, and return the rows that have
    them: `captured.vectors(0, 0, "k", example_id=0, position=range(64))`. All arrays of numpy are writable copies.
    """

    def __init__(self, facts: CaptureFacts, *, max_rows: int | None, to: Path | None) -> None:
        self._facts = facts
        self._max_rows = max_rows
        self._examples = Examples()
        self._statistics = PassStatistics(lambda: _moments(facts)) if facts.config.capture.statistics.enabled else None
        parts = None if self._statistics is None else self._statistics.parts
        self._store = MemoryStore(piece_bytes=1 << 62)
        self._stream = None if to is None else FolderStream(facts, to, parts)
        self._in_memory = MemoryReader(facts, self._store, self._examples.all, self._statistics)
        self._stack: ExitStack | None = None
        self._was_entered = False
        self._thread = 0
        self.heads: list[HeadKey] = self._in_memory.heads
        """The captured heads as (layer, head, kind), by layer: first the queries ("q"), then keys ("k"), values ("v")
        and outputs ("o")."""

    def __enter__(self) -> Self:
        if self._was_entered:
            raise CaptureError("a capture is entered once: call qk_sniffer.capture again for another one")
        facts = self._facts
        facts.backbone.check_unchanged()
        with _entering, ExitStack() as stack:
            self._thread = threading.get_ident()
            if any(other._thread != self._thread for other in _open):
                raise CaptureError("a capture is open in another thread: captures of several threads cannot overlap")
            self._was_entered = True
            _open.append(self)
            stack.callback(self._left)
            if self._stream is not None:
                stack.enter_context(self._stream)
            recorder = PassRecorder(
                facts,
                Sampler(facts.config.sampler),
                self._sink,
                self._examples,
                statistics=self._statistics,
                summarizer=_summarizer(facts),
                room=self._room if self._stream is None else None,
            )
            stack.enter_context(recorder.opened())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stack is not None
        if _open[-1] is not self:
            raise CaptureError("a capture that was opened inside of this one is still open: leave that one first")
        self._stack.__exit__(kind, error, trace)
        if error is None and not self._examples.all:
            log.warning(
                "no forward pass was captured: the model's decoder did not run in the block, in the thread of the block"
            )

    def _left(self) -> None:
        self._stack = None
        _open.remove(self)

    @property
    def _sink(self) -> MemoryStore | FolderStream:
        return self._store if self._stream is None else self._stream

    @property
    def _reader(self) -> MemoryReader | Dataset:
        if self._stream is None:
            return self._in_memory.now()
        if self._stack is not None or not self._was_entered:
            raise CaptureError(f"the rows are being written to {self._stream.folder}: read them after the with block")
        return self._stream.dataset()

    @property
    def examples(self) -> pa.Table:
        """The examples so far: example_id, source_id, num_tokens, text_hash, index, truncated.

        `text_hash` is the hash of the token ids; it is empty for an example of which some came before the capture, or
        as embeddings.
        """
        return self._reader.examples

    def key_head(self, layer: int, head: int) -> int:
        """Returns the number of the key head that query head `head` of a layer attends with, captured or not.

        Raises:
            CaptureError: the model has no such layer or head.
        """
        return self._reader.key_head(layer, head)

    def tensor(self, layer: int, kind: str) -> torch.Tensor:
        """Returns the vectors of all captured heads of a layer, (rows, heads, d), in the dtype of the model.

        The heads are in the order of `heads`, and the rows are those of `vectors`. The tensor is on the host, a view of
        the captured memory.

        Raises:
            CaptureError: the kind of this layer was not captured, or the capture has written its rows to a folder.
        """
        if self._stream is not None:
            raise CaptureError(f"the rows are in {self._stream.folder}, in float32: read them with vectors()")
        return self._in_memory.now().tensor(layer, kind)

    def vectors(self, layer: int, head: int, kind: str, **rows: Unpack[RowValues]) -> HeadVectors:
        """Returns the rows of a head, or those with the values in `rows`, by example and then by position.

        `head` is the number of a query head for the kinds "q" and "o", of a key head for "k" and "v". Where both were
        captured, the rows of an output are those of its query, and the rows of a value those of its key.

        Raises:
            CaptureError: the head was not captured.
            StoreError: a value in `rows` is of another type.
        """
        return self._reader.vectors(layer, head, kind, **rows)

    def table(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> pa.Table:
        """Returns the rows of a head, or those with the values in `rows`, with all columns or the named ones.

        The columns are those of a dataset: bucket, example_id, position, vector, sliding_window.

        Raises:
            CaptureError: the head was not captured, or there is no such column.
            StoreError: a value in `rows` is of another type.
        """
        return self._reader.table(layer, head, kind, columns, **rows)

    def to_pandas(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> "pandas.DataFrame":
        """Returns what `table` returns as a data frame of pandas. A vector is an array in its cell.

        Raises:
            QkSnifferError: pandas is not installed, or a reason of `table`.
        """
        return self._reader.to_pandas(layer, head, kind, columns, **rows)

    def to_polars(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> "polars.DataFrame":
        """Returns what `table` returns as a data frame of polars. A vector is of the type Array.

        Raises:
            QkSnifferError: polars is not installed, or a reason of `table`.
        """
        return self._reader.to_polars(layer, head, kind, columns, **rows)

    def attention_summary(self, layer: int, head: int, **rows: Unpack[RowValues]) -> AttentionSummary:
        """Returns the attention of the captured queries of a query head, row for row as `vectors(layer, head, "q")`.

        Raises:
            CaptureError: the capture has no `attention`, or no queries of this head.
        """
        return self._reader.attention_summary(layer, head, **rows)

    def logits(self, layer: int, head: int, example_id: int = 0) -> Logits:
        """Returns the logits of the captured queries of a query head for the captured keys of its key head.

        Raises:
            CaptureError: there is no such example, query or key; or the logits do not follow from them: they are from
                before RoPE, or the layer has a bias or sparse attention.
        """
        return self._reader.logits(layer, head, example_id)

    def attention(self, layer: int, head: int, example_id: int = 0) -> Attention:
        """Returns the attention weights of the captured queries of a query head for the captured keys, (P, J).

        If all keys are captured that the queries see, the weights follow from the logits. Otherwise the sum of the
        softmax is that of the attention summaries.

        Raises:
            CaptureError: a reason of `logits`, or some keys were not captured and the capture has no `attention`.
        """
        return self._reader.attention(layer, head, example_id)

    def statistics(self, layer: int, kind: str, stage: str | None = None) -> Statistics:
        """Returns the statistics of the captured heads of a layer over all tokens so far, for a kind of vectors.

        `stage` is "pre" or "post": before or after RoPE. None is the stage of the capture's statistics of the kind, if
        they have one alone. Values and outputs ("v" and "o") are not rotated, and have the stage "post" alone.

        Raises:
            CaptureError: the capture has no such statistics, or no pass has ended yet.
        """
        return self._reader.statistics(layer, kind, stage)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the rows of all passes that have ended to a folder, as a dataset for `qk_sniffer.open_dataset`.

        Its manifest says that it comes from Python, and it names no texts and no tokenizer.

        Args:
            folder: a new or empty folder.
            overwrite: whether the dataset replaces one that is in the folder. Other files are never replaced.

        Raises:
            ConfigError: `folder` is no path.
            CaptureError: no pass has ended, or the capture has written its rows to a folder itself.
            StoreError: the folder has a dataset or other files, or the disk is full or fails.
        """
        if self._stream is not None:
            raise CaptureError(f"the rows are in {self._stream.folder} already")
        path = folder_of("folder", folder)
        finished, records, parts = self._in_memory.whole()
        save(self._facts, finished, records, path, statistics=parts, overwrite=overwrite)

    def __repr__(self) -> str:
        made = self._facts.config.capture
        facts = [
            head_facts(self.heads),
            f"{counted(self._store.num_rows, 'row')} of {counted(len(self._examples.all), 'example')}",
            in_mb(self._store.nbytes),
        ]
        if self._stream is not None:
            facts[1:] = [counted(len(self._examples.all), "example"), f"to {printable(self._stream.folder)}"]
        stages = made.statistics.stages if made.statistics.enabled else []
        facts += further_facts(summaries=made.attention.enabled, stages=stages)
        return f"<Captured {type(self._facts.backbone.model).__name__}: {', '.join(facts)}>"

    def _room(self, rows: int) -> str | None:
        """Returns why a pass must not add `rows` rows; None if it may."""
        total = self._store.num_rows + rows
        if self._max_rows is None:
            return None
        return None if total <= self._max_rows else f"{total:,} in all, and max_rows is {self._max_rows:,}"


def _summarizer(facts: CaptureFacts) -> Summarizer | None:
    table = AttentionTable.of(facts.config)
    if table is None:
        return None
    heads = {layer: heads for layer, kind, heads in facts.selection if kind == "q"}
    return Summarizer(table, facts.config.capture.attention.sink_tokens, heads)


def _moments(facts: CaptureFacts) -> Moments:
    heads = {(layer, kind): heads for layer, kind, heads in facts.selection}
    pairs = {layer.heads.layer: rotary_pairs(layer, facts.backbone.frequencies) for layer in facts.layers}
    return Moments(facts.config.capture.statistics, heads, pairs)
