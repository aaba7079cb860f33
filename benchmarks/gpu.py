"""Measures the cost of capture on a GPU: time over plain passes of the same model, memory, and synchronisations.

    python benchmarks/gpu.py [--minutes 7] [--out results/gpu.json] [--folder DIR]

The models have the shapes of Qwen3-0.6B and Qwen3-8B and random weights. `uniform` captures all heads, one row in each
bucket. `all` captures every token of 300 drawn query heads and of their key heads. Both write the rows durably to a
journal in `--folder`. `statistics` takes statistics of every token of all heads, with covariances and without rows; it
writes them once for all passes of a figure. The exit code is 1 if a vector in the journal differs from the vector that
attention received, or if a forward pass with capture waits for the device more often than a plain one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, machine
from transformers import Qwen3Config, Qwen3Model

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.tap import AttentionCall, ForwardDone
from qk_sniffer.capture import row_writer
from qk_sniffer.capture.capture import BatchPlan, Capture
from qk_sniffer.capture.moments import Moments, rotary_pairs
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import select
from qk_sniffer.config import CaptureConfig, HeadSamplingConfig, SamplerConfig, StatisticsConfig
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.errors import QkSnifferError
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.segment import read_header
from qk_sniffer.timing import Stages

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16},
    "Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128},
}
NUM_HEADS = {"tiny": (4, 2), "Qwen3-0.6B": (16, 8), "Qwen3-8B": (32, 8)}
LENGTHS = (4096, 32768, 131072)
WAYS = ("uniform", "all", "statistics")
NUM_BUCKETS = 16
DRAWN_HEADS = 300
QUEUE_BYTES, SEGMENT_BYTES = 512 << 20, 128 << 20
LARGE_QUEUE_BYTES = 2 << 30
"""Holds two batches of 4,096 tokens with `all`, so that their forward passes do not wait for the disk."""
LEAST_S = 1.0
"""Least duration of the forward passes behind one figure. It decides their number."""
MOST_BYTES = 4 << 30
"""Most bytes of rows behind one figure. Larger ones take fewer passes and one round, to stay within 8 minutes."""
ROUNDS = 3
CHECKED_PIECE_BYTES = 1 << 20
"""Piece size in the check of vectors: small enough to refill each buffer while the previous one is copied."""


@dataclass(frozen=True)
class Row:
    """A line of the table. Ratios divide medians over the rounds. Each round alternates the ways."""

    model: str
    tokens: int
    way: str
    heads: int
    forward_ms: float
    """Of a plain forward pass."""
    ratio: float
    """Wall time until all rows are durable in the journal, over plain forward passes."""
    gpu_ratio: float | None
    """Time of a single pass on the GPU's clock, over a plain one's. None if its rows outgrow `LARGE_QUEUE_BYTES`:
    the forward pass then waits for the disk."""
    journal_mb_s: float
    peak_gb: float
    plain_peak_gb: float
    syncs: int
    """Synchronisations in a forward pass with capture, minus those in a plain one."""

    def __str__(self) -> str:
        gpu_ratio = "     -" if self.gpu_ratio is None else f"{self.gpu_ratio:6.3f}"
        return (
            f"{self.model:<11} {self.tokens:>7,} {self.way:<10} {self.heads:>5} heads  plain {self.forward_ms:>9.1f} ms"
            f"  ratio {self.ratio:6.3f}  GPU alone {gpu_ratio}  {self.journal_mb_s:>6.0f} MB/s"
            f"  peak {self.peak_gb:6.2f} of {self.plain_peak_gb:6.2f} GB  {self.syncs:+d} syncs"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="starts no further measurement after this time")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--folder", type=Path, help="folder of the journals; default: the system's temporary folder")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself, with --shapes tiny")
    parser.add_argument("--shapes", nargs="+", default=["Qwen3-0.6B", "Qwen3-8B"], choices=SHAPES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    until = time.monotonic() + 60 * arguments.minutes
    rows: list[Row] = []
    left_out: list[str] = []
    wrong = 0

    def save() -> None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        result = {"device": name, "rows": [asdict(row) for row in rows], "left_out": left_out, "wrong": wrong}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result | machine(), indent=2) + "\n")

    for shape in arguments.shapes:
        backbone = make_backbone(shape, device, max(arguments.lengths))
        wrong += check_vectors(shape, backbone, arguments.folder)
        for tokens in arguments.lengths:
            if time.monotonic() > until:
                left_out.append(f"{shape}, {tokens} tokens: no time")
                continue
            try:
                found = measure(shape, backbone, tokens, arguments.folder)
            except (torch.OutOfMemoryError, QkSnifferError) as error:
                left_out.append(f"{shape}, {tokens} tokens: {str(error).splitlines()[0]}")
                continue
            rows += found
            for row in found:
                print(row, flush=True)
            save()
        del backbone
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for line in left_out:
        print(f"left out: {line}")
    save()
    return 1 if wrong or any(row.syncs > 0 for row in rows) else 0


def make_backbone(shape: str, device: torch.device, length: int) -> Backbone:
    query_heads, key_heads = NUM_HEADS[shape]
    config = Qwen3Config(
        vocab_size=151_936 if shape != "tiny" else 1000,
        num_attention_heads=query_heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=length,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    with device:
        decoder = Qwen3Model(config).eval().to(torch.bfloat16)
    return Backbone(decoder, find_family("qwen3"))


@contextmanager
def capturing(
    backbone: Backbone, way: str, tokens: int, folder: Path | None, queue_bytes: int = QUEUE_BYTES
) -> Iterator[tuple[Capture, JournalWriter]]:
    """Yields a capture that writes to a temporary journal of its own."""
    facts = backbone.probe()
    layers = [layer.heads for layer in facts]
    count = DRAWN_HEADS if way == "all" else None
    eligible = sum(layer.num_q_heads for layer in layers)
    count = None if count is None or count >= eligible else count
    selection = select(layers, CaptureConfig(head_sampling=HeadSamplingConfig(count=count)))
    moments = None
    if way == "statistics":
        heads = {(layer, kind): numbers for layer, kind, numbers in selection}
        pairs = {layer.heads.layer: rotary_pairs(layer, backbone.frequencies) for layer in facts}
        moments = Moments(StatisticsConfig(enabled=True), heads, pairs)
    kept = "none" if way == "statistics" else way
    sampler = Sampler(SamplerConfig(type=kept, min_bucket_size=max(1, tokens // NUM_BUCKETS)))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pinned = backbone.device.type == "cuda"
        journal = Journal(Path(temporary))
        with JournalWriter(journal, queue_bytes=queue_bytes, segment_bytes=SEGMENT_BYTES, pinned=pinned) as writer:
            stages = Stages()
            capture = Capture(backbone, selection, sampler, writer, columns=(), stages=stages, moments=moments)
            yield capture, writer


def made(capture: Capture, index: int, tokens: int, *, ends_group: bool = True) -> BatchPlan:
    ids = np.random.default_rng(index).integers(1000, size=tokens).astype(np.int32)
    return capture.plan([Tokens(index, index, str(index), ids, 0, "")], ends_group=ends_group)


def captured(capture: Capture, plan: BatchPlan) -> None:
    capture.run(plan)
    capture.finish(plan)


def measure(shape: str, backbone: Backbone, tokens: int, folder: Path | None) -> list[Row]:
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, size=tokens))[None]
    once, _, plain_peak = timed(backbone, [lambda: backbone.run(ids)])  # the first pass of a length chooses kernels
    if once < 2 * LEAST_S:
        once, _, plain_peak = timed(backbone, [lambda: backbone.run(ids)])
    plain_syncs = num_syncs(lambda: backbone.run(ids))
    taken: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ("plain", *WAYS)}
    speeds: dict[str, float] = {}
    heads: dict[str, int] = {}
    syncs: dict[str, int] = {}
    nbytes: dict[str, int] = {"plain": 0}
    for way in WAYS:
        with capturing(backbone, way, tokens, folder) as (capture, _):
            if way == "statistics":  # sends its indices to the device once
                captured(capture, made(capture, 1, tokens, ends_group=False))
            plan = made(capture, 0, tokens, ends_group=way != "statistics")
            syncs[way] = num_syncs(partial(captured, capture, plan)) - plain_syncs
            heads[way] = sum(len(each) for each in capture._heads.values())
            nbytes[way] = capture.num_rows(plan) * backbone.config.head_dim * 2
    most = max(nbytes.values())
    count = max(1, min(round(LEAST_S / once), MOST_BYTES // most))
    for _ in range(ROUNDS if count * most < MOST_BYTES else 1):
        for way, figures in taken.items():
            if way == "plain":
                wall_s, gpu_s, peak_gb = timed(backbone, [lambda: backbone.run(ids)] * count)
                figures.append((wall_s, gpu_s / count, peak_gb))
                continue
            with capturing(backbone, way, tokens, folder, LARGE_QUEUE_BYTES) as (capture, writer):
                run = partial(captured, capture, made(capture, 0, tokens))
                _, gpu_s, peak_gb = timed(backbone, [run])
            with capturing(backbone, way, tokens, folder) as (capture, writer):
                ends = [way != "statistics" or index == count - 1 for index in range(count)]
                plans = [made(capture, index, tokens, ends_group=end) for index, end in enumerate(ends)]
                runs = [partial(captured, capture, plan) for plan in plans]
                wall_s, _, _ = timed(backbone, [*runs, writer.close])
                speeds[way] = writer.bytes_written / wall_s / 1e6
            figures.append((wall_s, gpu_s, peak_gb))

    def middle(way: str, part: int) -> float:
        return statistics.median(figures[part] for figures in taken[way])

    return [
        Row(
            model=shape,
            tokens=tokens,
            way=way,
            heads=heads[way],
            forward_ms=1e3 * middle("plain", 0) / count,
            ratio=middle(way, 0) / middle("plain", 0),
            gpu_ratio=middle(way, 1) / middle("plain", 1) if nbytes[way] < LARGE_QUEUE_BYTES else None,
            journal_mb_s=speeds[way],
            peak_gb=middle(way, 2),
            plain_peak_gb=plain_peak,
            syncs=syncs[way],
        )
        for way in WAYS
    ]


def timed(backbone: Backbone, runs: list[Callable[[], None]]) -> tuple[float, float, float]:
    """Returns the wall seconds of all runs, the seconds of the compute stream, and the peak GB of the device."""
    if backbone.device.type != "cuda":
        start = time.perf_counter()
        for run in runs:
            run()
        wall_s = time.perf_counter() - start
        return wall_s, wall_s, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    gpu_s = 0.0
    start = time.perf_counter()
    spans = []
    for run in runs:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    wall_s = time.perf_counter() - start
    gpu_s = sum(begin.elapsed_time(end) for begin, end in spans) / 1e3
    return wall_s, gpu_s, torch.cuda.max_memory_allocated() / 1e9


def num_syncs(run: Callable[[], None]) -> int:
    """Counts the waits of the host for the device in `run`, with the debug mode of torch."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def check_vectors(shape: str, backbone: Backbone, folder: Path | None) -> int:
    """Counts the blocks of the journal that differ in any bit from the arguments of attention.

    Rows are copied during the computation: a buffer that is reused too early gives different blocks.
    """
    tokens = 4096
    wrong = 0
    piece_bytes, row_writer.PIECE_BYTES = row_writer.PIECE_BYTES, CHECKED_PIECE_BYTES
    for way in ("uniform", "all"):
        with capturing(backbone, way, tokens, folder) as (capture, writer):
            plan = made(capture, 0, tokens)
            captured(capture, plan)
            writer.close()
            stored = stored_blocks(writer._journal)
        last = max(layer for layer, _ in plan.tokens)

        def compare(
            call: AttentionCall,
            capture: Capture = capture,
            plan: BatchPlan = plan,
            stored: dict[str, np.ndarray] = stored,
            last: int = last,
        ) -> None:
            nonlocal wrong
            for kind, states in (("q", call.query), ("k", call.key)):
                if (chosen := plan.tokens.get((call.layer, kind))) is not None and len(chosen):
                    rows = states[0].cpu()[list(capture._heads[call.layer, kind])][:, chosen.position]
                    bits = rows.contiguous().view(torch.int16).numpy().view(np.uint16)
                    wrong += not np.array_equal(bits, stored[f"l{call.layer:02d}{kind}"])
            if call.layer == last:
                raise ForwardDone

        backbone.forward(plan.ids, compare)
    row_writer.PIECE_BYTES = piece_bytes
    print(f"{shape}: {wrong} blocks of the journal differ from the arguments of attention", flush=True)
    return wrong


def stored_blocks(journal: Journal) -> dict[str, np.ndarray]:
    """Returns {l00q: (num_heads, num_rows, head_dim) bits}. Several segments may hold parts of one block."""
    parts: dict[str, list[np.ndarray]] = {}
    for path in journal.segments:
        data = np.fromfile(path, np.uint8)
        for name, place in read_header(path).tensors.items():
            if name.endswith(".vectors"):
                size = int(np.prod(place.shape)) * 2
                block = data[place.offset : place.offset + size].view(np.uint16).reshape(place.shape)
                parts.setdefault(name.removesuffix(".vectors"), []).append(block)
    return {name: np.concatenate(blocks, axis=1) for name, blocks in parts.items()}


if __name__ == "__main__":
    sys.exit(main())
