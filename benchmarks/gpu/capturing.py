"""Captures batches of random tokens into temporary journals, with the classes of a job."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpu.bench import Bench, Model, random_ids
from gpu.results import LeftOutError
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.capture import BatchPlan, Capture
from qk_sniffer.capture.moments import Moments, rotary_pairs
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import select
from qk_sniffer.config import from_dict
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.timing import Stages

NUM_BUCKETS = 16
DRAWN_HEADS = 300
QUEUE_BYTES, SEGMENT_BYTES = 512 << 20, 128 << 20
"""The defaults of a job."""


@dataclass(frozen=True)
class Way:
    """What is captured of every pass."""

    sampler: str
    """One row in each of `NUM_BUCKETS` buckets of all heads, or with `all` every token of `DRAWN_HEADS` query heads and
    their key heads."""
    statistics: bool = False
    """Statistics of every token of all heads, with covariances."""
    summaries: bool = False
    """The attention of the sampled queries."""


WAYS = {
    "uniform": Way("uniform"),
    "all": Way("all"),
    "summaries": Way("uniform", summaries=True),
    "statistics": Way("none", statistics=True),
}


@dataclass
class Capturing:
    """A capture into a journal of its own."""

    model: Model
    capture: Capture
    writer: JournalWriter
    num_heads: int

    def plan(self, *shape: int, seed: int = 0, ends_group: bool = True) -> BatchPlan:
        """Returns the plan of a batch of random ids, (n,) or (B, n)."""
        ids = random_ids(*shape, seed=seed).astype("int32")
        first = seed * len(ids)
        texts = [Tokens(i, i, str(i), text, 0, "") for i, text in enumerate(ids[None] if ids.ndim == 1 else ids, first)]
        return self.capture.plan(texts, ends_group=ends_group)

    def nbytes(self, plan: BatchPlan) -> int:
        """Returns the bytes of the vectors of a batch in the journal."""
        return self.capture.num_rows(plan) * self.model.backbone.config.head_dim * self.model.backbone.dtype.itemsize

    def run(self, plan: BatchPlan) -> None:
        self.capture.run(plan)
        self.capture.finish(plan)


@contextmanager
def capturing(
    bench: Bench, model: Model, way: Way, tokens: int, *, queue_bytes: int = QUEUE_BYTES, folder: Path | None = None
) -> Iterator[Capturing]:
    """Captures texts of `tokens` tokens into a temporary journal in `folder`, by default that of the bench."""
    heads_of = [layer.heads for layer in model.layers]
    eligible = sum(heads.num_q_heads for heads in heads_of)
    drawn = DRAWN_HEADS if way.sampler == "all" and eligible > DRAWN_HEADS else None
    config = from_dict(
        {
            "model": {"name": model.name, "tokenizer": {"max_length": tokens}},
            "dataset": {"path": "random"},
            "sampler": {"type": way.sampler, "min_bucket_size": max(1, tokens // NUM_BUCKETS)},
            "capture": {
                "head_sampling": {"count": drawn},
                "statistics": {"enabled": way.statistics},
                "attention": {"enabled": way.summaries},
            },
        }
    )
    selection = select(heads_of, config.capture)
    heads = {(layer, kind): numbers for layer, kind, numbers in selection}
    moments, summary = None, None
    if way.statistics:
        pairs = {layer.heads.layer: rotary_pairs(layer, model.backbone.frequencies) for layer in model.layers}
        moments = Moments(config.capture.statistics, heads, pairs)
    if (table := AttentionTable.of(config)) is not None:
        queries = {layer: numbers for (layer, kind), numbers in heads.items() if kind == "q"}
        summary = Summarizer(table, config.capture.attention.sink_tokens, queries)
    with tempfile.TemporaryDirectory(dir=folder or bench.folder) as temporary:
        pinned = model.backbone.device.type == "cuda"
        journal = Journal(Path(temporary))
        with JournalWriter(journal, queue_bytes=queue_bytes, segment_bytes=SEGMENT_BYTES, pinned=pinned) as writer:
            capture = Capture(
                model.backbone,
                selection,
                Sampler(config.sampler),
                writer,
                columns=(),
                stages=Stages(),
                moments=moments,
                summary=summary,
            )
            yield Capturing(model, capture, writer, sum(map(len, heads.values())))


def make_room(bench: Bench, nbytes: int, folder: Path | None = None) -> None:
    """Takes the bytes of a measurement from the budget.

    Raises:
        LeftOutError: the budget or the disk has no room for them.
    """
    free = shutil.disk_usage(folder or bench.folder).free
    if nbytes > 0.9 * free:
        raise LeftOutError(
            f"it writes {nbytes / 1e9:.1f} GB, and {folder or bench.folder} has {free / 1e9:.1f} GB free"
        )
    bench.budget.take_bytes(nbytes)
