"""A finished dataset grows: the job runs only new examples, and the result is the dataset of all examples."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import TEXTS, Stopped, hashes, heads_of, keys, run, settings, stop_at, vectors
from support.store_cases import (
    ALL_COLUMNS,
    HEADS,
    SAMPLER,
    Captured,
    captured_journal,
    file_bytes,
    job_facts,
    make_dataset,
)

from qk_sniffer.capture.capture import Capture
from qk_sniffer.config import from_dict
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.jobs.run import run_job
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.compact import compact
from qk_sniffer.store.files import Folder
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.manifest import build
from qk_sniffer.store.previous import PreviousVersion, describe
from qk_sniffer.store.promote import promote

ALONE = {"inference": {"batch_size": 1}}
"""One example a forward pass: growing then changes no batch, and no bit."""


class Part(Captured):
    """Some of the examples of a captured corpus."""

    def __init__(self, first: int, last: int, **options: Any) -> None:
        super().__init__(**options)
        self.__dict__["some"] = range(first, last)

    def batches(self, done: Any = frozenset()) -> Any:
        for batch in super().batches(done):
            yield [index for index in batch if index in self.__dict__["some"]]


def grow(layout: Layout, part: Captured, **options: Any) -> None:
    """Adds the part to the dataset as a job does."""
    base = PreviousVersion(Folder(layout.root), describe(Folder(layout.root)))
    journal = captured_journal(layout.journal(0, 1), part)
    written = compact(layout, [journal], HEADS, SAMPLER, previous=base, **options)
    facts = job_facts(options["capture"]) | {"source_rows": written.num_examples}
    promote(layout, build(facts, written), card=b"# card\n")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("row_group_bytes", [64 * 5, 64 * 7, 64 * 64, 1 << 23])
def test_a_dataset_that_grew_has_the_bytes_of_one_that_did_not(
    dtype: torch.dtype, row_group_bytes: int, tmp_path: Path
) -> None:
    options: Any = {**ALL_COLUMNS, "row_group_bytes": row_group_bytes, "threads": 2}
    of: Any = {"dtype": dtype, "offsets": True, "segments": True}
    whole, _ = make_dataset(tmp_path / "whole", Captured(**of), **options)
    expected, counts = file_bytes(whole.root), manifests.read(whole.root)
    del expected["manifest.json"]
    for cuts in ([4], [1, 2, 3, 11], [5, 6]):
        bounds = [0, *cuts, 12]
        grown = Layout(tmp_path / f"grown-{len(bounds)}-{bounds[1]}")
        journal = captured_journal(grown.journal(0, 1), Part(0, bounds[1], **of))
        written = compact(grown, [journal], HEADS, SAMPLER, **options)
        facts = job_facts(options["capture"]) | {"source_rows": written.num_examples}
        promote(grown, build(facts, written), card=b"# card\n")
        for first, last in itertools.pairwise(bounds[1:]):
            grow(grown, Part(first, last, **of), **options)
        found = file_bytes(grown.root)
        del found["manifest.json"]
        assert found == expected, cuts
        manifest = manifests.read(grown.root)
        for key in ("rows_by_bucket", "rows", "examples", "tokens", "truncated_examples", "segments", "files"):
            assert manifest[key] == counts[key], cuts


def test_an_example_is_never_added_twice(tmp_path: Path) -> None:
    layout, _ = make_dataset(tmp_path, Part(0, 6))
    manifest = manifests.read(tmp_path) | {"source_rows": 6}
    manifests.write(layout, manifest)
    journal = Journal(layout.journal(0, 1))
    with JournalWriter(journal, queue_bytes=1 << 20, segment_bytes=1 << 14) as writer:
        writer.complete([ExampleRecord(7, 1000 - 3, "again", 5, False, "0" * 32)])
    before = file_bytes(tmp_path)
    with pytest.raises(StoreError, match=r"example 7 \(example_id 997\) is in the finished dataset already"):
        compact(
            layout,
            [journal],
            HEADS,
            SAMPLER,
            previous=PreviousVersion(Folder(layout.root), describe(Folder(layout.root))),
        )
    assert file_bytes(tmp_path) == before


def write_texts(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text, "id": f"doc-{i}"}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the indices of the examples that are run."""
    seen: list[int] = []
    real = Capture.run

    def noting(capture: Capture, plan: Any) -> None:
        seen.extend(example.index for example in plan.examples)
        real(capture, plan)

    monkeypatch.setattr(Capture, "run", noting)
    return seen


@pytest.mark.few(1)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_raised_max_samples_runs_only_the_new_examples(
    streaming: bool, checkpoint: Path, texts: Path, tmp_path: Path, forwarded: list[int]
) -> None:
    sections: dict[str, Any] = {**ALONE, "dataset": {"streaming": streaming, "id_column": "id"}}
    whole = run(checkpoint, texts, tmp_path / "whole", **sections)
    root = tmp_path / "grown"
    for count in (5, 9, None):
        forwarded.clear()
        run(checkpoint, texts, root, **sections | {"dataset": sections["dataset"] | {"max_samples": count}})
        assert sorted(forwarded) == {5: [*range(5)], 9: [*range(5, 9)], None: [*range(9, 24)]}[count]
    assert hashes(root) == hashes(whole)
    grown_from = manifests.read(root)["grown_from"]
    assert [step["source_rows"] for step in grown_from] == [5, 9]
    assert grown_from[0]["versions"]["torch"] == torch.__version__
    forwarded.clear()
    run(checkpoint, texts, root, **sections | {"dataset": sections["dataset"] | {"max_samples": None}})
    assert forwarded == []


@pytest.mark.slow
def test_rows_appended_to_the_source_are_added(
    checkpoint: Path, tmp_path: Path, forwarded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    path, root = tmp_path / "texts.jsonl", tmp_path / "out"
    some = [*TEXTS[:4], "", *TEXTS[4:6]]
    write_texts(path, some)
    run(checkpoint, path, root, **ALONE)
    before = {name: keys(table) for name, table in heads_of(root).items()}
    forwarded.clear()
    write_texts(path, [*some, *TEXTS[6:9], "  ", TEXTS[9]])
    caplog.set_level("INFO")
    run(checkpoint, path, root, **ALONE)
    assert sorted(forwarded) == [7, 8, 9, 11]
    assert "adding to a finished dataset of 7 examples" in caplog.text
    manifest = manifests.read(root)
    assert (manifest["examples"], manifest["skipped_rows"], manifest["source_rows"]) == (10, 2, 12)
    for name, table in heads_of(root).items():
        found = keys(table)
        assert found[: len(before[name])] == before[name] and len(set(found)) == len(found)
    whole = run(checkpoint, path, tmp_path / "whole", **ALONE)
    assert hashes(root) == hashes(whole)


@pytest.mark.few(1)
@pytest.mark.parametrize("added", ["", "a"])
def test_heads_that_get_no_new_row_stay_as_they_are(added: str, checkpoint: Path, tmp_path: Path) -> None:
    path, root = tmp_path / "texts.jsonl", tmp_path / "out"
    few = {**ALONE, "sampler": {"type": "uniform", "base_rate": 0.01, "min_bucket_size": 16}}
    write_texts(path, TEXTS[:4])
    run(checkpoint, path, root, **few)
    before = heads_of(root)
    write_texts(path, [*TEXTS[:4], added])
    run(checkpoint, path, root, **few)
    assert heads_of(root) == before
    assert manifests.read(root)["source_rows"] == 5
    assert hashes(root) == hashes(run(checkpoint, path, tmp_path / "whole", **few))


@pytest.mark.slow
def test_batches_of_several_examples_give_the_same_vectors_within_rounding(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    whole = undisturbed()
    run(checkpoint, texts, tmp_path / "grown", dataset={"max_samples": 11})
    grown = run(checkpoint, texts, tmp_path / "grown")
    for name, table in heads_of(whole).items():
        other = heads_of(grown)[name]
        assert keys(table) == keys(other)
        np.testing.assert_allclose(vectors(table), vectors(other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_shards_add_to_a_dataset_of_one_job(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    whole = undisturbed(**ALONE)
    root = tmp_path / "grown"
    run(checkpoint, texts, root, **ALONE, dataset={"max_samples": 7})
    for index in range(3):
        assert manifests.read(root)["source_rows"] == 7, "readers have the old dataset until the new one is whole"
        run(checkpoint, texts, root, **ALONE, shard={"count": 3, "index": index})
    assert hashes(root) == hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_ids_of_one_digest_have_the_same_numbers_in_a_dataset_that_grew_and_in_shards(
    streaming: bool, checkpoint: Path, tmp_path: Path
) -> None:
    names = ["row-78153", "doc", "row-85955", "end"]  # the first and the third have the same digest
    lines = [json.dumps({"text": text, "id": name}) + "\n" for text, name in zip(TEXTS, names, strict=False)]
    texts, dataset = tmp_path / "texts.jsonl", {"id_column": "id", "streaming": streaming}
    texts.write_text("".join(lines), encoding="utf-8")
    grown, sharded = tmp_path / "grown", tmp_path / "sharded"
    for count in (2, None):
        run(checkpoint, texts, grown, **ALONE, dataset=dataset | {"max_samples": count})
    for index in range(2):
        run(checkpoint, texts, sharded, **ALONE, dataset=dataset, shard={"count": 2, "index": index})
    found = heads_of(grown)["l00h00q"]["example_id"].unique().to_pylist()
    assert found[2] == found[0] + 1 == 1015860119
    assert hashes(grown) == hashes(sharded)


@pytest.mark.slow
def test_a_killed_job_that_adds_goes_on_and_leaves_the_old_dataset_to_readers(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    forwarded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    whole = undisturbed(**ALONE)
    root = tmp_path / "grown"
    run(checkpoint, texts, root, **ALONE, dataset={"max_samples": 7})
    before = hashes(root)
    forwarded.clear()
    noting = Capture.run
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "run", lambda capture, plan: stop_at(15, plan, capture, noting))
        with pytest.raises(Stopped):
            run(checkpoint, texts, root, **ALONE)
    assert hashes(root) == before and manifests.read(root)["examples"] == 7
    with pytest.raises(StoreError, match="unfinished job over 24 examples"):
        run(checkpoint, texts, root, **ALONE, dataset={"max_samples": 7})
    done = set(forwarded)
    forwarded.clear()
    run(checkpoint, texts, root, **ALONE)
    assert not done & set(forwarded) and done | set(forwarded) == set(range(7, 24))
    assert hashes(root) == hashes(whole)


def job(checkpoint: Path, texts: Path, root: Path, **sections: Any) -> Any:
    return from_dict(settings(checkpoint, texts, root, **ALONE, **sections))


@pytest.mark.slow
def test_what_cannot_be_added_to_is_refused_and_stays_as_it_is(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", **ALONE, dataset={"max_samples": 9})
    before = hashes(root)
    with pytest.raises(StoreError, match=r"finished with 9 examples .* only 4 .* not shrink"):
        run_job(job(checkpoint, texts, root, dataset={"max_samples": 4}))
    with pytest.raises(StoreError, match="base_rate"):
        run_job(job(checkpoint, texts, root, sampler={"type": "uniform", "base_rate": 3.0}))
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    texts.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8")
    with pytest.raises(SourceError, match=r"example 1 .*the source has changed"):
        run_job(job(checkpoint, texts, root))
    texts.write_text("".join(lines), encoding="utf-8")
    assert hashes(root) == before and not (root / ".qk_sniffer").exists()

    head = root / "l01h00k" / "data.parquet"
    whole = head.read_bytes()
    head.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"l01h00k/data.parquet of .* is missing"):
        patch.setattr(Capture, "run", lambda *_: pytest.fail("new rows are captured before the old ones are compared"))
        run_job(job(checkpoint, texts, root))
    head.write_bytes(whole)
    assert hashes(root) == before
    run_job(job(checkpoint, texts, root))
    assert manifests.read(root)["examples"] == 24


@pytest.mark.slow
def test_a_base_that_is_gone_is_not_grown(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", **ALONE, dataset={"max_samples": 9})
    real = Capture.run
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "run", lambda capture, plan: stop_at(15, plan, capture, real))
        with pytest.raises(Stopped):
            run_job(job(checkpoint, texts, root))
    (root / "manifest.json").unlink()
    overwriting = job(checkpoint, texts, root, output={"data_root": str(root), "overwrite": True})
    with pytest.raises(StoreError, match="no longer the dataset that this job was adding to"):
        run_job(job(checkpoint, texts, root))
    before = hashes(root)
    with pytest.raises(StoreError, match=r"holds README\.md, .* which no dataset .* move it away"):
        run_job(overwriting)
    assert hashes(root) == before
    (tmp_path / "away").mkdir()
    for path in [path for path in root.iterdir() if path.name != ".qk_sniffer"]:
        path.rename(tmp_path / "away" / path.name)
    run_job(overwriting)
    assert manifests.read(root)["examples"] == 24 and manifests.read(root)["grown_from"] == []
