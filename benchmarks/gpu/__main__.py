"""Measures and checks capture on one GPU: cost, vectors, attention, whole jobs, and batches of many lengths.

    bash benchmarks/gpu.sh [FOLDER OF WHEELS] [--minutes 6] [--out FOLDER] [--folder FOLDER] [--device cpu] [--tiny]

The production case comes first. gpu.json and gpu.md in `--out` are written again after every row. The exit code is 1 if
something is wrong: vectors, attention, a proof, a part that fails, or a pass that waits for the device because of us.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine

from gpu.attention import check_attention
from gpu.bench import LONGEST, Bench
from gpu.capturing import WAYS
from gpu.cost import measure_cost, measure_disk
from gpu.jobs import check_jobs
from gpu.lengths import measure_lengths
from gpu.results import Budget, LeftOutError, Results
from gpu.vectors import check_accesses, check_vectors

MOST_BYTES = 30_000_000_000
"""The most bytes that a run writes."""
MEMORY_FOLDER, LEAST_FREE = Path("/dev/shm"), 24 << 30
"""The default folder of journals, if it has so much room: the figures are then those of the path, not of a disk."""

SMALL, LARGE = "Qwen3-0.6B", "Qwen3-8B"
Part = tuple[str, float, Callable[[Bench], None]]
PARTS: tuple[Part, ...] = (
    (
        "the production case",
        40,
        partial(measure_cost, shape=LARGE, length=LONGEST, ways=("uniform",), seconds=75, rounds=3),
    ),
    ("vectors", 5, partial(check_vectors, shape=LARGE)),
    ("attention", 15, check_attention),
    (
        "the cost of 4,096 tokens",
        20,
        partial(measure_cost, shape=LARGE, length=4096, ways=(*WAYS,), seconds=40, rounds=3),
    ),
    ("jobs", 30, check_jobs),
    ("batches of many lengths", 15, partial(measure_lengths, shape=LARGE)),
    ("accesses", 15, check_accesses),
    (
        "the cost of a small model",
        10,
        partial(measure_cost, shape=SMALL, length=4096, ways=("uniform", "all"), seconds=20, rounds=3),
    ),
    (
        "the cost of 32,768 tokens",
        15,
        partial(
            measure_cost, shape=LARGE, length=32_768, ways=("uniform", "summaries", "statistics"), seconds=30, rounds=2
        ),
    ),
    ("journals", 10, partial(measure_disk, shape=LARGE, length=4096)),
    (
        "the cost of all vectors of 131,072 tokens",
        50,
        partial(measure_cost, shape=LARGE, length=LONGEST, ways=("statistics", "all"), seconds=50),
    ),
)
"""What a run does, in this order, with the least seconds that must be left at the start of a part."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="starts no further measurement after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json and gpu.md")
    parser.add_argument("--folder", type=Path, help=f"folder of the journals; default: {MEMORY_FOLDER} if it has room")
    parser.add_argument("--device", default="cuda", help="cpu leaves out what needs CUDA")
    parser.add_argument("--tiny", action="store_true", help="tries the programs with tiny models and texts")
    given = parser.parse_args()
    device = torch.device(given.device)
    folder = given.folder or _default_folder()
    budget = Budget(minutes=given.minutes, nbytes=MOST_BYTES)
    results = Results(given.out, _facts(device) | {"journals in": str(folder)} | machine())
    bench = Bench(device, given.tiny, folder, budget, results)
    if device.type != "cuda":
        results.leave_out("device times, waits, peaks, cuDNN", "they need CUDA; device times are those of the host")
    for name, least_s, measure in PARTS:
        if budget.seconds_left < (0 if given.tiny else least_s):
            results.leave_out(name, f"it needs {least_s:.0f} s, and {max(0.0, budget.seconds_left):.0f} s are left")
            continue
        start = time.monotonic()
        try:
            measure(bench)
        except LeftOutError as error:
            results.leave_out(name, str(error))
        except Exception as error:  # the other parts are worth their time
            traceback.print_exc()
            results.fail(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return 1 if results.failures else 0


def _default_folder() -> Path:
    if MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free >= LEAST_FREE:
        return MEMORY_FOLDER
    return Path(tempfile.gettempdir())


def _facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type, "driver": None, "CUDA": None, "cuDNN": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(device).total_memory
    facts = {"device": f"{name}, {memory / 2**30:.0f} GiB", "driver": driver}
    return facts | {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}


if __name__ == "__main__":
    sys.exit(main())
