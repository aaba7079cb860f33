"""The limit of an unfinished stream may change: a late fault has a way out that keeps the captured examples."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import TEXTS, captured_only, hashes, run, settings, together

from qk_sniffer.capture.capture import Capture
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.jobs import capture_examples
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.open_folder import PLAIN
from qk_sniffer.store.record import read_record, stored_job_id, write_record

STREAM: dict[str, Any] = {"streaming": True, "id_column": "id", "filter": {"keep": True}}
ALONE: dict[str, Any] = {"batch_size": 1, "lookahead": 3}


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """A stream in which every fourth row is filtered out, row 5 has no text, and row 17 repeats the id of row 2."""
    rows = [{"text": text, "id": f"doc-{i}", "keep": i % 4 != 3} for i, text in enumerate(TEXTS)]
    rows[5]["text"], rows[17]["id"] = " ", "doc-2"
    path = tmp_path / "stream.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def facts(root: Path) -> list[Any]:
    manifest = manifests.read(root)
    return [
        manifest["source_rows"],
        manifest["skipped_rows"],
        manifest["config"],
        manifest["fingerprint"],
        hashes(root),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_the_way_out_of_a_late_fault_keeps_the_captured_examples(
    shards: int, checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ran = tmp_path / "out", []
    real = Capture.run

    def counted(self: Any, plan: Any) -> None:
        ran.extend(example.index for example in plan.examples)
        real(self, plan)

    monkeypatch.setattr(Capture, "run", counted)
    limits = set()
    for index in range(shards):
        with pytest.raises(SourceError, match="examples 2 and 17 have the same id 'doc-2'") as error:
            run(checkpoint, stream, root, dataset=STREAM, inference=ALONE, shard={"index": index, "count": shards})
        limits |= set(re.findall(r"rerun the command with dataset\.(max_samples)=(\d+)$", str(error.value)))
    assert limits == {("max_samples", "13")}, "13 rows pass the filter before row 17"
    captured = set(ran)
    assert len(captured) > 5 and max(captured) < 17
    dataset = STREAM | {key: int(value) for key, value in limits}
    for index in range(shards):
        run(checkpoint, stream, root, dataset=dataset, inference=ALONE, shard={"index": index, "count": shards})
    assert sorted(ran) == sorted(set(ran)) == [i for i in range(17) if i % 4 != 3 and i != 5], "each ran once"
    run(checkpoint, stream, tmp_path / "fresh", dataset=dataset, inference=ALONE)
    fresh = facts(tmp_path / "fresh")
    if shards > 1:
        fresh[3]["shard.count"] = shards
    assert facts(root) == fresh


@pytest.mark.slow
def test_shards_that_start_together_agree_on_the_new_limit(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    def sections(index: int, **dataset: int) -> dict[str, Any]:
        return {"dataset": STREAM | dataset, "inference": ALONE, "shard": {"index": index, "count": 3}}

    for index in range(3):
        with pytest.raises(SourceError, match=r"max_samples=13"):
            run(checkpoint, stream, tmp_path / "out", **sections(index))
    jobs = [settings(checkpoint, stream, tmp_path / "out", **sections(index, max_samples=13)) for index in range(3)]
    assert together(jobs) == [0, 0, 0]
    run(checkpoint, stream, tmp_path / "fresh", dataset=STREAM | {"max_samples": 13}, inference=ALONE)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_the_limit_of_an_unfinished_stream_rises_and_does_not_leave_out_captured_rows(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, sections = tmp_path / "out", {"inference": ALONE}
    captured_only(checkpoint, stream, root, monkeypatch, dataset=STREAM | {"max_samples": 5}, **sections)
    record, done = read_record(Layout(root)), Layout(root).shard_done(0, 1)
    with pytest.raises(
        StoreError, match=r"captured example 4 .*after those of dataset\.max_samples=3\. Raise dataset\.max_s"
    ):
        run(checkpoint, stream, root, dataset=STREAM | {"max_samples": 3}, **sections)
    assert done.exists() and read_record(Layout(root)) == record
    run(checkpoint, stream, root, dataset=STREAM | {"max_samples": 9}, **sections)
    fresh = run(checkpoint, stream, tmp_path / "fresh", dataset=STREAM | {"max_samples": 9}, **sections)
    assert facts(root) == facts(fresh)


def test_a_shard_that_ran_while_the_limit_changed_is_not_taken_for_captured(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, real = Layout(tmp_path / "out"), capture_examples.mark_done

    def change_first(*args: Any, **options: Any) -> None:
        record = read_record(layout)
        assert record is not None
        write_record(layout, record | {"source_rows": 3})
        real(*args, **options)

    mark: Callable[..., None] = change_first
    monkeypatch.setattr(capture_examples, "mark_done", mark)
    with pytest.raises(StoreError, match=r"while this shard ran.*rerun the command with dataset\.max_samples=3"):
        run(checkpoint, stream, layout.root, dataset=STREAM | {"max_samples": 5}, inference=ALONE)
    journal = Journal(layout.journal(0, 1), stored_job_id(layout, PLAIN))
    assert not layout.shard_done(0, 1).exists() and len(journal.records) == 4
    with pytest.raises(SourceError, match=r"example 4 was captured before, and the used ones end with example 2 now"):
        run(checkpoint, stream, layout.root, dataset=STREAM | {"max_samples": 3}, inference=ALONE)
