"""Measures the memory of a job over time, to see whether its peak grows with the number of examples.

    python benchmarks/memory.py [--examples 64 1024] [--tokens 512] [--out benchmarks/results]

Runs the embedded model over texts of the Python documentation with `sampler=all`. Each job writes every vector of every
head durably to Parquet, in a process of its own. The numbers of examples alternate, `--rounds` times. Reads anonymous
memory (RssAnon of /proc) every 20 ms. Writes memory.json and memory.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, machine, write_texts

PERIOD_S = 0.02
SETTINGS = ["inference.queue_mb=32", "inference.segment_mb=16", "inference.max_batch_tokens=4096"]
"""Buffers and batches so small that the smallest job fills them several times. A job that does not fill its buffers
takes less memory, which says nothing about growth."""


def measured(examples: int, tokens: int, settings: list[str]) -> dict[str, Any]:
    """Runs one job and returns its anonymous memory in MB over time in seconds, and the size of its dataset."""
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder) / "texts.jsonl", examples, tokens)
        command = [sys.executable, "-m", "qk_sniffer", "dataset=hf", f"dataset.path={folder}/texts.jsonl"]
        command += ["sampler=all", f"model.tokenizer.max_length={tokens}", f"output.data_root={folder}/out", *settings]
        command += [f"hydra.run.dir={folder}/run", "verify.examples=0"]
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds, memory_mb = [], []
        while process.poll() is None:
            if (memory := anonymous_mb(process.pid)) is not None:
                seconds.append(round(time.monotonic() - start, 3))
                memory_mb.append(memory)
            time.sleep(PERIOD_S)
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(process.stderr.read())
        manifest = json.loads((Path(folder) / "out" / "manifest.json").read_text())
        size_mb = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    return {
        "examples": examples,
        "rows": manifest["rows"],
        "dataset_mb": round(size_mb, 1),
        "peak_mb": max(memory_mb),
        "seconds": seconds,
        "memory_mb": memory_mb,
    }


def anonymous_mb(pid: int) -> float | None:
    """Returns the RssAnon of a process in MB, or None if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return round(found[0] / 1024, 1) if found else None


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws memory over the share of each job's time, one line for each job."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    counts = sorted({run["examples"] for run in runs})
    for run in runs:
        color = ["#0072B2", "#D55E00", "#009E73"][counts.index(run["examples"]) % 3]
        share = [100 * second / run["seconds"][-1] for second in run["seconds"]]
        label = f"{run['examples']:,} examples, {run['dataset_mb']:,.0f} MB" if run in runs[: len(counts)] else None
        axes.plot(share, run["memory_mb"], color=color, linewidth=0.9, alpha=0.8, label=label)
    axes.set(xlabel="time of the job (%)", ylabel="anonymous memory (MB)", ylim=(0, None), xlim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("settings", nargs="*", default=SETTINGS, help="further settings of the jobs, key=value")
    arguments = parser.parse_args()
    runs = []
    for _ in range(arguments.rounds):
        for examples in arguments.examples:
            runs.append(measured(examples, arguments.tokens, arguments.settings))
            print(f"{examples:,} examples: peak {runs[-1]['peak_mb']:,.1f} MB", flush=True)
    peaks = {n: [run["peak_mb"] for run in runs if run["examples"] == n] for n in arguments.examples}
    medians = {n: statistics.median(values) for n, values in peaks.items()}
    ratio = medians[arguments.examples[-1]] / medians[arguments.examples[0]]
    print(f"median peaks (MB): {medians}; last over first: {ratio:.3f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {
        "what": "peak RssAnon in MB of a job with sampler=all, by number of examples",
        "peaks_mb": peaks,
        "ratio_of_medians": round(ratio, 4),
        "dataset_mb": {run["examples"]: run["dataset_mb"] for run in runs},
        "tokens_per_example": arguments.tokens,
        "settings": arguments.settings,
    } | machine()
    (arguments.out / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(runs, arguments.out / "memory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
