"""A dataset that is not what its manifest says is not added to: the job would prove a few of its examples alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file
from support.jobs import hashes, run
from support.verify_cases import restate, rewrite, with_values

from qk_sniffer.capture.capture import Capture
from qk_sniffer.dataset.verify import verify, verify_data
from qk_sniffer.errors import StoreError

SECTIONS: dict[str, Any] = {"capture": {"layers": [1], "heads": [0], "statistics": {"enabled": True}}}
HEAD, STATISTICS = "l01h00q/data.parquet", "statistics/layer-01.safetensors"


@pytest.fixture
def root(undisturbed: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished dataset of the first eight texts, which a test may change."""
    return Path(shutil.copytree(undisturbed(dataset={"max_samples": 8}, **SECTIONS), tmp_path / "out"))


def in_rows(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda root: rewrite(root, HEAD, change)


def double_means(root: Path) -> None:
    arrays = load_file(root / STATISTICS)
    save_file({name: array * (2 if "mean" in name else 1) for name, array in arrays.items()}, root / STATISTICS)
    restate(root)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_rows(lambda table: table.slice(0, len(table) // 2)), "rows that the sampler chooses are missing"),
        (in_rows(lambda table: with_values(table, "example_id", {0: 99})), "examples/data.parquet does not have"),
        (in_rows(lambda table: pa.concat_tables([table, table[-1:]])), "occurs twice"),
        (in_rows(lambda table: with_values(table, "sliding_window", {0: 999})), "sliding_window does not match"),
        (in_rows(lambda table: with_values(table, "vector", {3: [float("nan")] * 16})), "vectors with NaN or Inf"),
        (double_means, "mean is not that of the rows"),
    ],
)
def test_it_is_not_added_to(
    change: Callable[[Path], None],
    message: str,
    root: Path,
    checkpoint: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(root)
    before, manifest = hashes(root), (root / "manifest.json").read_bytes()
    assert verify(root).problems
    monkeypatch.setattr(Capture, "run", lambda *_: pytest.fail("it captures"))
    with pytest.raises(StoreError, match=f"nothing can be added to {root}, which is not whole:\n(.*\n)*.*{message}"):
        run(checkpoint, texts, root, dataset={"max_samples": 12}, **SECTIONS)
    assert hashes(root) == before and (root / "manifest.json").read_bytes() == manifest
    assert not (root / ".qk_sniffer").exists()


def test_with_overwrite_it_is_replaced(
    root: Path, checkpoint: Path, texts: Path, undisturbed: Callable[..., Path]
) -> None:
    double_means(root)
    run(checkpoint, texts, root, dataset={"max_samples": 12}, output={"overwrite": True}, **SECTIONS)
    assert hashes(root) == hashes(undisturbed(dataset={"max_samples": 12}, **SECTIONS))
    assert json.loads((root / "manifest.json").read_text())["proof"]["proven"]


def test_the_check_ends_with_its_job(root: Path) -> None:
    stop = Event()
    assert not verify_data(root, stop).problems
    stop.set()
    with pytest.raises(StoreError, match="was stopped"):
        verify_data(root, stop)
