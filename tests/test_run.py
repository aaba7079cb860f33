"""The main job, end to end, on tiny models and real files: what stands in the dataset is what the model computed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from test_attention import captured
from tiny import ALPHABET, save_checkpoint
from transformers import AutoModel
from zoo import CASES, Case

from qk_sniffer import capture as capture_room
from qk_sniffer.config import from_dict
from qk_sniffer.errors import CaptureError, ConfigError, SourceError, StoreError
from qk_sniffer.run import run_job
from qk_sniffer.sampling import Sampler
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout, parse_head_name, schema
from qk_sniffer.store.locks import hold
from qk_sniffer.store.parquet import check_encodings

QWEN3 = next(case for case in CASES if case.name == "qwen3_sliding")
TEXTS = [("".join(ALPHABET) * 3)[i : i + 20 + 13 * i % 97] for i in range(24)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(QWEN3, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": f"doc-{i}"}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def settings(checkpoint: Path, texts: Path, root: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A job over `texts` that keeps every row, with `sections` laid over it."""
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
    """sha256 by name of every file of a dataset but its manifest, which holds timings, and work still to be tidied."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and ".qk_sniffer" not in path.parts
    }


def tokens_of(text: str) -> torch.Tensor:
    return torch.tensor([[1 + ALPHABET.index(character) for character in text]])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["post", "pre"])
def test_every_stored_vector_is_bit_for_bit_the_models_own(case: Case, dtype: str, stage: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(case, tmp_path / "model")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    root = run(
        checkpoint,
        path,
        tmp_path / "out",
        model={"dtype": dtype},
        inference={"batch_size": 1},
        capture={"capture_pre_rope": stage == "pre"},
    )
    decoder = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    expected = [captured(decoder, tokens_of(text), pre_rope=stage == "pre") for text in TEXTS[:4]]
    tables = heads_of(root)
    assert len(tables) == 3 * (4 + case.config().num_key_value_heads)
    for name, table in tables.items():
        key = parse_head_name(name)
        assert key is not None
        whole = torch.cat([seen[key.layer, key.kind][0, key.head] for seen in expected]).float().numpy()
        assert np.array_equal(vectors(table), whole)
        assert keys(table) == [(i, p) for i in range(4) for p in range(len(TEXTS[i]))]
        window = case.sliding_windows[key.layer]
        assert table["sliding_window"].to_pylist() == [window] * len(table)


def test_the_files_are_as_the_contract_says(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture={"layers": [0, 1]})
    manifest = manifests.read(root)
    tables = heads_of(root)
    assert len(tables) == 12
    for name, table in tables.items():
        key = parse_head_name(name)
        assert key is not None
        path = root / name / "data.parquet"
        assert table.schema.remove_metadata() == schema(16)
        assert table.schema.names == ["bucket", "example_id", "position", "vector", "sliding_window"]
        assert table.schema.field("vector").type == pa.list_(pa.float32(), 16)
        assert table.schema.field("sliding_window").type == pa.int32()
        check_encodings(path)
        assert table["bucket"].to_pylist() == [position // 16 for position in table["position"].to_pylist()]
        metadata = {k.decode(): v.decode() for k, v in pq.read_schema(path).metadata.items()}
        expected = {
            "model": checkpoint.name,
            "revision": manifest["commits"]["model"],
            "layer": str(key.layer),
            "head": str(key.head),
            "key_head": str(key.head // 2 if key.kind == "q" else key.head),
            "kind": key.kind,
            "rope_stage": "post",
            "sliding_window": "12" if key.layer == 0 else "null",
            "softmax_scale": "0.25",
            "dtype": "float32",
        }
        assert expected.items() <= metadata.items()
    examples = pq.read_table(root / "examples" / "data.parquet").to_pydict()
    assert examples["num_tokens"] == [len(text) for text in TEXTS]
    assert examples["source_id"] == [str(i) for i in range(len(TEXTS))]
    assert not (root / ".qk_sniffer").exists()


def test_the_manifest_tells_what_made_the_dataset_and_holds_for_its_files(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", sampler={"type": "uniform", "base_rate": 4.0})
    manifest = json.loads((root / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (root / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
        if name.endswith(".parquet"):
            assert entry["rows"] == pq.read_metadata(root / name).num_rows
    assert {"README.md", "examples/data.parquet", "l00h00q/data.parquet"} <= manifest["files"].keys()
    assert manifest["rows"] == sum(len(table) for table in heads_of(root).values())
    assert manifest["inclusion"]["q"] == {str(bucket): 0.25 for bucket in range(1 + (max(map(len, TEXTS)) - 1) // 16)}
    assert manifest["config"]["sampler"]["base_rate"] == 4.0
    assert (
        manifest["versions"]["torch"] == torch.__version__.split("+")[0]
        or manifest["versions"]["torch"] == torch.__version__
    )
    layers = manifest["model"]["layers"]
    assert [layer["sliding_window"] for layer in layers] == [12, None, 12]
    assert [layer["softmax_scale"] for layer in layers] == [0.25] * 3
    (rotary,) = manifest["model"]["rotary"]["embeddings"].values()
    assert rotary["attention_scaling"] == 1.0
    expected = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    assert np.allclose(rotary["inv_freq"], expected, rtol=1e-6)


def test_logits_can_be_rebuilt_from_dataset_and_manifest_alone(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", inference={"batch_size": 1})
    layer = manifests.read(root)["model"]["layers"][1]
    tables = heads_of(root)
    query, key = (vectors(tables[name])[: len(TEXTS[0])] for name in ("l01h03q", "l01h01k"))
    logits = np.where(np.tri(len(query), dtype=bool), layer["softmax_scale"] * query @ key.T, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    decoder = QWEN3.model(kernel="eager").get_decoder()
    with torch.no_grad():
        attentions = decoder(input_ids=tokens_of(TEXTS[0]), output_attentions=True).attentions
    assert np.allclose(weights, attentions[1][0, 3].numpy(), atol=1e-5)


def test_every_reader_reads_it(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture={"layers": [0]})
    tables = heads_of(root)
    for name, table in tables.items():
        loaded = load_dataset(str(root), name, split="train").with_format("arrow")[:]
        assert loaded.column_names == table.column_names
        assert np.array_equal(vectors(loaded), vectors(table))
    default = load_dataset(str(root), split="train")
    assert default.num_rows == len(tables["l00h00q"])
    rows = sum(len(table) for table in tables.values())
    pattern = str(root / "l*" / "data.parquet")
    counted = duckdb.sql(f"select count(*), sum(len(vector)) from read_parquet('{pattern}')").fetchall()
    assert counted == [(rows, rows * 16)]
    assert pl.scan_parquet(pattern).select(pl.len()).collect().item() == rows


def test_the_rows_do_not_depend_on_how_the_work_is_shared_out(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sampler = {"type": "uniform", "base_rate": 3.0}
    whole = heads_of(run(checkpoint, texts, tmp_path / "one", sampler=sampler, inference={"batch_size": 1}))
    others = {
        "large batches": {"inference": {"max_batch_tokens": 4096}},
        "small window": {"inference": {"lookahead": 3, "batch_size": 2}},
        "masked attention": {"inference": {"banded_attention": False}},
        "small buffers": {"inference": {"queue_mb": 1, "segment_mb": 1}},
        "streamed": {"dataset": {"streaming": True}},
    }
    for name, sections in others.items():
        other = heads_of(run(checkpoint, texts, tmp_path / name, sampler=sampler, **sections))
        assert whole.keys() == other.keys()
        for head, table in whole.items():
            assert table.drop(["vector"]) == other[head].drop(["vector"]), name
            assert np.allclose(vectors(table), vectors(other[head]), rtol=1e-4, atol=1e-4), name


def test_shards_make_the_dataset_of_one_job(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    whole = heads_of(run(checkpoint, texts, tmp_path / "one"))
    for index in (2, 0, 1):
        assert not (tmp_path / "three" / "manifest.json").exists()
        run(checkpoint, texts, tmp_path / "three", shard={"index": index, "count": 3})
    three = heads_of(tmp_path / "three")
    assert whole.keys() == three.keys()
    for head, table in whole.items():
        assert table.drop(["vector"]) == three[head].drop(["vector"])
        assert np.allclose(vectors(table), vectors(three[head]), rtol=1e-4, atol=1e-4)


def together(jobs: list[dict[str, Any]]) -> list[int]:
    """Exit codes of jobs that start in the same moment, each a process of its own."""
    code = "import json, sys; from qk_sniffer.config import from_dict; from qk_sniffer.run import run_job; "
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


def test_shards_that_start_and_end_in_the_same_moment(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    whole = heads_of(run(checkpoint, texts, tmp_path / "one"))
    for attempt in range(3):
        root = tmp_path / f"together{attempt}"
        jobs = [settings(checkpoint, texts, root, shard={"index": index, "count": 3}) for index in range(3)]
        assert together(jobs) == [0, 0, 0]
        assert manifests.read(root)["examples"] == len(TEXTS)
        for head, table in heads_of(root).items():
            assert table.drop(["vector"]) == whole[head].drop(["vector"])
        assert not (root / ".qk_sniffer").exists()


def test_overwriting_does_not_take_the_work_of_a_shard_that_runs(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    run(checkpoint, texts, root, shard={"index": 0, "count": 2})
    (shard_0,) = (root / ".qk_sniffer" / "journal").iterdir()
    before = sorted(path.name for path in shard_0.iterdir())
    other: dict[str, Any] = {"sampler": {"seed": 4}, "output": {"overwrite": True}, "shard": {"index": 1, "count": 2}}
    with hold(Layout(root).shard_lock(0, 2), "capturing"), pytest.raises(StoreError, match="in use"):
        run(checkpoint, texts, root, **other)
    assert sorted(path.name for path in shard_0.iterdir()) == before
    run(checkpoint, texts, root, shard={"index": 1, "count": 2})
    assert manifests.read(root)["examples"] == len(TEXTS)


def test_other_rows_than_an_unfinished_job_was_begun_with_are_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capture_room.Capture.run
    monkeypatch.setattr(capture_room.Capture, "run", lambda self, plan: _stop_at(20, plan, self, real))
    sections: dict[str, Any] = {"inference": {"batch_size": 1, "lookahead": 1}}
    with pytest.raises(Stopped):
        run(checkpoint, texts, tmp_path / "out", **sections)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="over 24 rows of the dataset, and 5 are asked for"):
        run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": 5}, **sections)
    root = run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": 5}, output={"overwrite": True}, **sections)
    assert manifests.read(root)["examples"] == 5


def test_a_local_file_that_changed_is_not_taken_for_the_finished_one(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    moved = tmp_path / "elsewhere" / texts.name
    moved.parent.mkdir()
    texts.rename(moved)
    run(checkpoint, moved, root)
    assert "Nothing to do" in capsys.readouterr().out
    run(checkpoint, moved, root, dataset={"streaming": True})
    assert "Nothing to do" in capsys.readouterr().out
    lines = moved.read_text().splitlines()
    moved.write_text("\n".join([*lines[:3], json.dumps({"text": "another", "id": "doc-3"}), *lines[4:]]) + "\n")
    with pytest.raises(SourceError, match=r"row 3 .*the source has changed"):
        run(checkpoint, moved, root)


def test_the_manifest_tells_no_path_of_this_machine(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    for name in ("manifest.json", "README.md", "l00h00q/data.parquet"):
        assert str(tmp_path).encode() not in (root / name).read_bytes()
        assert str(checkpoint.parent).encode() not in (root / name).read_bytes()


def test_a_checkpoint_without_a_tokenizer_says_so(texts: Path, tmp_path: Path) -> None:
    QWEN3.model().save_pretrained(tmp_path / "model")
    with pytest.raises(SourceError, match=r"model\.tokenizer\.name"):
        run(tmp_path / "model", texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gather_that_is_cut_into_pieces_gives_the_same_files(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(checkpoint, texts, tmp_path / "whole")
    monkeypatch.setattr(capture_room, "PIECE_BYTES", 1000)
    assert hashes(run(checkpoint, texts, tmp_path / "pieces")) == hashes(whole)


def test_the_sampler_decides_the_rows_of_queries_and_keys(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", sampler={"type": "log_uniform", "keys": {"type": "all"}})
    config = from_dict(manifests.read(root)["config"])
    sampler = Sampler(config.sampler)
    for name, table in heads_of(root).items():
        key = parse_head_name(name)
        assert key is not None
        expected = [
            (i, position)
            for i, text in enumerate(TEXTS)
            for position in sampler.positions(i, key.layer, key.kind, len(text)).tolist()
        ]
        assert keys(table) == expected
        assert table["bucket"].to_pylist() == sampler.bucket(key.kind, table["position"].to_numpy()).tolist()


def test_only_the_heads_asked_for_are_captured(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    def names(**capture: Any) -> list[str]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        return list(heads_of(run(checkpoint, texts, root, capture=capture)))

    assert names(layers=[2], heads=[0, 3]) == ["l02h00k", "l02h00q", "l02h01k", "l02h03q"]
    assert names(layers=[1], heads=[1], capture_keys=False) == ["l01h01q"]
    assert names(layers=[1], heads=[3], capture_queries=False) == ["l01h01k"]
    assert {name[:3] for name in names(full_attention_only=True)} == {"l01"}
    drawn = names(head_sampling={"count": 3, "seed": 5})
    assert sum(name.endswith("q") for name in drawn) == 3
    for name in drawn:
        if name.endswith("q"):
            assert f"{name[:3]}h{int(name[4:6]) // 2:02d}k" in drawn
    with pytest.raises(ConfigError, match=r"capture\.layers.*0-2"):
        names(layers=[7])


def test_tokens_can_be_kept_beside_the_vectors(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", capture={"capture_token_ids": True, "capture_token_strings": True})
    for table in heads_of(root).values():
        assert table.schema.names[-2:] == ["token_id", "token_str"]
        rows = zip(keys(table), table["token_id"].to_pylist(), table["token_str"].to_pylist(), strict=True)
        for (example, position), token_id, token in rows:
            assert token == TEXTS[example][position] == ALPHABET[token_id - 1]


def test_ids_of_the_source_are_kept_or_hashed(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", dataset={"id_column": "id", "max_samples": 3})
    examples = pq.read_table(root / "examples" / "data.parquet").to_pydict()
    assert examples["source_id"] == ["doc-0", "doc-1", "doc-2"]
    table = heads_of(root)["l00h00q"]
    assert list(dict.fromkeys(table["example_id"].to_pylist())) == examples["example_id"]


def test_a_text_file_is_one_example(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a-line\nand-another\n" * 3)
    root = run(checkpoint, path, tmp_path / "out", model={"tokenizer": {"max_length": 30}})
    assert max(keys(heads_of(root)["l00h00q"])) == (0, 29)
    assert manifests.read(root)["truncated_examples"] == 1


def test_a_folder_of_parquet_is_a_dataset(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in range(2):
        pq.write_table(pa.table({"text": TEXTS[part::2], "n": list(range(12))}), folder / f"part-{part}.parquet")
    root = run(checkpoint, folder, tmp_path / "out")
    assert pq.read_metadata(root / "examples" / "data.parquet").num_rows == len(TEXTS)


class Stopped(BaseException):
    """Stands for whatever ends a process in the middle."""


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_job_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    after: int, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"inference": {"batch_size": 3, "lookahead": 10}}
    whole = run(checkpoint, texts, tmp_path / "whole", **sections)
    ran: list[set[int]] = []
    run_batch = capture_room.Capture.run

    def counted(self: Any, plan: Any) -> None:
        if len(ran) == after and not resumed:
            raise Stopped
        ran.append({example.index for example in plan.examples})
        run_batch(self, plan)

    monkeypatch.setattr(capture_room.Capture, "run", counted)
    resumed = False
    with pytest.raises(Stopped):
        run(checkpoint, texts, tmp_path / "broken", **sections)
    assert not (tmp_path / "broken" / "manifest.json").exists()
    resumed = True
    assert hashes(run(checkpoint, texts, tmp_path / "broken", **sections)) == hashes(whole)
    assert sorted(index for batch in ran for index in batch) == list(range(len(TEXTS))), "work was done twice, or not"


def test_a_killed_process_goes_on_and_ends_with_the_same_bytes(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"inference": {"batch_size": 1, "segment_mb": 1, "queue_mb": 1}}
    whole = run(checkpoint, texts, tmp_path / "whole", **sections)
    root = tmp_path / "killed"
    values = settings(checkpoint, texts, root, **sections)
    code = (
        "import json, sys, time; from qk_sniffer.config import from_dict; from qk_sniffer import run, capture;"
        "real = capture.Capture.run\n"
        "def slow(self, plan):\n    real(self, plan); print('batch', flush=True); time.sleep(0.05)\n"
        "capture.Capture.run = slow; run.run_job(from_dict(json.loads(sys.argv[1])))"
    )
    with subprocess.Popen([sys.executable, "-c", code, json.dumps(values)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(7):
            assert process.stdout.readline() == b"batch\n"
        process.send_signal(signal.SIGKILL)
    assert not (root / "manifest.json").exists()
    run_job(from_dict(values))
    assert hashes(root) == hashes(whole)


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments_a_job_ends_with_the_same_bytes(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"inference": {"batch_size": 2, "segment_mb": 1, "queue_mb": 1}}
    whole = run(checkpoint, texts, tmp_path / "whole", **sections)
    root = tmp_path / "killed"
    values = settings(checkpoint, texts, root, **sections)
    # Slowed down, so that the moments fall into every part: forwards, journal, compaction, publication.
    code = (
        "import json, os, sys, time; from qk_sniffer.config import from_dict; from qk_sniffer import capture, run;"
        "from qk_sniffer.store import disk, publish, segment\n"
        "def slow(module, name, seconds):\n"
        "    real = getattr(module, name)\n"
        "    def slowed(*args, **kwargs):\n        time.sleep(seconds); return real(*args, **kwargs)\n"
        "    setattr(module, name, slowed)\n"
        "slow(capture.Capture, 'run', 0.1); slow(segment, 'sync_file', 0.02); slow(publish, 'sync_folder', 0.05)\n"
        "print('started', flush=True); run.run_job(from_dict(json.loads(sys.argv[1])))"
    )
    moments = np.random.default_rng(5).uniform(0.2, 4.0, size=12)
    kills = 0
    for moment in moments:
        with subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(values)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"started\n"
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        if (root / "manifest.json").exists():
            assert hashes(root) == hashes(whole)
            run_job(from_dict(values))
            assert not (root / ".qk_sniffer").exists()
            shutil.rmtree(root)
    assert kills >= 3
    run_job(from_dict(values))
    assert hashes(root) == hashes(whole)


def test_a_journal_damaged_after_it_was_complete_is_mended(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"inference": {"batch_size": 1, "segment_mb": 1, "lookahead": 1}}
    whole = run(checkpoint, texts, tmp_path / "whole", **sections)

    def fail(*_: Any) -> bool:
        raise Stopped

    monkeypatch.setattr("qk_sniffer.run.finalize", fail)
    with pytest.raises(Stopped):
        run(checkpoint, texts, tmp_path / "damaged", **sections)
    segment = sorted((tmp_path / "damaged").rglob("*.safetensors"))[0]
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    monkeypatch.undo()
    assert hashes(run(checkpoint, texts, tmp_path / "damaged", **sections)) == hashes(whole)


def test_a_finished_job_does_nothing(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    monkeypatch.setattr("qk_sniffer.run.load_backbone", None)
    run(checkpoint, texts, root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    assert "Nothing to do" in capsys.readouterr().out


def test_another_configuration_is_refused_with_the_keys_that_differ(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    before = hashes(root)
    with pytest.raises(StoreError, match=r"sampler\.seed: 0 there, 1 now") as error:
        run(checkpoint, texts, root, sampler={"seed": 1}, inference={"queue_mb": 7})
    assert "queue_mb" not in str(error.value) and "output.overwrite=true" in str(error.value)
    with pytest.raises(StoreError, match="24 rows of the dataset, and 5 are asked for"):
        run(checkpoint, texts, root, dataset={"max_samples": 5})
    assert hashes(root) == before


def test_a_checkpoint_that_changed_is_refused(texts: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(QWEN3, tmp_path / "model")
    root = run(checkpoint, texts, tmp_path / "out")
    save_checkpoint(QWEN3, checkpoint, dtype=torch.bfloat16)
    with pytest.raises(StoreError, match="commit of the model"):
        run(checkpoint, texts, root)


def test_a_source_that_changed_in_the_middle_is_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capture_room.Capture.run
    monkeypatch.setattr(capture_room.Capture, "run", lambda self, plan: _stop_at(2, plan, self, real))
    sections = {"inference": {"batch_size": 1, "lookahead": 1}}
    with pytest.raises(Stopped):
        run(checkpoint, texts, tmp_path / "out", **sections)
    lines = texts.read_text().splitlines()
    texts.write_text("\n".join([json.dumps({"text": "another", "id": "doc-0"}), *lines[1:]]) + "\n")
    with pytest.raises(SourceError, match=r"row 0 .*not the text"):
        run(checkpoint, texts, tmp_path / "out", **sections)


def _stop_at(index: int, plan: Any, capture: Any, real: Any) -> None:
    if any(example.index == index for example in plan.examples):
        raise Stopped
    real(capture, plan)


def test_overwrite_replaces_the_dataset_only_once_the_new_one_is_whole(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    before = hashes(root)
    again: dict[str, Any] = {"sampler": {"seed": 1, "type": "uniform"}, "capture": {"layers": [1]}}
    (tmp_path / "no-model").mkdir()
    with pytest.raises(SourceError, match="no-model"):
        run(tmp_path / "no-model", texts, root, output={"overwrite": True}, **again)
    real = capture_room.Capture.run
    monkeypatch.setattr(capture_room.Capture, "run", lambda self, plan: _stop_at(0, plan, self, real))
    with pytest.raises(Stopped):
        run(checkpoint, texts, root, output={"overwrite": True}, **again)
    assert {name: hashes(root)[name] for name in before} == before
    assert manifests.read(root)["config"]["sampler"]["seed"] == 0
    monkeypatch.undo()
    run(checkpoint, texts, root, output={"overwrite": True}, **again)
    assert hashes(root) == hashes(run(checkpoint, texts, tmp_path / "fresh", **again))


def test_a_folder_that_is_not_ours_is_left_alone(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = tmp_path / "thesis"
    root.mkdir()
    (root / "chapter1.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"chapter1\.tex"):
            run(checkpoint, texts, root, output={"overwrite": overwrite})
    assert [path.name for path in root.iterdir()] == ["chapter1.tex"]


def test_a_model_whose_attention_cannot_be_seen_is_an_error(texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTJConfig

    save_checkpoint(QWEN3, tmp_path / "gptj")
    config = GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gptj")
    with pytest.raises(CaptureError, match="nothing can be captured from gptj"):
        run(tmp_path / "gptj", texts, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_dataset_without_text_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": "  "}\n')
    with pytest.raises(SourceError, match="text"):
        run(checkpoint, path, tmp_path / "out")


def test_rows_without_text_are_left_out_counted_and_keep_their_index(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", "abc", None, "defg"]))
    root = run(checkpoint, path, tmp_path / "out")
    assert keys(heads_of(root)["l00h00q"]) == [(1, 0), (1, 1), (1, 2), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert manifests.read(root)["skipped_rows"] == 2


def test_debug_logging_tells_where_the_time_of_each_batch_went(
    checkpoint: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run(checkpoint, texts, tmp_path / "out", inference={"debug_logging": True, "batch_size": 6})
    lines = [message for message in caplog.messages if message.startswith("batch of ")]
    assert len(lines) >= 4
    for line in lines:
        for stage in ("tokenize", "plan", "forward", "gather", "transfer", "write"):
            assert f"{stage} " in line
    assert "forward 0.0000 s" not in lines[0] and "tokenize 0.0000 s" not in lines[0]


def test_two_jobs_cannot_write_one_data_root(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from qk_sniffer.store.layout import claim;"
        "from qk_sniffer.store.locks import hold; layout = claim(Path(sys.argv[1]))\n"
        "with hold(layout.shard_lock(0, 1), 'capturing'):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=f"process {process.pid} on {os.uname().nodename}"):
            run(checkpoint, texts, tmp_path / "out")
        process.kill()
    time.sleep(0.1)
    run(checkpoint, texts, tmp_path / "out")


@pytest.fixture(autouse=True)
def quiet_progress() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
