"""Provides a small captured corpus for the store's tests, and the rows of its dataset, computed without the store.

The batches are not in the order of the source, like batches by length. Some rows are written in two parts, which may
cut an example in two, with the later part first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import CaptureConfig, Config, DatasetConfig, ModelConfig, SamplerConfig
from qk_sniffer.resolved import fingerprint, resolve
from qk_sniffer.store.compact import compact
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import OFFSET_COLUMNS, Head, Layout
from qk_sniffer.store.manifest import Written, build
from qk_sniffer.store.promote import promote
from qk_sniffer.store.rows import Rows, RowTokens
from qk_sniffer.store.text_segments import encode

HEAD_DIM = 16
NUM_HEADS = {"q": 4, "k": 2}
LAYERS = (0, 3)
WINDOW = {0: None, 3: 64}
NAMES = ("system", "user", "assistant é", "template")

SAMPLER = Sampler(SamplerConfig(type="log_uniform", min_bucket_size=4))

HEADS = [
    Head(
        layer, head, kind, head // 2 if kind == "q" else head, HEAD_DIM, WINDOW[layer], head, {"qk_sniffer.kind": kind}
    )
    for layer in LAYERS
    for kind in ("q", "k")
    for head in range(NUM_HEADS[kind])
]


def token_string(ids: np.ndarray) -> list[str]:
    return [f"<{number}>" for number in ids]


ALL_COLUMNS: dict[str, Any] = {
    "capture": CaptureConfig(
        capture_segments=True, capture_token_ids=True, capture_token_strings=True, capture_offsets=True
    ),
    "has_segments": True,
    "token_string": token_string,
}
"""The options of a compaction with every column, of a corpus with `offsets` and `segments`."""


def characters(token: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first character of tokens and the one after the last; -1 for some."""
    start = np.where(token % 5 == 0, -1, 3 * position)
    return start, np.where(start < 0, -1, start + token % 4)


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows with their vectors (num_heads, num_rows, head_dim)."""

    rows: Rows
    vectors: torch.Tensor

    @classmethod
    def of(
        cls,
        layer: int,
        kind: str,
        vectors: torch.Tensor,
        index: np.ndarray,
        position: np.ndarray,
        **tokens: np.ndarray,
    ) -> "Piece":
        num_heads, _, head_dim = vectors.shape
        described = RowTokens(index, position, tokens)
        return cls(Rows(layer, kind, num_heads, head_dim, vectors.dtype, described), vectors)


def ones(count: int, dim: int = 4, *, index: int = 0, dtype: torch.dtype = torch.float32) -> Piece:
    """Returns `count` rows of one example, all with the same vector."""
    return Piece.of(0, "q", torch.ones(1, count, dim, dtype=dtype), np.full(count, index), np.arange(count))


def put(writer: JournalWriter, piece: Piece) -> None:
    """Writes a piece whose vectors are in memory."""
    with writer.reserve(piece.rows) as slot:
        assert slot.vectors.shape == piece.vectors.shape
        slot.vectors.copy_(piece.vectors)
        writer.commit(slot, None)


@dataclass(frozen=True)
class Captured:
    """A corpus. `batch` is the number of examples a batch; `seed` determines everything else."""

    num_examples: int = 12
    dtype: torch.dtype = torch.bfloat16
    batch: int = 3
    seed: int = 0
    token_ids: bool = True
    offsets: bool = False
    segments: bool = False

    def length(self, index: int) -> int:
        return 5 + (index * 37 + self.seed) % 60

    def positions(self, index: int, layer: int, kind: str) -> np.ndarray:
        """Returns positions (n,), ascending. Example 4 has no rows."""
        rng = np.random.default_rng([self.seed, index, layer, ord(kind)])
        keep = 0.0 if index == 4 else 0.4
        return np.flatnonzero(rng.random(self.length(index)) < keep).astype(np.int32)

    def vectors(self, index: int, layer: int, kind: str) -> torch.Tensor:
        """Returns vectors (num_heads, n, HEAD_DIM) in `dtype`."""
        count = len(self.positions(index, layer, kind))
        generator = torch.Generator().manual_seed(self.seed * 10**6 + index * 1000 + layer * 2 + (kind == "q"))
        return torch.randn(NUM_HEADS[kind], count, HEAD_DIM, generator=generator).to(self.dtype)

    def tokens(self, index: int) -> np.ndarray:
        return ((np.arange(self.length(index)) * 7 + index) % 50).astype(np.int32)

    def codes(self, index: int) -> np.ndarray:
        """Returns the index in `NAMES` of the segment of each token."""
        rng = np.random.default_rng([self.seed, index])
        return np.repeat(rng.integers(0, len(NAMES), 40), rng.integers(1, 9, 40))[: self.length(index)]

    def record(self, index: int) -> ExampleRecord:
        return ExampleRecord(
            index,
            1000 - index,
            f"id-{index} é\n",
            self.length(index),
            index % 5 == 0,
            f"{index:032x}",
            segments=encode(NAMES, self.codes(index)) if self.segments else None,
        )

    def batches(self, done: set[int] | dict[int, ExampleRecord] = frozenset()) -> Iterator[list[int]]:
        """Yields batches of the examples that are not in `done`, not in the order of the source."""
        order = np.random.default_rng(self.seed).permutation(self.num_examples).tolist()
        whole = [order[at : at + self.batch] for at in range(0, len(order), self.batch)]
        yield from ([index for index in batch if index not in done] for batch in whole)

    def pieces(self, batch: Sequence[int]) -> Iterator[Piece]:
        """Yields the rows of a batch."""
        for layer in LAYERS:
            for kind in ("q", "k"):
                positions = [self.positions(index, layer, kind) for index in batch]
                index = np.repeat(np.asarray(batch, np.int64), [len(part) for part in positions])
                position = np.concatenate(positions)
                vectors = torch.cat([self.vectors(i, layer, kind) for i in batch], dim=1)
                token = np.concatenate([self.tokens(i)[p] for i, p in zip(batch, positions, strict=True)])
                cut = len(index) // 2 if layer == 3 else len(index)
                parts = [slice(0, cut), slice(cut, None)]
                for part in parts if kind == "k" else reversed(parts):
                    if len(index[part]):
                        columns = {"token_id": token[part]} if self.token_ids else {}
                        if self.offsets:
                            columns |= dict(zip(OFFSET_COLUMNS, characters(token[part], position[part]), strict=True))
                        yield Piece.of(layer, kind, vectors[:, part], index[part], position[part], **columns)

    def write(self, writer: JournalWriter, done: dict[int, ExampleRecord] | None = None) -> None:
        """Writes every batch that is not done, as a job does."""
        for batch in self.batches(done or {}):
            if batch:
                for piece in self.pieces(batch):
                    put(writer, piece)
                writer.complete([self.record(index) for index in batch])

    def expected(self, head: Head) -> dict[str, np.ndarray]:
        """Returns the columns of a head's file, by the definition of the dataset."""
        names = ("example_id", "position", "vector", "token_id", "segment", *OFFSET_COLUMNS)
        rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for index in range(self.num_examples):
            position = self.positions(index, head.layer, head.kind)
            rows["example_id"].append(np.full(len(position), 1000 - index))
            rows["position"].append(position)
            rows["vector"].append(self.vectors(index, head.layer, head.kind)[head.row].float().numpy())
            rows["token_id"].append(self.tokens(index)[position])
            rows["segment"].append(np.array(NAMES)[self.codes(index)[position]])
            for name, values in zip(OFFSET_COLUMNS, characters(rows["token_id"][-1], position), strict=True):
                rows[name].append(values)
        columns = {name: np.concatenate(parts) for name, parts in rows.items()}
        exponent = np.floor(np.log2(columns["position"] + 1.0)).astype(int)
        return columns | {"bucket": np.maximum(2, exponent)}


def by_index(journal: Journal) -> dict[int, ExampleRecord]:
    """Returns the examples of a journal of whole texts."""
    return {record.index: record for record in journal.records.values()}


def captured_journal(folder: Path, corpus: Captured, segment_bytes: int = 1 << 14) -> Journal:
    """Returns a journal of the whole corpus, read from the disk."""
    with JournalWriter(Journal(folder), queue_bytes=1 << 20, segment_bytes=segment_bytes) as writer:
        corpus.write(writer)
    return Journal(folder)


def make_dataset(root: Path, corpus: Captured, **options: Any) -> tuple[Layout, Written]:
    """Writes the corpus as a finished dataset."""
    layout = Layout(root)
    journal = captured_journal(layout.journal(0, 1), corpus)
    written = compact(layout, [journal], HEADS, SAMPLER, **options)
    card = b"# card\n"
    facts = job_facts(options.get("capture")) | {"source_rows": written.num_examples}
    promote(layout, build(facts, written), card=card)
    return layout, written


def file_bytes(root: Path) -> dict[str, bytes]:
    """Returns the bytes of all files below `root` by name, without the work folder."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".qk_sniffer")}


def job_facts(capture: CaptureConfig | None = None) -> dict[str, Any]:
    """Returns what a job of `HEADS` adds to the manifest."""
    terms = {"license": [], "language": []}
    layers = [
        {
            "layer": layer,
            "num_q_heads": NUM_HEADS["q"],
            "num_k_heads": NUM_HEADS["k"],
            "head_dim": HEAD_DIM,
            "sliding_window": WINDOW[layer],
            "softmax_scale": 0.25,
            "captured": {kind: list(range(number)) for kind, number in NUM_HEADS.items()},
        }
        for layer in LAYERS
    ]
    model = {"model_type": "llama", "dtype": "bfloat16", "attn_implementation": "sdpa", "rope_stage": "post"}
    model_and_texts = {"model": ModelConfig(name="model"), "dataset": DatasetConfig(path="texts")}
    config = resolve(Config(**model_and_texts, capture=capture or CaptureConfig()))
    return {
        "fingerprint": fingerprint(config),
        "commits": {"model": None, "tokenizer": None, "dataset": None},
        "versions": {},
        "config": config.to_dict(),
        "stated": {"model": terms, "dataset": terms},
        "model": model | {"layers": layers, "rotary": {}},
        "tokenizer": {"class": "Tokenizer"},
        "source_rows": 0,
        "skipped_rows": 0,
        "grown_from": [],
        "inclusion": {},
        "proof": {"proven": None, "reason": "not asked for"},
    }
