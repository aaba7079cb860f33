"""Gives a `PassSink` the rows of forward passes, each over a part of an example, as captures in Python do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qk_sniffer.backbone.loading import load_backbone
from qk_sniffer.backbone.tap import AttentionCall
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.gather import TokenIndices, send
from qk_sniffer.capture.moments import Moments, rotary_pairs
from qk_sniffer.capture.row_writer import BatchRows, RowWriter, other_states_by_kind, states_by_kind
from qk_sniffer.capture.sampling import Picks, Sampler
from qk_sniffer.capture.selection import select
from qk_sniffer.config import ModelConfig, from_dict
from qk_sniffer.corpus.contents import ids_hash
from qk_sniffer.jobs.components import model_facts
from qk_sniffer.jobs.from_python import LONGEST
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.memory import PassSink
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.statistics import Part, PartKey
from qk_sniffer.timing import Stages
from support.tiny import ALPHABET

SAMPLER = {"type": "uniform", "base_rate": 4.0, "min_bucket_size": 16}


def facts_of(checkpoint: Path, **sections: Any) -> CaptureFacts:
    """Returns the facts of a capture of the model in a folder, which the config of the model does not name."""
    named = {"model": {"tokenizer": {"max_length": LONGEST}}, "sampler": SAMPLER}
    config = from_dict(named | sections)
    backbone = load_backbone(ModelConfig(name=str(checkpoint), dtype="float32", device_map="cpu"))
    layers = backbone.probe()
    selection = select([each.heads for each in layers], config.capture)
    return CaptureFacts(config, backbone, layers, selection, None, {}, model_facts(backbone, layers, selection))


def ids_of(text: str) -> np.ndarray:
    """Returns the token ids that the tokenizer of `tiny.py` gives a text."""
    return np.array([1 + ALPHABET.index(character) for character in text], np.int32)


@dataclass(eq=False)
class Passes:
    """Runs passes of one capture into `sink`."""

    facts: CaptureFacts
    sink: PassSink
    _statistics: dict[PartKey, Part] = field(default_factory=dict)

    def whole(self, texts: Sequence[str]) -> None:
        """Runs each text in a pass, and completes it."""
        for number, text in enumerate(texts):
            self.part(number, text)
            self.sink.complete([self.record(number, text)])

    def part(self, number: int, text: str, start: int = 0, stop: int | None = None, *, fails: bool = False) -> None:
        """Gives the rows of tokens `start` to `stop` of a text. A pass that `fails` ends in the second layer."""
        facts, ids = self.facts, ids_of(text)
        last = len(ids) if stop is None else stop
        sampler = Sampler(facts.config.sampler)
        keys = [(layer, kind) for layer, kind, _ in facts.selection]
        picks = sampler.plan([number], [len(ids)], keys)
        tokens = {key: TokenIndices.of(_between(each, start, last), torch.device("cpu")) for key, each in picks.items()}
        sent = send(tokens, torch.device("cpu"))
        writer = RowWriter(facts.selection, self.sink, Stages())
        batch = BatchRows(np.array([number]), np.array([0]))
        settings = facts.config.capture
        moments = self._moments()
        table = AttentionTable.of(facts.config)
        heads = {layer: heads for layer, kind, heads in facts.selection if kind == "q"}
        summarizer = None if table is None else Summarizer(table, settings.attention.sink_tokens, heads)

        others: dict[str, torch.Tensor] = {}

        spans = [[(max(start, settings.statistics.skip_tokens), last)]]

        def write(layer: int, kind: str, states: torch.Tensor) -> None:
            if (layer, kind) in sent:
                writer.write(batch, layer, kind, states, sent[layer, kind])
                if moments is not None:
                    moments.add(PartKey(layer, kind, "post"), states, spans)
                    if kind in others:
                        moments.add(PartKey(layer, kind, "pre"), others[kind], spans)

        def on_call(call: AttentionCall) -> None:
            if fails and call.layer == 1:
                raise MemoryError
            others.update(other_states_by_kind(call))
            for kind, states in states_by_kind(call).items():
                write(call.layer, kind, states)
            if summarizer is not None:
                writer.write_summary(batch, call, sent[call.layer, "q"], summarizer)

        def on_output(call: AttentionCall, output: torch.Tensor | None) -> None:
            assert output is not None
            write(call.layer, "o", output)

        try:
            tokens_of_text = torch.from_numpy(ids)[None].long()
            both = len(settings.statistics.stages) == 2
            facts.backbone.forward(tokens_of_text, on_call, on_output=on_output, both_stages=both)
        except Exception:
            self.sink.drop_pass([number])
            raise
        self.sink.end_pass()
        for key, part in ({} if moments is None else moments.take()).items():
            before = self._statistics.get(key)
            self._statistics[key] = part if before is None else before.merged(part)

    def record(self, number: int, text: str, first_position: int = 0) -> ExampleRecord:
        """Returns the record of an example whose tokens are those of a text."""
        ids = ids_of(text)
        hashed = "" if first_position else ids_hash(ids)
        return ExampleRecord(number, number, str(number), len(ids), False, hashed, first_position=first_position)

    def statistics(self) -> dict[PartKey, Part]:
        """Returns the statistics of the passes that have not failed."""
        return self._statistics

    def _moments(self) -> Moments | None:
        facts = self.facts
        settings = facts.config.capture.statistics
        if not settings.enabled:
            return None
        pairs = {each.heads.layer: rotary_pairs(each, facts.backbone.frequencies) for each in facts.layers}
        return Moments(settings, {(layer, kind): heads for layer, kind, heads in facts.selection}, pairs)


def _between(picks: Picks, start: int, stop: int) -> Picks:
    kept = (picks.position >= start) & (picks.position < stop)
    return Picks(picks.row[kept], picks.position[kept])
