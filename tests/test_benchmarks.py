"""Runs the benchmark for GPUs on a CPU, with tiny models, and shows that the checks of benchmarks can fail."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.numpy import load_file, save_file
from support.export_cases import statistics
from transformers import AutoTokenizer

import qk_sniffer
from qk_sniffer.capture import row_writer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package of the benchmark, with its modules."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    for name in ("attention", "bench", "jobs", "results", "vectors"):
        importlib.import_module(f"gpu.{name}")
    return gpu


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("peers")


def tiny_bench(gpu: ModuleType, folder: Path, **budget: Any) -> Any:
    results = gpu.results.Results(folder / "out", {})
    budget = {"minutes": 5, "nbytes": 1 << 30} | budget
    return gpu.bench.Bench(torch.device("cpu"), True, folder, gpu.results.Budget(**budget), results)


@pytest.mark.parametrize("seen", [32, 33, 31])
def test_a_key_too_many_or_too_few_is_wrong_attention(gpu: ModuleType, seen: int) -> None:
    case = gpu.attention.Case(257, 16, 4, 2, 32)
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, case.tokens, 16) for heads in (4, 2, 2))
    query *= gpu.attention.LOGITS
    apart = torch.arange(case.tokens)[:, None] - torch.arange(case.tokens)
    output = F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=(apart >= 0) & (apart < seen), enable_gqa=True
    )[0].transpose(0, 1)
    off = gpu.attention.difference(query, key, value, output, case)
    assert off < 1e-5 if seen == case.window else off > gpu.attention.TOLERANCE
    assert len(gpu.attention.rows_to_check(case)) == 8


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_changed_bit_of_a_vector_fails_the_run(
    gpu: ModuleType, is_wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another_bit(states: torch.Tensor, *rest: Any) -> None:
        take(states, *rest)
        rest[-1].view(torch.int16)[0, 0, 0] ^= 1

    take = row_writer.take
    if is_wrong:
        monkeypatch.setattr(row_writer, "take", with_another_bit)
    bench = tiny_bench(gpu, tmp_path)
    gpu.vectors.check_vectors(bench, "Qwen3-8B")
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(row["blocks"], row["that differ"]) for row in found["tables"]["Vectors in the journal"]] == (
        [(6, 6 * is_wrong)] * 2
    )
    assert bool(found["failures"]) == is_wrong


@pytest.mark.parametrize("budget", [{"minutes": 0}, {"nbytes": 0}])
def test_a_run_without_time_or_room_measures_no_more(gpu: ModuleType, budget: dict[str, int], tmp_path: Path) -> None:
    bench = tiny_bench(gpu, tmp_path, **budget)
    with pytest.raises(gpu.results.LeftOutError):
        gpu.jobs.check_jobs(bench)
    assert not (tmp_path / "texts.jsonl").exists()


def test_statistics_in_the_form_of_kvpress_differ_from_ours_by_a_changed_number_alone(
    peers: ModuleType, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    sections = {"sampler": {"type": "none"}, "verify": {"examples": 0}}
    ours = undisturbed(capture=statistics(stages=["pre"], skip_tokens=4), **sections)
    theirs = qk_sniffer.export(ours, "expected_attention", tmp_path / "theirs")
    assert len(peers.arrays(ours)) == 2 * 3 * 4
    assert peers.difference(theirs, ours) == 0
    tensors = load_file(theirs / "model.safetensors")
    for name, place in (("query_mean", (2, 1)), ("query_cov", (0, 3))):
        changed = {key: tensor.copy() for key, tensor in tensors.items()}
        changed[name][place] *= 1.5
        save_file(changed, theirs / "model.safetensors")
        assert peers.difference(theirs, ours) == pytest.approx(0.5)
    save_file({name: tensor[:2] for name, tensor in tensors.items()}, theirs / "model.safetensors")
    with pytest.raises(SystemExit, match=r"has 16 arrays, .* has 24"):
        peers.difference(theirs, ours)
    shutil.rmtree(theirs)
    with pytest.raises(SystemExit, match="has 0 arrays"):
        peers.difference(theirs, theirs)


def test_a_text_is_cut_where_its_beginning_has_the_same_tokens_on_its_own(peers: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "qk_sniffer" / "assets" / "pydoc_tiny")
    text = "reached.\n\ns(tep)"
    beginnings = [peers.first_tokens(tokenizer, text, tokens) for tokens in range(6, 10)]
    assert beginnings == ["reached.", "reached.\n", "reached.\n", "reached.\n\ns"]
    # Alone, two line ends are one token: "reached.\n\n" has other tokens than the text.
    assert [len(tokenizer(beginning).input_ids) for beginning in beginnings] == [6, 7, 7, 9]
    assert tokenizer(beginnings[-1]).input_ids == tokenizer(text).input_ids[:9]


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_whole_on_a_cpu(tmp_path: Path) -> None:
    command = [
        "bash",
        "benchmarks/gpu.sh",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(tmp_path),
        "--folder",
        str(tmp_path),
    ]
    # Threads that share a core with other tests wait for one another.
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: len(rows) for name, rows in found["tables"].items()} == {
        "Cost": 12,
        "Vectors in the journal": 2,
        "Attention": 5,
        "Jobs": 5,
        "Batches of many lengths": 4,
        "Journal": 2,
    }
    assert {row["proof"] for row in found["tables"]["Jobs"]} == {"proven"}
    page = (tmp_path / "gpu.md").read_text()
    assert "- device: cpu" in page and "| tiny | 304 | uniform |" in page
