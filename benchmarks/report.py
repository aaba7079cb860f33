"""Measures the time and the size of the report of a dataset with a thousand heads.

The dataset is one of the embedded model whose manifest gets more and wider heads, with files of random vectors: no
model of a thousand heads runs. Run it as `python benchmarks/report.py`.
"""

import copy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from qk_sniffer.dataset.heads import captured_heads
from qk_sniffer.dataset.reader import sampler_of
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout, head_file, schema
from qk_sniffer.store.parquet_tables import read_examples
from qk_sniffer.store.parquet_writer import ParquetWriter

LAYERS, QUERIES, KEYS, WIDTH = 32, 24, 8, 128


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "thousand"
        capture = [sys.executable, "-m", "qk_sniffer", "sampler=uniform", "sampler.base_rate=32", "verify.examples=0"]
        subprocess.run([*capture, f"output.data_root={root}"], check=True, cwd=folder)
        size = widened(root)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "qk_sniffer.report", f"data_root={root}"], check=True, cwd=folder)
        seconds = time.perf_counter() - start
        page = root.with_name("thousand-report.html").stat().st_size
        print(
            f"{LAYERS * (QUERIES + KEYS):,} heads, {size / 1e9:.2f} GB: {seconds:.1f} s, a page of {page / 1e6:.2f} MB"
        )


def widened(root: Path) -> int:
    """Replaces the heads of a dataset by more and wider ones with random vectors; returns the bytes of its files."""
    manifest = manifests.read(root)
    layers = []
    for number in range(LAYERS):
        layer = copy.deepcopy(manifest["model"]["layers"][number % len(manifest["model"]["layers"])])
        layers.append(
            layer
            | {"layer": number, "num_q_heads": QUERIES, "num_k_heads": KEYS, "head_dim": WIDTH, "value_dim": WIDTH}
            | {"output_dim": WIDTH, "key_head": [head * KEYS // QUERIES for head in range(QUERIES)], "rotation": None}
            | {"captured": {"q": [*range(QUERIES)], "k": [*range(KEYS)]}}
        )
    manifest["model"] |= {"layers": layers, "num_layers": LAYERS}
    examples = read_examples(Layout(root).examples, manifest, way_out="")
    ids, lengths = examples["example_id"].to_pylist(), examples["num_tokens"].to_pylist()
    sampler, random = sampler_of(manifest), np.random.default_rng(0)
    files = {name: entry for name, entry in manifest["files"].items() if not name.startswith("l")}
    by_bucket: dict[str, dict[str, int]] = {"q": {}, "k": {}}
    for head in captured_heads(manifest):
        picked = [
            sampler.positions(one, head.layer, head.kind, length) for one, length in zip(ids, lengths, strict=True)
        ]
        positions = np.concatenate(picked)
        buckets = sampler.bucket(head.kind, positions)
        vectors = random.standard_normal((len(positions), WIDTH), np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        columns = {
            "bucket": buckets,
            "example_id": np.repeat(np.array(ids, np.int32), [*map(len, picked)]),
            "position": positions,
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.view(np.float32).ravel()), WIDTH),
            "sliding_window": pa.array([head.sliding_window] * len(positions), pa.int32()),
        }
        with ParquetWriter(Layout(root).head_file(*head.key), schema(WIDTH)) as file:
            file.write(pa.table(columns, schema=schema(WIDTH)))
        assert file.entry is not None
        files[head_file(*head.key)] = {"rows": file.entry.rows, "bytes": file.entry.size, "sha256": file.entry.sha256}
        for bucket, rows in zip(*np.unique(buckets, return_counts=True), strict=True):
            of_kind = by_bucket[head.kind]
            of_kind[str(bucket)] = of_kind.get(str(bucket), 0) + int(rows)
    manifest |= {"files": files, "rows_by_bucket": by_bucket, "nonfinite_rows": {}}
    manifest["rows"] = sum(sum(buckets.values()) for buckets in by_bucket.values())
    manifests.write(Layout(root), manifest)
    return sum(entry["bytes"] for entry in files.values())


if __name__ == "__main__":
    main()
