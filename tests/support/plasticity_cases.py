"""Measures datasets, reads results and changes datasets for the tests of plasticity."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.config import EstimatorConfig, PlasticityConfig, problems, resolved
from qk_sniffer.plasticity.run import run
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout, schema
from qk_sniffer.store.manifest import FileEntry

ALL_PAIRS = 10**6
"""More pairs than any bucket of these tests has: the program takes all pairs and draws none."""


def measure(root: Path, folder: Path, **settings: Any) -> int:
    """Returns the exit code of a run without pictures, with few replicates. The regression takes all pairs of keys."""
    pairs = 1000 if "estimator" in settings else ALL_PAIRS
    values = {"pictures": False, "num_pairs_per_bucket": pairs, "replicates": 20} | settings
    config = PlasticityConfig(data_root=str(root), output_dir=str(folder), **values)
    assert problems(config) == []
    return run(resolved(config))


def full_covariance(alpha: float) -> EstimatorConfig:
    return EstimatorConfig("full_covariance", alpha)


def metrics(folder: Path) -> dict[tuple[int, int], dict[str, float]]:
    """Returns the rows of head_metrics by layer and query head."""
    columns = tables.read(folder, "head_metrics")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {(int(row["layer"]), int(row["q_head"])): row for row in rows}


def buckets(folder: Path) -> dict[tuple[int, int], dict[tuple[int, int], float]]:
    """Returns ap_bucket by (query bucket, key bucket), by layer and query head."""
    columns = tables.read(folder, "head_bucket_plasticity")
    found: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    del columns["k_head"]
    for layer, head, b, c, value in zip(*columns.values(), strict=True):
        found.setdefault((int(layer), int(head)), {})[int(b), int(c)] = float(value)
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of the tables' files by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("head_*"))}


def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "plasticity.json").read_text())
    return values


def rewrite(root: Path, layer: int, head: int, kind: str, vectors: np.ndarray, positions: Any, examples: Any) -> None:
    """Replaces the rows of a head. The program does not read the columns of buckets and windows."""
    count, width = vectors.shape
    columns = {
        "bucket": np.zeros(count, np.int32),
        "example_id": np.asarray(examples, np.int32),
        "position": np.asarray(positions, np.int32),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), width),
        "sliding_window": pa.nulls(count, pa.int32()),
    }
    path = Layout(root).head_file(layer, head, kind)
    pq.write_table(pa.table(columns, schema=schema(width)), path)
    list_in_manifest(root, path)


def list_in_manifest(root: Path, path: Path) -> None:
    """Updates the entry of a changed file in the manifest of the dataset."""
    entry = FileEntry(pq.read_metadata(path).num_rows, path.stat().st_size, sha256(path.read_bytes()).hexdigest())
    manifests.write(
        Layout(root), manifests.with_files(manifests.read(root), {path.relative_to(root).as_posix(): entry})
    )


def program(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "qk_sniffer.plasticity", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment_of(**environment),
    )


def environment_of(**more: str) -> dict[str, str]:
    """Returns the environment of this process, with this checkout first on the path."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **more}
