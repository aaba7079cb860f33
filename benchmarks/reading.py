"""Measures `Dataset.torch` against a memory map of the same bytes, and prints the ratios of the times as JSON.

The vectors of `HEADS` heads are read in shuffled batches, each once: by a DataLoader over `Dataset.torch`, and by a
loop that takes the same rows from a numpy memory map. The file is in the page cache. The time of workers has their
start. `copy_s` is the time to write the file that `Dataset.torch` reads, `decode_s` that of pyarrow alone to read the
same Parquet files.

python benchmarks/reading.py [ROUNDS]
"""

import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from qk_sniffer.dataset.token_vectors import ShuffledBatches, Source, TokenVectors, token_vectors
from qk_sniffer.store.layout import HeadKey, schema
from qk_sniffer.store.parquet_writer import ParquetWriter

HEADS, HEAD_DIM, TOKENS, GROUP, BATCH = 8, 128, 65_536, 8192, 1024


def sources(folder: Path) -> list[Source]:
    """Writes the files of heads, with row groups of the size that a job writes."""
    rng = np.random.default_rng(0)
    found = []
    for head in range(HEADS):
        key = HeadKey(0, head, "q")
        path = folder / key.name / "data.parquet"
        path.parent.mkdir(parents=True)
        columns = schema(HEAD_DIM)
        with ParquetWriter(path, columns) as writer:
            for start in range(0, TOKENS, GROUP):
                position = np.arange(start, start + GROUP, dtype=np.int32)
                vectors = pa.array(rng.standard_normal(GROUP * HEAD_DIM, np.float32))
                values = {
                    "bucket": position // 128,
                    "example_id": np.zeros(GROUP, np.int32),
                    "position": position,
                    "vector": pa.FixedSizeListArray.from_arrays(vectors, HEAD_DIM),
                    "sliding_window": pa.nulls(GROUP, pa.int32()),
                }
                writer.write(pa.Table.from_arrays([pa.array(values[name]) for name in columns.names], schema=columns))
        found.append(Source(key, path, columns, TOKENS, hashlib.sha256(path.read_bytes()).hexdigest()))
    return found


def loader(tokens: TokenVectors, workers: int) -> None:
    for batch in DataLoader(tokens, sampler=tokens.batches(BATCH, seed=0), batch_size=None, num_workers=workers):
        assert batch["l00h00q"].shape == (BATCH, HEAD_DIM)


def memory_map(path: Path) -> None:
    rows = np.memmap(path, np.float32, "r").reshape(TOKENS, -1)
    for order in ShuffledBatches(TOKENS, BATCH, seed=0):
        assert torch.from_numpy(rows[order]).shape == (BATCH, 2 + HEADS * HEAD_DIM)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = sources(folder)
        decode_s = seconds(lambda: [pq.read_table(head.path, columns=["vector"]) for head in heads])
        copy_s = seconds(lambda: token_vectors(heads, folder / "cache", "none"))
        tokens = token_vectors(heads, folder / "cache", "none")
        times: dict[str, list[float]] = {"memory_map": [], "loader": [], "two_workers": []}
        for _ in range(rounds):
            times["memory_map"].append(seconds(lambda: memory_map(tokens.path)))
            times["loader"].append(seconds(lambda: loader(tokens, 0)))
            times["two_workers"].append(seconds(lambda: loader(tokens, 2)))
        middle = {what: statistics.median(values) for what, values in times.items()}
        found = {f"{what}_ratio": middle[what] / middle["memory_map"] for what in ("loader", "two_workers")}
        found |= {"copy_s": copy_s, "decode_s": decode_s, "memory_map_s": middle["memory_map"]}
        found["mb"] = tokens.path.stat().st_size / 1e6
        print(json.dumps({what: round(value, 3) for what, value in found.items()}))


if __name__ == "__main__":
    main()
