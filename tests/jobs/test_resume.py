"""Jobs start, stop, resume, and do not disturb each other."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import (
    QWEN3,
    TEXTS,
    Stopped,
    captured_only,
    hashes,
    heads_of,
    run,
    settings,
    stop_at,
    stopped_after,
    together,
    vectors,
)
from support.tiny import save_checkpoint

from qk_sniffer.backbone.layers import LayerHeads
from qk_sniffer.capture import capture as capture_module
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import hold
from qk_sniffer.store.segment_writers import SegmentWriters

pytestmark = pytest.mark.floor


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_work_of_a_version_that_selected_other_heads_is_not_continued(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version took layers that hide keys for those of full attention."""
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)[:6]
    few, capture = tmp_path / "few.jsonl", {"full_attention_only": True}
    unfinished, finished = tmp_path / "unfinished", tmp_path / "finished"
    few.write_text("".join(lines[:4]), encoding="utf-8")
    with monkeypatch.context() as earlier:
        earlier.setattr(LayerHeads, "full_attention", True)
        stopped_after(0, checkpoint, few, unfinished, capture=capture)
        run(checkpoint, few, finished, capture=capture, verify={"examples": 0})
    with pytest.raises(StoreError, match=r"unfinished job of an earlier version .* layers 0-2 there, of layers 1"):
        run(checkpoint, few, unfinished, capture=capture)
    run(checkpoint, few, finished, capture=capture)  # nothing to do
    few.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(StoreError, match=r"finished dataset of an earlier version .* layers 0-2 there, of layers 1"):
        run(checkpoint, few, finished, capture=capture)
    replaced = run(checkpoint, few, finished, capture=capture, output={"overwrite": True}, verify={"examples": 0})
    assert {name[:3] for name in heads_of(replaced)} == {"l01"}


@pytest.mark.slow
def test_other_rows_than_those_of_an_unfinished_job_are_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capture_module.Capture.run
    monkeypatch.setattr(capture_module.Capture, "run", lambda self, plan: stop_at(20, plan, self, real))
    sections: dict[str, Any] = {"inference": {"batch_size": 1, "lookahead": 1}}
    with pytest.raises(Stopped):
        run(checkpoint, texts, tmp_path / "out", **sections)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="over 24 examples of the dataset, and 5 are asked for"):
        run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": 5}, **sections)
    root = run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": 5}, output={"overwrite": True}, **sections)
    assert manifests.read(root)["examples"] == 5


@pytest.mark.slow
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
    with pytest.raises(SourceError, match=r"example 3 .*the source has changed"):
        run(checkpoint, moved, root)


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_job_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    after: int,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    sections = {"inference": {"batch_size": 3, "lookahead": 10}}
    whole = undisturbed(**sections)
    ran: list[set[int]] = []
    run_batch = capture_module.Capture.run

    def counted(self: Any, plan: Any) -> None:
        if len(ran) == after and not resumed:
            raise Stopped
        ran.append({example.index for example in plan.examples})
        run_batch(self, plan)

    monkeypatch.setattr(capture_module.Capture, "run", counted)
    resumed = False
    with pytest.raises(Stopped):
        run(checkpoint, texts, tmp_path / "broken", **sections)
    assert not (tmp_path / "broken" / "manifest.json").exists()
    resumed = True
    assert hashes(run(checkpoint, texts, tmp_path / "broken", **sections)) == hashes(whole)
    assert sorted(index for batch in ran for index in batch) == list(range(len(TEXTS))), "work was done twice, or not"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("harm", ["flip", "first gone", "last gone", "all gone"])
def test_a_journal_damaged_after_it_was_complete_is_mended(
    harm: str,
    streaming: bool,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    sections: dict[str, Any] = {
        "inference": {"batch_size": 1, "segment_mb": 1, "lookahead": 1},
        "dataset": {"streaming": streaming, "max_samples": 20},
    }
    whole = undisturbed(**sections)
    with monkeypatch.context() as patch:
        # A segment as soon as any rows are queued.
        patch.setattr(SegmentWriters, "_is_due", lambda self: bool(self._queue))
        captured_only(checkpoint, texts, tmp_path / "damaged", monkeypatch, **sections)
    segments = sorted((tmp_path / "damaged").rglob("*.safetensors"))
    assert len(segments) > 2
    if harm == "flip":
        data = bytearray(segments[0].read_bytes())
        data[-1] ^= 1
        segments[0].write_bytes(data)
    for path in {"flip": [], "first gone": segments[:1], "last gone": segments[-1:], "all gone": segments}[harm]:
        path.unlink()
    assert hashes(run(checkpoint, texts, tmp_path / "damaged", **sections)) == hashes(whole)


@pytest.mark.slow
def test_what_another_shard_has_lost_is_said_with_the_shard(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Path]
) -> None:
    root, alone = tmp_path / "out", {"batch_size": 1}
    run(checkpoint, texts, root, shard={"index": 1, "count": 2}, inference=alone)
    captured_only(checkpoint, texts, root, monkeypatch, shard={"index": 0, "count": 2}, inference=alone)
    (segment,) = Layout(root).journal(1, 2).glob("*.safetensors")
    segment.unlink()
    with pytest.raises(StoreError, match=r"held 12 when it was complete.*Rerun the job of shard\.index=1"):
        run(checkpoint, texts, root, shard={"index": 0, "count": 2}, inference=alone)
    run(checkpoint, texts, root, shard={"index": 1, "count": 2}, inference=alone)
    assert hashes(root) == hashes(undisturbed(inference=alone))


def test_a_finished_job_does_nothing(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    monkeypatch.setattr("qk_sniffer.jobs.components.load_backbone", None)
    run(checkpoint, texts, root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before
    assert "Nothing to do" in capsys.readouterr().out


def test_another_configuration_is_refused_with_the_keys_that_differ(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    before = hashes(root)
    with pytest.raises(
        StoreError, match=r"sampler\.seed: 0 there, 1 now(.|\n)*go back to the old values \(sampler\.seed=0\)"
    ) as error:
        run(checkpoint, texts, root, sampler={"seed": 1}, inference={"queue_mb": 7})
    assert "queue_mb" not in str(error.value) and "output.overwrite=true" in str(error.value)
    assert f"another folder (output.data_root={root}-2; " in str(error.value)
    with pytest.raises(StoreError, match="24 examples of the dataset, and only 5 are asked for"):
        run(checkpoint, texts, root, dataset={"max_samples": 5})
    assert hashes(root) == before


@pytest.mark.slow
def test_a_checkpoint_that_changed_is_refused(texts: Path, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(QWEN3, tmp_path / "model")
    root = run(checkpoint, texts, tmp_path / "out")
    save_checkpoint(QWEN3, checkpoint, dtype=torch.bfloat16)
    with pytest.raises(StoreError, match="commit of the model"):
        run(checkpoint, texts, root)


def test_a_source_that_changed_in_the_middle_is_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capture_module.Capture.run
    monkeypatch.setattr(capture_module.Capture, "run", lambda self, plan: stop_at(2, plan, self, real))
    sections = {"inference": {"batch_size": 1, "lookahead": 1}}
    with pytest.raises(Stopped):
        run(checkpoint, texts, tmp_path / "out", **sections)
    lines = texts.read_text(encoding="utf-8").splitlines()
    texts.write_text("\n".join([json.dumps({"text": "another", "id": "doc-0"}), *lines[1:]]) + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"example 0 .*not the text"):
        run(checkpoint, texts, tmp_path / "out", **sections)


@pytest.mark.slow
def test_a_source_that_changed_before_the_proof_is_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[..., Path]
) -> None:
    captured_only(checkpoint, texts, tmp_path / "out", monkeypatch)
    lines = [json.dumps({"text": "another", "id": f"doc-{i}"}) for i in range(len(TEXTS))]
    before = texts.read_text(encoding="utf-8")
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"not the text that was captured"):
        run(checkpoint, texts, tmp_path / "out")
    texts.write_text(before, encoding="utf-8")
    assert hashes(run(checkpoint, texts, tmp_path / "out")) == hashes(undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["_move", "remove_work"])
def test_an_overwriting_job_killed_while_it_promotes_does_not_start_over(
    moment: str,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    root = run(checkpoint, texts, tmp_path / "out", sampler={"seed": 1, "type": "uniform"})

    def fail(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(f"qk_sniffer.store.promote.{moment}", fail)
        run(checkpoint, texts, root, output={"overwrite": True})
    monkeypatch.setattr(capture_module.Capture, "run", fail)
    run(checkpoint, texts, root, output={"overwrite": True})
    monkeypatch.undo()
    assert hashes(root) == hashes(undisturbed())


@pytest.mark.slow
def test_a_finished_dataset_that_lacks_a_file_is_not_called_finished(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    (root / "l01h00q" / "data.parquet").unlink()
    with pytest.raises(StoreError, match=r"l01h00q/data\.parquet missing.*1 of \d+ files.*output\.overwrite=true"):
        run(checkpoint, texts, root)


@pytest.mark.slow
def test_overwrite_replaces_the_dataset_only_once_the_new_one_is_whole(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(checkpoint, texts, tmp_path / "out")
    before = hashes(root)
    again: dict[str, Any] = {"sampler": {"seed": 1, "type": "uniform"}, "capture": {"layers": [1]}}
    (tmp_path / "no-model").mkdir()
    with pytest.raises(SourceError, match="no-model"):
        run(tmp_path / "no-model", texts, root, output={"overwrite": True}, **again)
    real = capture_module.Capture.run
    monkeypatch.setattr(capture_module.Capture, "run", lambda self, plan: stop_at(0, plan, self, real))
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


def test_two_jobs_cannot_write_one_data_root(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from qk_sniffer.store.work_folder import prepare_data_root;"
        "from qk_sniffer.store.locks import hold; layout = prepare_data_root(Path(sys.argv[1]))\n"
        "with hold(layout.shard_lock(0, 1), 'capturing'):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=f"process {process.pid} on {os.uname().nodename}"):
            run(checkpoint, texts, tmp_path / "out")
        process.kill()
    time.sleep(0.1)
    run(checkpoint, texts, tmp_path / "out")
