"""Measures CPU seconds from journal to Parquet, next to pyarrow alone with the same arrays and encodings, as JSON.

`ours_s` is the compaction, `bare_s` pyarrow alone. `overhead_s` is the unavoidable cost of checksums and a journal:
reading the journal for its checksum, reading it for its rows, and the SHA-256 of the written files. `size` is the bytes
of our files divided by those of the arrays. `journal_mb_s` is the speed at which the journal became durable, in MB of
10^6 bytes.

python benchmarks/writing.py DTYPE
"""

import hashlib
import json
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from qk_sniffer.capture.gather import DeviceCopiers, Heads, TokenIndices, send, take
from qk_sniffer.capture.sampling import Picks, Sampler
from qk_sniffer.config import SamplerConfig
from qk_sniffer.store.compact import compact
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import LIST_PATH, Head, Layout
from qk_sniffer.store.rows import Rows, RowTokens

HEADS, HEAD_DIM, EXAMPLES, TOKENS = 12, 64, 128, 1024
ROUNDS = 5


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(work: Callable[[], object]) -> float:
    before = cpu_s()
    work()
    return cpu_s() - before


def read_through(path: Path, take: Callable[[memoryview], object]) -> None:
    """Passes the bytes of the file to `take`, in pieces that stay in the processor's cache."""
    chunk = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            take(chunk[:count])


def put(writer: JournalWriter, index: int, vectors: torch.Tensor) -> None:
    """Gathers all of `vectors` (HEADS, TOKENS, HEAD_DIM) into the journal, as a job does."""
    row, position = np.zeros(TOKENS, np.int32), np.arange(TOKENS, dtype=np.int32)
    sent = send({"q": TokenIndices.of(Picks(row, position), vectors.device)}, vectors.device)["q"]
    tokens = RowTokens(np.full(TOKENS, index), position)
    with writer.reserve(Rows(0, "q", HEADS, HEAD_DIM, vectors.dtype, tokens)) as slot:
        write = partial(take, vectors[None], Heads(range(HEADS)), sent)
        writer.commit(slot, DeviceCopiers().fill(slot.vectors, vectors.device, write))


def main() -> None:
    dtype = getattr(torch, sys.argv[1])
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        layout, journal = Layout(Path(folder)), Journal(Path(folder) / "journal")
        shape = (HEADS, TOKENS, HEAD_DIM)
        captured = [torch.randn(shape, generator=generator).to(dtype) for _ in range(EXAMPLES)]
        with JournalWriter(journal, queue_bytes=1 << 26, segment_bytes=1 << 25) as writer:
            start = time.perf_counter()
            for index, vectors in enumerate(captured):
                put(writer, index, vectors)
                writer.complete([ExampleRecord(index, index, str(index), TOKENS, False, "")])
        journal_mb_s = writer.bytes_written / (time.perf_counter() - start) / 1e6
        parts = [vectors.float().numpy() for vectors in captured]
        heads = [Head(0, head, "q", head, HEAD_DIM, None, head) for head in range(HEADS)]
        sampler = Sampler(SamplerConfig(type="all"))

        def ours() -> None:
            found = Journal(journal.folder, verify=False)  # so that `compact` compares the checksums each time
            compact(layout, [found], heads, sampler, threads=1)  # threads that share a core take more CPU each

        ours()
        files = [layout.staging.head_file(0, head, "q") for head in range(HEADS)]
        arrays = [np.concatenate([part[head] for part in parts]) for head in range(HEADS)]
        size = sum(file.stat().st_size for file in files) / sum(array.nbytes for array in arrays)
        schema = pq.read_schema(files[0])
        columns = {
            name: np.concatenate([pq.read_table(files[0])[name]]) for name in ("bucket", "example_id", "position")
        }

        def bare() -> None:
            for head, array in enumerate(arrays):
                vector = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), HEAD_DIM)
                window = pa.nulls(len(array), pa.int32())
                table = pa.table(
                    [columns["bucket"], columns["example_id"], columns["position"], vector, window], schema=schema
                )
                pq.write_table(
                    table,
                    Path(folder) / f"{head}.parquet",
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=["bucket", "example_id", "position", "sliding_window"],
                    column_encoding={"vector" + LIST_PATH: "BYTE_STREAM_SPLIT"},
                    write_statistics=False,
                )

        def overhead() -> None:
            for take in (xxhash.xxh3_64().update, lambda chunk: None):  # once for the checksum, once for the rows
                for path in journal.segments:
                    read_through(path, take)
            for path in Path(folder).glob("*.parquet"):
                read_through(path, hashlib.sha256().update)

        bare()  # the first call of either loads parts of pyarrow
        taken: dict[str, list[float]] = {"ours_s": [], "bare_s": [], "overhead_s": []}
        for _ in range(ROUNDS):
            for key, work in zip(taken, (ours, bare, overhead), strict=True):
                if work is not overhead:  # it reads the files that `bare` writes
                    shutil.rmtree(layout.staging.root, ignore_errors=True)
                    for path in Path(folder).glob("*.parquet"):
                        path.unlink()
                taken[key].append(timed(work))
        found = {key: statistics.median(values) for key, values in taken.items()}
        print(json.dumps(found | {"size": size, "journal_mb_s": journal_mb_s}))


if __name__ == "__main__":
    main()
