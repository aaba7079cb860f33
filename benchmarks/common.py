"""Serves all benchmarks: makes texts and a model of a real shape, times processes, and describes the machine."""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
EMBEDDED_MODEL = ROOT / "qk_sniffer" / "assets" / "pydoc_tiny"
WINDOW = 512
CHARACTERS_PER_TOKEN = 6
"""Makes each text long enough to be cut to the wanted number of tokens."""

CHARACTERS_OF_SHORT = 2.7
"""Characters of a token of a short text, which begins with its number."""


def write_texts(path: Path, examples: int, tokens: int, *, shortest: int | None = None) -> Path:
    """Writes distinct texts of at least `tokens` tokens each: windows of the documentation, which repeats as needed.

    With `shortest`, they have about `shortest` to 2 `tokens` - `shortest` tokens instead, in turn.
    """
    corpus = "\n\n".join(topics.values())
    width = tokens * CHARACTERS_PER_TOKEN
    corpus *= 1 + width // len(corpus)
    step = (len(corpus) - width) / examples
    with path.open("w", encoding="utf-8") as file:
        for number in range(examples):
            start = int(number * step)
            if shortest is not None:
                width = int((shortest + number % (2 * (tokens - shortest) + 1)) * CHARACTERS_OF_SHORT)
            file.write(json.dumps({"text": f"{number}. {corpus[start : start + width]}"}) + "\n")
    return path


def smollm2_config(**changes: Any) -> Any:
    """Returns the config of SmolLM2-135M's shape."""
    from transformers import LlamaConfig

    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }
    return LlamaConfig(**shape | changes)


def smollm2_shape(folder: Path, **changes: Any) -> Path:
    """Writes a checkpoint of SmolLM2-135M's shape: random weights, and the tokenizer of the embedded model."""
    import torch
    from transformers import LlamaModel

    torch.manual_seed(0)
    LlamaModel(smollm2_config(**changes)).save_pretrained(folder)
    for file in EMBEDDED_MODEL.glob("token*"):
        shutil.copy(file, folder)
    return folder


def sliding_qwen3(length: int, **sizes: int) -> Any:
    """Returns the config of a decoder of these sizes. Every layer has a sliding window of `WINDOW` tokens."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=4096,
        max_position_embeddings=length,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=0,
        layer_types=["sliding_attention"] * sizes["num_hidden_layers"],
        attn_implementation="sdpa",
        **sizes,
    )


def job(model: Path, texts: Path, tokens: int, root: Path, *settings: str) -> list[str]:
    """Returns the command of a job that writes its dataset to `root` and replaces an earlier one."""
    return [
        *(sys.executable, "-m", "qk_sniffer", "model=hf", f"model.name={model}", "model.dtype=float32"),
        *(f"model.tokenizer.max_length={tokens}", "dataset=hf", f"dataset.path={texts}", "verify.examples=0"),
        *(f"output.data_root={root}", "output.overwrite=true", f"hydra.run.dir={root}.run", *settings),
    ]


def wall_s(command: list[str]) -> float:
    """Returns the seconds from the start of a process to its end."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - start


def cpu_s(command: list[str]) -> float:
    """Returns the CPU seconds of a process, over all of its threads."""

    def so_far() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = so_far()
    wall_s(command)
    return so_far() - before


def in_turn(rounds: int, measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Returns the figures of each measure. The measures alternate (A B A B): a noisy minute disturbs all of them."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            taken[name].append(measure())
    return taken


def medians(taken: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in taken.items()}


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of the libraries, for every file of results."""
    names = ("torch", "transformers", "pyarrow", "numpy", "datasets")
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # images for GPUs lack some of them
        return None
