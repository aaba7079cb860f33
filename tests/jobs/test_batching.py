"""The batch settings may change while a job is unfinished: rows stay the same, and the manifest records the changes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import Stopped, captured_only, hashes, heads_of, keys, run, vectors

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.capture.capture import Capture
from qk_sniffer.config import InferenceConfig
from qk_sniffer.errors import CaptureError
from qk_sniffer.store import manifest as manifests

Undisturbed = Callable[..., Path]


def inference(batch_size: int | None) -> dict[str, Any]:
    return {"batch_size": batch_size, "lookahead": 10}


def change(shard: int, index: int, batch_size: int | None) -> dict[str, Any]:
    settings = {"max_batch_tokens": 16384, "batch_size": batch_size, "lookahead": 10}
    return {"shard": shard, "from_index": index} | settings


def assert_same_rows(root: Path, whole: Path) -> None:
    found, wanted = heads_of(root), heads_of(whole)
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        assert keys(found[name]) == keys(table)
        np.testing.assert_allclose(vectors(found[name]), vectors(table), atol=1e-5)


@pytest.fixture
def stopped_after(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., set[int]]:
    """Runs a job that ends after some batches, at once; returns the examples of these batches."""
    real = Capture.run

    def stopped(batches: int, **sections: Any) -> set[int]:
        ran: list[set[int]] = []

        def some(self: Any, plan: Any) -> None:
            if len(ran) == batches:
                raise Stopped
            ran.append({example.index for example in plan.examples})
            real(self, plan)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Capture, "run", some)
            run(checkpoint, texts, tmp_path / "out", **sections)
        return set().union(*ran)

    return stopped


@pytest.mark.slow
def test_an_unfinished_job_resumes_with_other_batch_settings(
    stopped_after: Callable[..., set[int]],
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Undisturbed,
) -> None:
    root, first = tmp_path / "out", {"dataset": {"max_samples": 20}, "inference": inference(3)}
    done = stopped_after(2, **first)
    assert stopped_after(0, **first | {"inference": inference(None)}) == set(), "no example has these settings"
    second = stopped_after(2, **first | {"inference": inference(1)})
    assert done and len(second) == 2 and not done & second
    captured_only(checkpoint, texts, root, monkeypatch, **first)
    run(checkpoint, texts, root, **first | {"inference": inference(5)})  # it only makes the dataset
    manifest = manifests.read(root)
    third = set(range(20)) - done - second
    assert manifest["batching"] == [change(0, min(second), 1), change(0, min(third), 3)]
    assert manifest["fingerprint"]["inference.batch_size"] == 3
    assert manifest["config"]["inference"]["batch_size"] == 3

    # A finished dataset grows with other settings than those of its first start.
    run(checkpoint, texts, root, **first | {"dataset": {}, "inference": inference(2)})
    grown = manifests.read(root)
    assert grown["fingerprint"]["inference.batch_size"] == grown["config"]["inference"]["batch_size"] == 3
    assert grown["batching"] == [change(0, 20, 2)]
    assert [version["batching"] for version in grown["grown_from"]] == [manifest["batching"]]
    whole = undisturbed(inference=inference(3))
    assert manifests.read(whole)["batching"] == []
    assert_same_rows(root, whole)


@pytest.mark.slow
def test_each_shard_may_have_its_own_batch_settings(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    for index, batch_size in ((1, 3), (0, 1)):
        run(checkpoint, texts, tmp_path / "out", shard={"index": index, "count": 2}, inference=inference(batch_size))
    manifest = manifests.read(tmp_path / "out")
    assert manifest["batching"] == [change(0, 0, 1)] and manifest["fingerprint"]["inference.batch_size"] == 3
    assert_same_rows(tmp_path / "out", undisturbed(inference=inference(3)))


def test_the_way_out_of_a_full_memory_keeps_the_captured_examples(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Undisturbed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = undisturbed(inference=inference(3))
    real, ran = Backbone.run, []

    def run_or_fail(self: Backbone, ids: torch.Tensor) -> None:
        if len(ran) > 4 and len(ids) > 1:
            torch.empty(1 << 60, dtype=torch.uint8)  # raises the allocator's own error
        ran.append(ids)
        real(self, ids)

    monkeypatch.setattr(Backbone, "run", run_or_fail)
    given: dict[str, int] = {}
    for _ in range(8):
        try:
            with caplog.at_level("INFO", "qk_sniffer"):
                run(checkpoint, texts, tmp_path / "out", inference=inference(3) | given)
            break
        except CaptureError as error:
            way_out = re.search(r"rerun the command with inference\.(max_batch_tokens)=(\d+), which keeps", str(error))
            assert way_out is not None, error
            given = {way_out[1]: int(way_out[2])}
    manifest = manifests.read(tmp_path / "out")
    assert given and manifest["fingerprint"]["inference.max_batch_tokens"] == 16384
    assert manifest["batching"][-1]["max_batch_tokens"] == given["max_batch_tokens"]
    assert "resuming: " in caplog.text
    assert_same_rows(tmp_path / "out", expected)


@pytest.mark.slow
def test_a_job_of_an_earlier_version_continues_with_other_windows(
    stopped_after: Callable[..., set[int]],
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Undisturbed,
) -> None:
    """Earlier versions looked a number of texts ahead by default, and did not list it in segments."""
    root, first = tmp_path / "out", {"inference": inference(3)}
    with monkeypatch.context() as patch:
        patch.setattr(InferenceConfig, "batching", lambda self: {"max_batch_tokens": 16384, "batch_size": 3})
        done = stopped_after(2, **first)
    whole = undisturbed(inference=inference(3))
    run(checkpoint, texts, root, inference={"batch_size": 3})
    manifest = manifests.read(root)
    assert manifest["batching"] == [change(0, min({*range(24)} - done), 3) | {"lookahead": None}]
    assert manifest["fingerprint"]["inference.lookahead"] == 10
    assert_same_rows(root, whole)


def test_the_same_windows_are_no_change(
    stopped_after: Callable[..., set[int]],
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Undisturbed,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(InferenceConfig, "batching", lambda self: {"max_batch_tokens": 16384, "batch_size": 3})
        stopped_after(2, inference=inference(3))
    run(checkpoint, texts, tmp_path / "out", inference=inference(3))
    assert hashes(tmp_path / "out") == hashes(undisturbed(inference=inference(3)))
