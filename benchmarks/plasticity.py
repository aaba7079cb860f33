"""Measures the heads per CPU second of the plasticity program at two sizes, and compares them with bars.

The bars are those of heads without intervals; the same heads with intervals are measured next to them.

Writes two datasets of random heads in the layout of real ones, the second with twice the heads of the first. Each is
measured by a process of its own. The difference between the two is the cost of the heads alone, without the start, the
imports and pictures. CPU seconds are the user and system time of all threads. The figure is the median of the rounds.

python benchmarks/plasticity.py [--rounds 5]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
from common import RESULTS, ROOT, in_turn, machine

from qk_sniffer.config import Config
from qk_sniffer.store.layout import FORMAT, Layout, head_file, schema
from qk_sniffer.store.parquet_writer import ParquetWriter

QUERY_HEADS_OF_A_KEY_HEAD = 4
EXAMPLES = 100
REPLICATES = 200


@dataclass(frozen=True)
class Size:
    """The rows and dimensions of each head. `bar` is the least number of heads per CPU second."""

    rows: int
    dims: int
    heads: int
    bar: float

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.dims}"


SIZES = (Size(3000, 16, 160, 25.0), Size(50_000, 128, 16, 1.0))


def write_dataset(root: Path, size: Size, heads: int) -> Path:
    """Writes a dataset of one layer whose vectors drift with their position. It has 16 uniform buckets of 512."""
    random = np.random.default_rng(0)
    config = Config().to_dict()
    config["sampler"] |= {"type": "uniform", "min_bucket_size": 512}
    config["model"]["slug"] = config["dataset"]["slug"] = "random"
    layer = {
        "layer": 0,
        "num_q_heads": heads,
        "num_k_heads": heads // QUERY_HEADS_OF_A_KEY_HEAD,
        "head_dim": size.dims,
        "sliding_window": None,
        "softmax_scale": 1.0,
        "captured": {"q": list(range(heads)), "k": list(range(heads // QUERY_HEADS_OF_A_KEY_HEAD))},
    }
    examples = np.repeat(np.arange(EXAMPLES, dtype=np.int32), size.rows // EXAMPLES)
    files = {}
    for kind, numbers in layer["captured"].items():
        for head in numbers:
            positions = np.sort(random.integers(0, 8192, (EXAMPLES, size.rows // EXAMPLES)), axis=1).ravel()
            vectors = random.normal(size=(size.rows, size.dims)) + np.outer(
                positions / 8192, random.normal(size=size.dims)
            )
            path = Layout(root).head_file(0, head, kind)
            with ParquetWriter(path, schema(size.dims)) as file:
                columns = [
                    pa.array(positions // 512, pa.int32()),
                    pa.array(examples),
                    pa.array(positions, pa.int32()),
                    pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), size.dims),
                    pa.nulls(size.rows, pa.int32()),
                ]
                file.write(pa.table(columns, schema=schema(size.dims)))
            assert file.entry is not None
            entry = {"rows": size.rows, "bytes": file.entry.size, "sha256": file.entry.sha256}
            files[head_file(0, head, kind)] = entry
    manifest = {
        "format": FORMAT,
        "config": config,
        "fingerprint": {"model.name": "benchmark"},
        "commits": {"model": "benchmark"},
        "files": files,
        "model": {"layers": [layer], "rope_stage": "post", "dtype": "float32"},
        "rows": 0,
    }
    Layout(root).manifest.write_text(json.dumps(manifest))
    return root


def cpu_s(root: Path, output: Path, replicates: int) -> float:
    """Returns the user and system seconds of a run without pictures."""
    command = [sys.executable, "-m", "qk_sniffer.plasticity", f"data_root={root}", f"output_dir={output}"]
    command.append(f"replicates={replicates}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "pictures=false", f"hydra.run.dir={output}.run"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return used.ru_utime + used.ru_stime


def heads_per_cpu_s(size: Size, rounds: int, folder: Path, replicates: int) -> dict[str, float | list[float]]:
    """Measures both datasets alternately."""
    folder = folder / f"{size.rows}-{replicates}"
    roots = {heads: write_dataset(folder / str(heads), size, heads) for heads in (size.heads // 2, size.heads)}
    runs = iter(range(10**6))
    measures = {
        str(heads): lambda root=root: cpu_s(root, folder / f"out-{next(runs)}", replicates)
        for heads, root in roots.items()
    }
    taken = in_turn(rounds, measures)
    few, many = (taken[str(heads)] for heads in roots)
    each = [(b - a) / (size.heads - size.heads // 2) for a, b in zip(few, many, strict=True)]
    return {"heads_per_cpu_s": 1 / median(each), "cpu_s_a_head": each, "bar": size.bar}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            measured = heads_per_cpu_s(size, rounds, Path(folder), 0)
            found[size.name] = measured
            met = "met" if measured["heads_per_cpu_s"] >= size.bar else "NOT met"
            print(
                f"{size.name:>12}  {measured['heads_per_cpu_s']:6.1f} heads per CPU s  bar {size.bar:g}: {met}",
                flush=True,
            )
            measured = heads_per_cpu_s(size, rounds, Path(folder), REPLICATES)
            del measured["bar"]
            found[f"{size.name}, intervals"] = measured
            print(f"{size.name:>12}  {measured['heads_per_cpu_s']:6.1f} with intervals", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plasticity.json").write_text(json.dumps(machine() | {"found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
