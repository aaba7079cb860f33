"""Measures the rate at which rows become durable in the journal, by the number of its threads, next to `dd`.

The rows are those of one kind of layer of an 8B model in texts of 4,096 tokens, with every row kept. They are in the
buffer already, as copies from a GPU would be, so a figure is that of the disk and of the threads alone. `dd` writes as
many bytes with `conv=fsync`. All take turns. Prints, for each folder, medians over the rounds: GB/s (of 10^9 bytes),
GB in a second of CPU time, and the cores in use. On a machine with other work, GB/s depend on the cores that this work
leaves, and GB in a CPU second show whether more threads cost more.

python benchmarks/journal.py FOLDER [FOLDER ...] [--rounds 5] [--mb 1024] [--threads 1 2 4]
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from common import machine

from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.rows import Rows, RowTokens

LAYERS, HEADS, HEAD_DIM, TOKENS = 36, 32, 128, 4096
QUEUE, SEGMENT = 512 << 20, 128 << 20

Figures = dict[str, float]


def rows(index: int) -> Rows:
    position = np.arange(TOKENS, dtype=np.int32)
    return Rows(index % LAYERS, "q", HEADS, HEAD_DIM, torch.bfloat16, RowTokens(np.full(TOKENS, index), position))


def figures(size: int, wall_s: float, used_s: float) -> Figures:
    return {"gb_s": size / wall_s / 1e9, "gb_cpu_s": size / used_s / 1e9, "cores": used_s / wall_s}


def journal(folder: Path, size: int, threads: int) -> Figures:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        writer = JournalWriter(Journal(Path(name)), queue_bytes=QUEUE, segment_bytes=SEGMENT, threads=threads)
        with ExitStack() as warm:  # every page of the buffer has been written to
            for _ in range(QUEUE // rows(0).nbytes):
                warm.enter_context(writer.reserve(rows(0))).vectors.normal_()
        start, used = time.perf_counter(), time.process_time()
        with writer:
            for index in range(size // rows(0).nbytes):
                with writer.reserve(rows(index)) as slot:
                    writer.commit(slot, None)
                writer.complete([ExampleRecord(index, index, str(index), TOKENS, False, "")])
        return figures(writer.bytes_written, time.perf_counter() - start, time.process_time() - used)


def dd(folder: Path, size: int) -> Figures:
    file = folder / f"dd-{os.getpid()}"
    start, used = time.perf_counter(), os.times()
    command = ["dd", "if=/dev/zero", f"of={file}", "bs=4M", f"count={size >> 22}", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)
    wall_s, now = time.perf_counter() - start, os.times()
    file.unlink()
    used_s = now.children_user + now.children_system - used.children_user - used.children_system
    return figures(size >> 22 << 22, wall_s, used_s)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4])
    given = parser.parse_args()
    for folder in given.folders:
        taken: dict[str, list[Figures]] = {}
        for _ in range(given.rounds):
            for threads in given.threads:
                taken.setdefault(str(threads), []).append(journal(folder, given.mb << 20, threads))
            taken.setdefault("dd", []).append(dd(folder, given.mb << 20))
        middle = {
            name: {key: statistics.median(each[key] for each in found) for key in found[0]}
            for name, found in taken.items()
        }
        first, plain = middle[str(given.threads[0])]["gb_s"], middle["dd"]["gb_s"]
        for found in middle.values():
            found |= {"over_first": found["gb_s"] / first, "over_dd": found["gb_s"] / plain}
        print(json.dumps({"folder": str(folder), "medians": middle, "rounds": taken} | machine()))


if __name__ == "__main__":
    main()
