"""Runs whole jobs on saved models: checks their proofs, and compares float32 on the device with float32 on the CPU."""

import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import EMBEDDED_MODEL, write_texts
from transformers import AutoTokenizer, Qwen3Config

from gpu.bench import SHAPES, Bench, made
from gpu.capturing import make_room
from qk_sniffer.config import from_dict
from qk_sniffer.dataset.reader import Dataset, open_dataset
from qk_sniffer.jobs import finish
from qk_sniffer.jobs.run import run_job

TOLERANCE = 1e-3
"""The largest difference, norm over norm, that float32 explains."""
TEXTS, TOKENS = 12, 1024
LAYERS = [0, 2]
"""One with a sliding window, and one with full attention."""
SAVED_LAYERS = 4
MOST_BYTES = 1 << 30
"""More than all jobs write."""


@dataclass(frozen=True)
class Job:
    name: str
    dtype: str
    settings: dict[str, Any]
    compared: bool = True
    """Whether it also runs on the CPU. If not, its model is one of the size of a real one in a layer."""


JOBS = (
    Job(
        "statistics, summaries",
        "float32",
        {
            "sampler": {"type": "uniform", "min_bucket_size": 32},
            "capture": {
                "layers": LAYERS,
                "statistics": {"enabled": True, "stages": ["pre", "post"]},
                "attention": {"enabled": True, "top_k": 4},
            },
        },
    ),
    Job(
        "before RoPE", "float32", {"sampler": {"type": "all"}, "capture": {"capture_pre_rope": True, "layers": LAYERS}}
    ),
    Job("large layers", "bfloat16", {"sampler": {"type": "all"}, "capture": {"layers": [0, 3]}}, compared=False),
)


def check_jobs(bench: Bench) -> None:
    """Adds a row for each job, with the outcome of its proof."""
    make_room(bench, MOST_BYTES)
    torch.set_float32_matmul_precision("highest")  # no TF32
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        folder = Path(temporary)
        texts = write_texts(folder / "texts.jsonl", 2 if bench.tiny else TEXTS, bench.tokens(TOKENS))
        for number, job in enumerate(JOBS):
            checkpoint = EMBEDDED_MODEL if job.compared else _saved(folder / "model", bench)
            made_on = {}
            for place in ("auto", "cpu") if job.compared else ("auto",):
                bench.budget.need_time()
                root = folder / f"{number}-{place}"
                seconds = _run(bench, job, checkpoint, texts, root, place)
                made_on[place] = open_dataset(root)
                row = {"job": job.name, "dtype": job.dtype, "device": _device(bench) if place == "auto" else "cpu"}
                manifest = made_on[place].manifest
                proof = _outcome(manifest["proof"])
                row |= {"rows": manifest["rows"], "seconds": seconds, "proof": proof}
                differs = max(differences(made_on["auto"], made_on["cpu"]).values()) if place == "cpu" else None
                bench.results.add("Jobs", row | {"differs from the device by": differs})
                if proof != "proven":
                    bench.results.fail(f"job {job.name} on {row['device']}: {proof}")
                if differs is not None and not differs <= TOLERANCE:
                    bench.results.fail(f"job {job.name}: {_device(bench)} and CPU differ by {differs:.3g}")


def _device(bench: Bench) -> str:
    return bench.device.type


def _saved(folder: Path, bench: Bench) -> Path:
    """Saves a model with some layers of the size of Qwen3-0.6B's, and the tokenizer of the embedded model."""
    for file in EMBEDDED_MODEL.glob("token*"):
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    shape = SHAPES["tiny" if bench.tiny else "Qwen3-0.6B"]
    sizes = {"num_hidden_layers": SAVED_LAYERS, "vocab_size": len(AutoTokenizer.from_pretrained(folder))}
    torch.manual_seed(0)
    made(Qwen3Config(**shape | sizes), torch.device("cpu"), torch.bfloat16).save_pretrained(folder)
    return folder


def _run(bench: Bench, job: Job, checkpoint: Path, texts: Path, root: Path, place: str) -> float:
    """Runs a job without its words on the terminal; returns its seconds."""
    place = place if bench.device.type == "cuda" else "cpu"
    model = {"name": str(checkpoint), "dtype": job.dtype, "device_map": place}
    settings = {
        "model": model | {"tokenizer": {"max_length": bench.tokens(TOKENS)}},
        "dataset": {"path": str(texts)},
        "output": {"data_root": str(root)},
    }
    start = time.perf_counter()
    # Pictures take longer than all else of a job over so few texts.
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(finish, "draw_pictures"):
        run_job(from_dict(settings | job.settings))
    return time.perf_counter() - start


def _outcome(proof: dict[str, Any]) -> str:
    """Returns "proven", or what is not."""
    if proof["proven"] is not True:
        return f"not proven: {proof.get('reason') or json.dumps(proof.get('largest_difference_by_layer'))}"
    for part in ("statistics", "summaries"):
        if "reason" in proof.get(part, {}):
            return f"{part} are not proven: {proof[part]['reason']}"
    unchecked = [check["kind"] for check in proof["attention"] if check["passed"] is not True]
    return f"attention is not checked: {', '.join(unchecked)}" if unchecked or not proof["attention"] else "proven"


def differences(ours: Dataset, others: Dataset) -> dict[str, float]:
    """Returns the largest difference of each table of two datasets, norm over norm; infinite if rows differ."""
    if ours.heads != others.heads:
        return {"heads": float("inf")}
    found: dict[str, float] = {}
    for table, mine, theirs in _pairs(ours, others):
        same = mine.shape == theirs.shape and bool(np.array_equal(np.isnan(mine), np.isnan(theirs)))
        off = _distance(np.nan_to_num(mine), np.nan_to_num(theirs)) if same else float("inf")
        found[table] = max(found.get(table, 0.0), off)
    return found


def _distance(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest distance of two rows, over the norm of one. Rows of tiny norm count by the largest norm."""
    mine, theirs = (values.reshape(len(values), -1).astype(np.float64) for values in (mine, theirs))
    norms = np.linalg.norm(theirs, axis=1)
    least = 1e-3 * norms.max(initial=0.0) or 1.0
    return float((np.linalg.norm(mine - theirs, axis=1) / np.maximum(norms, least)).max(initial=0.0))


def _pairs(ours: Dataset, others: Dataset) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields tables (rows, numbers) of both datasets by name."""
    for layer, head, kind in ours.heads:
        mine, theirs = (dataset.vectors(layer, head, kind) for dataset in (ours, others))
        for name, first, second in zip(("vectors", "positions", "examples"), mine, theirs, strict=True):
            yield name, first, second
        if kind == "q" and ours.manifest["config"]["capture"]["attention"]["enabled"]:
            for name in ("logsumexp", "entropy", "distance_mass", "top_weight"):
                yield name, *(getattr(one.attention_summary(layer, head), name) for one in (ours, others))
    for layer in sorted({key.layer for key in ours.heads}) if ours.stages else ():
        for kind, stage in ((kind, stage) for kind in "qk" for stage in ours.stages):
            mine, theirs = (dataset.statistics(layer, kind, stage) for dataset in (ours, others))
            for name in (one.name for one in fields(mine)):
                first, second = getattr(mine, name), getattr(theirs, name)
                if isinstance(first, np.ndarray):
                    yield name, first, second
