"""Captures batches into a journal with the classes of a job, on the CPU or on simulated CUDA devices."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qk_sniffer.backbone.attention_check import AttentionCheck
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.capture import Capture
from qk_sniffer.capture.moments import Moments, rotary_pairs
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import select
from qk_sniffer.config import AttentionConfig, CaptureConfig, Config, SamplerConfig, StatisticsConfig
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import ATTENTION
from qk_sniffer.store.segment import ITEM_SIZES, read_header
from qk_sniffer.timing import Stages
from support.zoo import VOCAB

BATCHES = [[60, 50], [64], [30, 20]]
"""The lengths of the texts of each batch."""

_NUMPY = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}

_SUMMARIES = {f"l{layer:02d}{ATTENTION}.vectors" for layer in range(3)}
"""Records, whose integers are NaN as floats where there is no key."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class CudaJob:
    """The settings of a capture, whose buffers are so small that each is used many times."""

    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(type="all"))
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    pre_rope: bool = False
    banded: bool = True
    batches: Sequence[Sequence[int]] = tuple(map(tuple, BATCHES))
    queue_bytes: int = 1 << 16
    segment_bytes: int = 1 << 14

    def run(self, decoder: nn.Module, folder: Path, waits: list[Any] | None = None) -> Arrays:
        """Returns all numbers of the journal by tensor. `waits` is cleared before the first forward pass of the job."""
        backbone = Backbone(
            decoder,
            find_family(decoder.config.model_type),  # type: ignore[union-attr, arg-type]
            pre_rope=self.pre_rope,
            banded_attention=self.banded,
        )
        statistics = self.capture.statistics
        layers = backbone.probe(both_stages=statistics.enabled)
        selection = select([layer.heads for layer in layers], self.capture)
        moments = None
        if statistics.enabled:
            pairs = {layer.heads.layer: rotary_pairs(layer, backbone.frequencies) for layer in layers}
            moments = Moments(statistics, {(layer, kind): heads for layer, kind, heads in selection}, pairs)
        summary, table = None, AttentionTable.of(Config(capture=self.capture))
        if table is not None:
            queries = {layer: heads for layer, kind, heads in selection if kind == "q"}
            summary = Summarizer(table, self.capture.attention.sink_tokens, queries)
        journal = Journal(folder)
        with JournalWriter(
            journal,
            queue_bytes=self.queue_bytes,
            segment_bytes=self.segment_bytes,
            pinned=backbone.device.type == "cuda",
        ) as writer:
            capture = Capture(
                backbone,
                selection,
                Sampler(self.sampler),
                writer,
                columns=[],
                stages=Stages(),
                attention=AttentionCheck(layers, backbone.family, backbone.dtype),
                moments=moments,
                summary=summary,
            )
            if waits is not None:
                waits.clear()
            index = 0
            for number, lengths in enumerate(self.batches, 1):
                examples = [_example(place, length) for place, length in enumerate(lengths, index)]
                index += len(lengths)
                plan = capture.plan(examples, ends_group=number == len(self.batches))
                capture.run(plan)
                capture.finish(plan)
        checks = [check for of_batch in journal.checks.values() for check in of_batch]
        assert checks and all(check["passed"] is not False for check in checks), checks
        return _numbers(journal)


def differing(found: Arrays, expected: Arrays) -> list[str]:
    """Returns the names of the tensors that differ by more than rounding; races give other rows, or NaN."""
    assert expected.keys() == found.keys() and expected
    return [
        name
        for name, values in expected.items()
        if found[name].shape != values.shape
        or not np.allclose(found[name], values, rtol=1e-3, atol=1e-4, equal_nan=name in _SUMMARIES)
    ]


def statistics_and_summaries(**values: Any) -> CaptureConfig:
    """Returns the settings of a capture of vectors with statistics of both stages and attention summaries."""
    return CaptureConfig(
        statistics=StatisticsConfig(enabled=True, stages=["pre", "post"]),
        attention=AttentionConfig(enabled=True, top_k=3, sink_tokens=2),
        **values,
    )


def _example(index: int, length: int) -> Tokens:
    ids = np.random.default_rng(index).integers(1, VOCAB, size=length).astype(np.int32)
    return Tokens(index, index, str(index), ids, 0, "")


def _numbers(journal: Journal) -> Arrays:
    """Returns the numbers of all segments by tensor, those of a block in the order of their rows."""
    parts: dict[str, list[np.ndarray]] = {}
    for path in journal.segments:
        data = path.read_bytes()
        for name, place in read_header(path).tensors.items():
            if name.endswith(".runs"):
                continue
            size = int(np.prod(place.shape)) * ITEM_SIZES[place.dtype]
            values = np.frombuffer(data[place.offset : place.offset + size], _NUMPY[place.dtype])
            parts.setdefault(name, []).append(values.reshape(place.shape))
    return {name: np.concatenate(each, axis=1 if name.endswith(".vectors") else 0) for name, each in parts.items()}
