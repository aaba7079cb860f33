"""A capture in memory becomes a dataset of the contract: the one that a job makes of the same texts."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fake_hub import FakeHub
from support.hub_cases import REPO
from support.jobs import TEXTS, hashes, heads_of, run, stopped_after
from support.passes import SAMPLER, Passes, facts_of
from support.plasticity_cases import measure
from support.verify_cases import rewrite, wrong

import qk_sniffer
from qk_sniffer.dataset.head_scores import Ranges, head_scores
from qk_sniffer.dataset.verify import verify
from qk_sniffer.drawing.draw import draw, drawable
from qk_sniffer.errors import CaptureError, StoreError
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.notebook.memory import MemoryStore
from qk_sniffer.notebook.save import save
from qk_sniffer.notebook.stream import FolderStream
from qk_sniffer.store import segment_writers
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import InUseError, hold

EVERYTHING: dict[str, Any] = {
    "capture": {
        "capture_values": True,
        "capture_outputs": True,
        "attention": {"enabled": True},
        "statistics": {"enabled": True, "stages": ["pre", "post"], "skip_tokens": 4},
    }
}


def filled(checkpoint: Path, texts: list[str] = TEXTS, **sections: Any) -> Passes:
    """Returns a capture of whole texts in memory."""
    passes = Passes(facts_of(checkpoint, **sections), MemoryStore(piece_bytes=1 << 20))
    passes.whole(texts)
    return passes


def saved(passes: Passes, folder: Path, **options: Any) -> Path:
    store = passes.sink
    assert isinstance(store, MemoryStore)
    records = [store.records[number] for number in sorted(store.records)]
    statistics = passes.statistics() if passes.facts.config.capture.statistics.enabled else None
    save(passes.facts, store.finished, records, folder, statistics=statistics, **options)
    return folder


@pytest.fixture(scope="module")
def everything(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of a capture of all kinds, with summaries and statistics; read-only."""
    return saved(filled(checkpoint, **EVERYTHING), tmp_path_factory.mktemp("saved") / "everything")


@pytest.mark.slow
def test_it_has_the_rows_of_a_job(everything: Path, undisturbed: Callable[..., Path]) -> None:
    settings = {"sampler": SAMPLER, "inference": {"batch_size": 1}, "verify": {"examples": 0}}
    job = undisturbed(**EVERYTHING, **settings)
    found, expected = heads_of(everything), heads_of(job)
    assert found.keys() == expected.keys() and len(found) == 3 * (4 + 2 + 2 + 4 + 4)
    for name, table in expected.items():
        assert table.num_rows > 50
        if name.endswith("a"):  # the texts of the job have a limit, and so fewer bins of distances
            assert found[name].drop(["distance_mass"]).equals(table.drop(["distance_mass"])), name
        else:
            assert found[name].equals(table), name
    ours, theirs = qk_sniffer.open_dataset(everything), qk_sniffer.open_dataset(job)
    for kind in "qkvo":
        one, other = ours.statistics(1, kind, "post"), theirs.statistics(1, kind, "post")
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-3, atol=1e-5)
    assert ours.examples["num_tokens"].equals(theirs.examples["num_tokens"])


def test_verify_finds_nothing_wrong(everything: Path) -> None:
    report = verify(everything)
    assert report.problems == 0
    assert "note   not proven: captured from Python, whose calls cannot be repeated" in str(report)


def test_the_manifest_and_the_card_say_what_is_not_known(everything: Path) -> None:
    manifest = json.loads((everything / "manifest.json").read_text())
    assert manifest["source"] == "python"
    assert manifest["commits"] == {"model": None, "tokenizer": None, "dataset": None}
    assert manifest["config"]["model"]["name"] is None and manifest["config"]["model"]["dtype"] == "float32"
    assert manifest["config"]["model"]["tokenizer"]["name"] is None
    assert manifest["proof"] == {"proven": None, "reason": "captured from Python, whose calls cannot be repeated"}
    card = (everything / "README.md").read_text()
    assert "\n# Q, K, V and O vectors of an unnamed qwen3 model from Python\n" in card
    assert "whether the weights\nwere changed since is not known" in card
    for word in ("max_length", "special tokens", "split", "text column", "id column"):
        assert f"| {word} |" not in card


def test_name_and_commit_of_the_model_are_those_of_its_config(checkpoint: Path, tmp_path: Path) -> None:
    passes = filled(checkpoint, TEXTS[:2], model={"name": str(checkpoint)})
    object.__setattr__(passes.facts, "model_commit", "0" * 40)
    manifest = json.loads((saved(passes, tmp_path / "out") / "manifest.json").read_text())
    assert manifest["config"]["model"]["name"] == manifest["fingerprint"]["model.name"] == checkpoint.name
    assert str(checkpoint) not in json.dumps(manifest)
    assert manifest["commits"]["model"] == "0" * 40
    metadata = pq.read_schema(tmp_path / "out/l00h00q/data.parquet").metadata
    assert (metadata[b"model"], metadata[b"revision"]) == (checkpoint.name.encode(), b"0" * 40)


def test_examples_begin_where_the_capture_saw_them_first(checkpoint: Path, tmp_path: Path) -> None:
    """As in a capture that is opened after the prefill of a cache."""
    statistics = {"statistics": {"enabled": True}}
    passes = Passes(facts_of(checkpoint, capture=statistics), MemoryStore(piece_bytes=1 << 20))
    for number, first in ((0, 0), (1, 17)):
        passes.part(number, TEXTS[7], first)
        passes.sink.complete([passes.record(number, TEXTS[7], first)])
    root = saved(passes, tmp_path / "out")
    assert verify(root).problems == 0
    examples = pq.read_table(root / "examples/data.parquet").to_pylist()
    assert [example["first_position"] for example in examples] == [0, 17]
    assert [bool(example["text_hash"]) for example in examples] == [True, False]
    zeros = pa.array([0, 0], pa.int32())
    rewrite(root, "examples/data.parquet", lambda table: table.set_column(6, table.schema.field(6), zeros))
    found = wrong(str(verify(root)))
    assert "rows that the sampler chooses are missing" in found["sampler"]
    assert "count and nonfinite do not sum to the tokens of the examples" in found["statistics"]


@pytest.mark.slow
def test_what_reads_datasets_reads_it(everything: Path, tmp_path: Path) -> None:
    dataset = qk_sniffer.open_dataset(everything)
    vectors = dataset.vectors(1, 0, "q")
    summary = dataset.attention_summary(1, 0)
    assert len(vectors.positions) == len(summary.positions) == len(dataset.table(1, 0, "q"))
    assert dataset.attention(1, 0, 7).weights.shape[0] == np.count_nonzero(vectors.example_ids == 7)
    tokens = dataset.torch(["l00h00k", "l00h01v"])
    assert len(tokens) == len(dataset.vectors(0, 0, "k").positions)
    for format in ("triattention", "qfilters", "expected_attention", "tria"):
        assert qk_sniffer.export(everything, format, tmp_path / format).exists()
    measure(everything, tmp_path / "plasticity")
    assert (tmp_path / "plasticity/head_metrics.csv").exists()
    assert len(head_scores(dataset, Ranges(local_distance=3, far_distance=15, sink_tokens=4))) == 12
    assert draw(drawable(dataset), tmp_path / "pictures")


def test_no_job_grows_or_replaces_it(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = saved(filled(checkpoint, TEXTS[:2]), tmp_path / "out")
    before = (root / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match="holds a capture from Python, which no job resumes or adds to"):
        run(checkpoint, texts, root)
    assert (root / "manifest.json").read_bytes() == before
    run(checkpoint, texts, root, output={"overwrite": True})
    assert verify(root).problems == 0 and "source" not in json.loads((root / "manifest.json").read_text())


def test_finalize_publishes_it(
    everything: Path,
    checkpoint: Path,
    texts: Path,
    hub: FakeHub,
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    root = Path(shutil.copytree(everything, tmp_path / "out"))
    assert finalize(root, hf_repo_id=REPO) == 0
    repository = hub.repositories[REPO]
    files = repository.files("qwen3-python-uniform")
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in files if name.endswith(".parquet")} == {
        name: digest for name, digest in hashes(everything).items() if name.endswith(".parquet")
    }
    assert "Not proven: captured from Python, whose calls cannot be repeated." in files["README.md"].decode()
    assert "| an unnamed qwen3 model | forward passes in Python |" in repository.files("main")["README.md"].decode()
    output = {"hf_repo_id": REPO, "hf_branch": "qwen3-python-uniform", "resume_from_hub": True}
    with pytest.raises(StoreError, match="qwen3-python-uniform holds a capture from Python, which no job resumes"):
        run(checkpoint, texts, tmp_path / "job", output=output)


@pytest.mark.parametrize("what", ["file", "dataset", "job", "files"])
def test_a_folder_with_something_else_is_refused(
    what: str, checkpoint: Path, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "out"
    if what == "file":
        root.write_text("mine")
    elif what == "files":
        root.mkdir()
        (root / "mine.txt").write_text("mine")
    else:
        shutil.copytree(undisturbed(), root)
    if what == "job":
        (root / "manifest.json").unlink()
    passes = filled(checkpoint, TEXTS[:2])
    reasons = {
        "file": r"is a file; choose another folder",
        "files": r"is not empty and not a dataset of qk-sniffer .* choose another folder",
        "job": r"choose another folder",
        "dataset": r"holds a finished dataset\. Choose another folder, or replace what it holds with overwrite=True",
    }
    before = sorted(path.name for path in root.rglob("*"))
    with pytest.raises(StoreError, match=reasons[what]):
        saved(passes, root)
    if what != "dataset":
        with pytest.raises(StoreError, match=reasons[what]):
            saved(passes, root, overwrite=True)
    assert sorted(path.name for path in root.rglob("*")) == before
    if what == "dataset":
        (root / "notes.txt").write_text("mine")
        saved(passes, root, overwrite=True)
        assert verify(root).problems == 0 and (root / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("of_python", [True, False])
def test_unfinished_work_is_replaced_only_if_it_may(
    of_python: bool, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, root = filled(checkpoint, TEXTS[:2]), tmp_path / "out"
    if of_python:
        with pytest.raises(KeyboardInterrupt), FolderStream(passes.facts, root) as stream:
            Passes(passes.facts, stream).whole(TEXTS[:3])
            raise KeyboardInterrupt
        holds = "holds an unfinished capture from Python, of 3 whole examples: python -m"
    else:
        stopped_after(3, checkpoint, texts, root)
        holds = "holds an unfinished job: rerun its command to resume it"
    with pytest.raises(StoreError, match=rf"{holds}.* or replace what it holds with overwrite=True"):
        saved(passes, root)
    with hold(Layout(root).finalize_lock, "finalising"), pytest.raises(InUseError):
        saved(passes, root, overwrite=True)
    assert verify(saved(passes, root, overwrite=True)).problems == 0
    assert len(qk_sniffer.open_dataset(root).examples) == 2


def test_a_full_disk_is_noticed_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match=r"0\.0 MB are free\. Choose a folder on another disk$"):
        saved(filled(checkpoint, TEXTS[:2]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_leaves_nothing_and_may_be_repeated(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, real = filled(checkpoint), segment_writers.whole_segment

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_writers, "whole_segment", full)
    with pytest.raises(StoreError, match="No space left"):
        saved(passes, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(segment_writers, "whole_segment", real)
    assert verify(saved(passes, tmp_path / "out")).problems == 0
    assert not (tmp_path / "out/.qk_sniffer").exists()


def test_a_capture_without_passes_is_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    passes = Passes(facts_of(checkpoint), MemoryStore(piece_bytes=1 << 20))
    with pytest.raises(CaptureError, match="there is nothing to save"):
        saved(passes, tmp_path / "out")
    assert not (tmp_path / "out").exists()
