"""Tests verify on whole and on unfinished datasets, and the program that calls it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import TEXTS, Stopped, run, stop_at
from support.verify_cases import FILE, HEAD, QUERY_1, edit, flip, rewrite, value, verified, with_values, wrong
from tqdm import tqdm

from qk_sniffer.capture import capture as capture_module
from qk_sniffer.dataset import verify as verify_module
from qk_sniffer.dataset import verify_rows
from qk_sniffer.dataset.verify import verify
from qk_sniffer.dataset.verify_report import RECREATE, Problem, Report, named
from qk_sniffer.store.layout import HeadKey, Layout, head_name
from qk_sniffer.store.locks import hold, is_held


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"sampler": {"type": "log_uniform", "min_bucket_size": 8, "base_rate": 2.0, "seed": 3}},
        {"sampler": {"type": "uniform", "share": "example", "base_rate": 4.0}},
        {"sampler": {"type": "uniform", "keys": {"type": "all"}, "max_rows_per_example": 5}},
        {"sampler": {"type": "log_uniform", "keys": {"type": "uniform", "base_rate": 7.5}}},
        {"sampler": {"type": "uniform", "base_rate": 1e-9}},
        {"capture": {"capture_token_ids": True, "capture_token_strings": True}},
        {"capture": {"capture_token_strings": True, "layers": [0, 2], "heads": [3]}},
        {"capture": {"capture_pre_rope": True, "capture_queries": False}},
        {"capture": {"full_attention_only": True, "capture_keys": False}},
        {"capture": {"head_sampling": {"count": 5, "seed": 1}}, "dataset": {"id_column": "id", "streaming": True}},
        {"model": {"dtype": "bfloat16", "tokenizer": {"max_length": 30}}, "dataset": {"max_samples": 7}},
        {"verify": {"examples": 0}, "inference": {"batch_size": 2}},
    ],
    ids=str,
)
def test_what_a_job_makes_is_whole(sections: dict[str, Any], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sections = {"verify": {"examples": 0}} | sections
    root = run(checkpoint, texts, tmp_path / "out", **sections)
    text = verified(root)
    assert wrong(text) == {} and re.search(r"\nwhole: \d+ heads?, [\d,]+ rows, [\d.]+ MB$", text)


@pytest.mark.slow
def test_what_shards_make_is_whole(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for index in (1, 0):
        assert "no manifest.json" in str(verify(tmp_path / "out")) or index == 1
        run(checkpoint, texts, tmp_path / "out", shard={"index": index, "count": 2})
    assert wrong(verified(tmp_path / "out")) == {}


@pytest.mark.slow
def test_what_was_added_to_is_whole(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for count in (7, 15):
        run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": count})
    text = verified(tmp_path / "out")
    assert wrong(text) == {} and "examples        ok     15, with " in text


def test_the_report_says_what_was_found(verify_base: Path) -> None:
    text = verified(verify_base)
    manifest = json.loads((verify_base / "manifest.json").read_text())
    rows, size = manifest["rows"], sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    assert text.endswith(f"\n\nwhole: 18 heads, {rows:,} rows, {size:,.1f} MB")
    assert f"sampler         ok     18 heads: {rows:,} rows, exactly those that the sampler chooses" in text
    assert "heads           ok     18: query heads 0-3 of layers 0-2; key heads 0-1 of layers 0-2" in text
    assert f"files           ok     20 files, {size:,.1f} MB: size and sha256" in text
    assert "derived again by the job from 11 of 24 examples, differ by" in text
    tokens = np.array([len(text) for text in TEXTS])
    for kind, name, heads in (("q", "query", 12), ("k", "key", 6)):
        for bucket, there in manifest["rows_by_bucket"][kind].items():
            first = 16 * int(bucket)
            expected = heads * 6 / 16 * np.clip(tokens - first, 0, 16).sum()
            last = min(first + 15, tokens.max() - 1)
            assert re.search(rf"  {name} +{bucket} +{first} to {last} +{there:,} +{expected:,.0f}\n", text)


@pytest.mark.slow
def test_many_buckets_share_lines(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sampler = {"type": "uniform", "min_bucket_size": 2, "base_rate": 1.0}
    text = verified(run(checkpoint, texts, tmp_path / "out", sampler=sampler))
    table = [line.split() for line in text.split("\n\n")[1].splitlines()[1:]]
    assert 12 < len(table) <= 24
    expected = {
        kind: sum(float(row[-1].replace(",", "")) for row in table if row[0] == kind) for kind in ("query", "key")
    }
    tokens = sum(map(len, TEXTS))
    assert abs(expected["query"] - 12 * tokens / 2) < 12 and abs(expected["key"] - 6 * tokens / 2) < 12


def test_vectors_that_are_not_finite_are_counted(root: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        vector = value(table, "vector", 2)
        return with_values(table, "vector", {2: [*vector[:-1], float("nan")], 5: [float("inf"), *vector[1:]]})

    rewrite(root, FILE, spoil)
    edit(root, lambda manifest: manifest["nonfinite_rows"].update({FILE: 2}))
    text = verified(root)
    assert wrong(text) == {} and f"vector          note   2 vectors with NaN or Inf in {QUERY_1}" in text
    edit(root, lambda manifest: manifest["nonfinite_rows"].clear())
    assert (
        f"NaN or Inf differs from manifest.json ({QUERY_1}) {HEAD}: 2 instead of 0" in wrong(verified(root))["vector"]
    )


@pytest.mark.slow
def test_a_file_is_not_kept_in_memory(root: Path) -> None:
    group = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(np.random.rand(1 << 18)), 16)})
    with pq.ParquetWriter(root / "large.parquet", group.schema) as writer:
        for _ in range(20):
            writer.write_table(group)
    with pq.ParquetFile(root / "large.parquet") as file:
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in verify_rows.batches(file, 1 << 10, ["vector"])]
    assert max(held) < 4 * group.nbytes


def test_a_manifest_of_the_first_datasets(root: Path) -> None:
    edit(root, lambda manifest: manifest.pop("nonfinite_rows"))
    assert wrong(verified(root)) == {}


@pytest.mark.parametrize("key", ["files", "commits", "fingerprint", "versions", "proof", "source_rows", "stated"])
def test_a_manifest_without_a_fact_is_not_whole(root: Path, key: str) -> None:
    edit(root, lambda manifest: manifest.pop(key))
    assert f"missing required field `{key}`" in wrong(verified(root))["manifest"]


def test_a_folder_without_a_manifest_is_incomplete(root: Path, tmp_path: Path) -> None:
    (root / "manifest.json").unlink()
    message = wrong(verified(root))["manifest"]
    assert message.startswith("the dataset is incomplete: no manifest.json") and "rerun its job, or fetch" in message
    assert f"the folder {tmp_path / 'nothing'} does not exist" in wrong(verified(tmp_path / "nothing"))["manifest"]
    assert f"{root / 'README.md'} is not a folder" in wrong(verified(root / "README.md"))["manifest"]


def test_a_folder_of_datasets_is_not_an_incomplete_one(root: Path) -> None:
    message = wrong(verified(root.parent))["manifest"]
    assert message.startswith(f"{root.parent} is not a dataset, but holds some: {root}")


def test_the_bar_ends_at_its_total(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are listed by name, in which the key heads stand between the query heads."""
    bars = []

    def bar(**given: Any) -> "tqdm[NoReturn]":
        bars.append(tqdm(**given | {"disable": False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(verify_module, "tqdm", bar)
    verify(root)
    assert [each.n for each in bars] == [each.total for each in bars] != []


@pytest.mark.slow
def test_an_unfinished_job_says_how_far_it_is(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    real = capture_module.Capture.run
    monkeypatch.setattr(capture_module.Capture, "run", lambda self, plan: stop_at(20, plan, self, real))
    with pytest.raises(Stopped):
        run(checkpoint, texts, root, inference={"batch_size": 1, "lookahead": 1})
    before = sorted(root.rglob("*"))
    message = wrong(verified(root))["manifest"]
    assert "no manifest.json 20 of 24 examples of the source captured" in message
    assert "way out: rerun the command that started its job" in message
    code = (
        "import sys; from pathlib import Path; from qk_sniffer.store.locks import hold\n"
        "with hold(Path(sys.argv[1]), 'test'): print('held', flush=True); sys.stdin.read()"
    )
    lock = Layout(root).shard_lock(0, 1)
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        message = wrong(verified(root))["manifest"]
        assert f"process {other.pid} on " in message and "is writing it; 20 of 24 examples" in message
        assert "way out: wait for the running job" in message
        other.communicate("")
    assert sorted(root.rglob("*")) == before
    Layout(root).job_file.unlink()
    assert "has captured nothing yet" in wrong(verified(root))["manifest"]


def test_a_version_that_waits_to_be_promoted(root: Path) -> None:
    staging = Layout(root).staging.root
    staging.mkdir(parents=True)
    shutil.copy(root / "manifest.json", staging)
    assert ".qk_sniffer exists" in verified(root) and wrong(verified(root)) == {}
    (root / "manifest.json").unlink()
    assert "all files are staged, but not promoted yet" in wrong(verified(root))["manifest"]


def test_is_held(tmp_path: Path) -> None:
    lock = tmp_path / "work" / "a.lock"
    assert not is_held(lock)
    with hold(lock, "test"):
        assert is_held(lock)
        lock.chmod(0o444)
        assert is_held(lock)
    lock.parent.mkdir()
    lock.write_text("{}")
    assert not is_held(lock)


@pytest.fixture
def light(tmp_path: Path) -> dict[str, str]:
    """Returns an environment in which importing a library of a job ends the process."""
    folder = tmp_path / "light"
    folder.mkdir()
    for name in ("torch", "transformers", "datasets", "huggingface_hub", "pandas"):
        (folder / f"{name}.py").write_text(f"import os\nos.write(2, b'imported {name}')\nos._exit(97)\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def called(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qk_sniffer.verify", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_exit_codes(root: Path, light: dict[str, str]) -> None:
    done = called(light, f"data_root={root}")
    assert (done.returncode, done.stderr) == (0, "") and "\nwhole: 18 heads, " in done.stdout
    flip(root / FILE, 300)
    done = called(light, f"data_root={root}")
    assert (done.returncode, done.stderr) == (1, "") and done.stdout.endswith("\nNOT WHOLE: 1 problem\n")
    (root / "manifest.json").unlink()
    done = called(light, f"data_root={root}")
    assert (done.returncode, done.stderr) == (1, "") and "incomplete: no manifest.json" in done.stdout


@pytest.mark.slow
def test_settings(root: Path, light: dict[str, str]) -> None:
    done = called(light, f"output.data_root={root}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "output.data_root is not a key, did you mean data_root?" in done.stderr
    assert "data_root is not given; it is the dataset's folder" in done.stderr
    done = called(light, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m qk_sniffer.verify DATA_ROOT" in done.stdout and "Exit codes: 0 whole" in done.stdout


def test_names_of_many_heads_are_short() -> None:
    def keys(*names: tuple[int, int, str]) -> list[HeadKey]:
        return [HeadKey(*name) for name in names]

    whole = keys(*((layer, head, "q") for layer in range(6) for head in range(4)), (0, 0, "k"), (1, 0, "k"))
    assert named(whole, whole) == "all 24 query heads; all 2 key heads"
    some = keys((0, 0, "q"), (0, 1, "q"), (2, 0, "q"), (2, 1, "q"), (5, 3, "q"), (1, 0, "k"))
    assert named(some, whole) == "query heads 0-1 of layers 0, 2; query head 3 of layer 5; key head 0 of layer 1"
    report = Report(Path("x"), whole)
    report.add(
        Problem("order", "not sorted", head_name(key.layer, key.head, key.kind), head=key, rows=2) for key in some
    )
    report.add([Problem("schema", "other", way_out="mend it")])
    assert str(report).splitlines() == [
        "Dataset: x",
        "  schema          WRONG  other",
        "                         way out: mend it",
        f"  order           WRONG  not sorted (12 rows in {named(some, whole)})",
        "                         l00h00q",
        "                         l00h01q",
        "                         l02h00q (and 3 more)",
        f"                         way out: {RECREATE}",
        "NOT WHOLE: 2 problems",
    ]
