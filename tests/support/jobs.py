"""Runs jobs for tests over a tiny checkpoint and texts, and reads their datasets."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qk_sniffer.capture.capture import Capture
from qk_sniffer.config import from_dict
from qk_sniffer.jobs.run import run_job
from support.tiny import ALPHABET
from support.zoo import CASES

QWEN3 = next(case for case in CASES if case.name == "qwen3_sliding")
TEXTS = [("".join(ALPHABET) * 3)[i : i + 20 + 13 * i % 97] for i in range(24)]


def write_texts(path: Path) -> Path:
    """Writes `TEXTS` to a jsonl file, with ids."""
    lines = [json.dumps({"text": text, "id": f"doc-{i}"}) + "\n" for i, text in enumerate(TEXTS)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def settings(checkpoint: Path, texts: Path, root: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The settings of a job over `texts` that keeps every row, overridden by `sections`."""
    values: dict[str, Any] = {
        "model": {"name": str(checkpoint), "dtype": "float32"},
        "dataset": {"path": str(texts)},
        "sampler": {"type": "all", "min_bucket_size": 16},
        "output": {"data_root": str(root)},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return values


def run(checkpoint: Path, texts: Path, root: Path, **sections: dict[str, Any]) -> Path:
    run_job(from_dict(settings(checkpoint, texts, root, **sections)))
    return root


def heads_of(root: Path) -> dict[str, pa.Table]:
    return {path.parent.name: pq.read_table(path) for path in sorted(root.glob("l*h*/data.parquet"))}


def vectors(table: pa.Table) -> np.ndarray:
    column = table["vector"].combine_chunks()
    flat: np.ndarray = column.flatten().to_numpy()
    return flat.reshape(len(table), -1)


def keys(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["example_id"].to_pylist(), table["position"].to_pylist(), strict=True))


def hashes(root: Path) -> dict[str, str]:
    """The sha256 of every file of a dataset, by name, without leftovers of the job, the manifest and the pictures."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and not {".qk_sniffer", "pictures"} & {*path.parts}
    }


def tokens_of(text: str) -> torch.Tensor:
    return torch.tensor([[1 + ALPHABET.index(character) for character in text]])


class Stopped(BaseException):
    """Simulates the end of a process in the middle of its work."""


def stop_at(index: int, plan: Any, capture: Any, real: Any) -> None:
    if any(example.index == index for example in plan.examples):
        raise Stopped
    real(capture, plan)


def stopped_after(batches: int, checkpoint: Path, texts: Path, root: Path, **sections: Any) -> None:
    """Runs a job that ends in the middle of its capture."""
    real, ran = Capture.run, []

    def stop(self: Capture, plan: Any) -> None:
        if len(ran) == batches:
            raise Stopped
        ran.append(plan)
        real(self, plan)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Capture, "run", stop)
        run(checkpoint, texts, root, **sections)


def captured_only(checkpoint: Path, texts: Path, root: Path, patch: pytest.MonkeyPatch, **sections: Any) -> None:
    """Runs a job that ends when its journal is complete, before it makes the dataset."""

    def fail(*_: Any) -> bool:
        raise Stopped

    with patch.context() as inside, pytest.raises(Stopped):
        inside.setattr("qk_sniffer.jobs.run.finish", fail)
        run(checkpoint, texts, root, **sections)


def together(jobs: list[dict[str, Any]]) -> list[int]:
    """Starts jobs in the same moment, each in its own process; returns their exit codes."""
    code = "import json, sys; from qk_sniffer.config import from_dict; from qk_sniffer.jobs.run import run_job; "
    code += "print('ready', flush=True); sys.stdin.readline(); run_job(from_dict(json.loads(sys.argv[1])))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for job in jobs
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    return [process.returncode for process in processes]
