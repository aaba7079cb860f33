"""Plants links in a data root while a job runs there: it ends with their names, and their targets stay as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import hashes, run
from support.steps import at

from qk_sniffer.errors import StoreError
from qk_sniffer.store import compact_statistics
from qk_sniffer.store.segment_writers import SegmentWriters

SECTIONS: dict[str, Any] = {
    "inference": {"batch_size": 4, "lookahead": 10},
    "capture": {"layers": [1], "statistics": {"enabled": True}},
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a segment as soon as any rows are queued, and one head after the other."""
    monkeypatch.setattr(SegmentWriters, "_is_due", lambda self: bool(self._queue))
    monkeypatch.setattr("qk_sniffer.jobs.assemble.num_threads", lambda: 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "place"),
    [
        ("compaction", ".qk_sniffer/staging/l01h00q"),
        ("move", "l01h00q"),
        ("segment", ".qk_sniffer/journal"),
        ("segment", ".qk_sniffer/journal/shard-00000-of-00001"),
        ("compaction", ".qk_sniffer/journal/shard-00000-of-00001"),
        ("compaction", ".qk_sniffer/staging"),
        ("proof", ".qk_sniffer/staging/l01h00q"),
        ("proof", ".qk_sniffer/staging/statistics"),
        ("promotion", ".qk_sniffer/staging/l01h00q"),
        ("move", "statistics"),
        ("move", "examples"),
    ],
)
def test_a_job_ends_with_the_name_of_a_link_in_its_way(
    step: str,
    place: str,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    root, user, moved = tmp_path / "out", tmp_path / "user", tmp_path / "moved"
    user.mkdir()
    for name in ("data.parquet", "layer-01.safetensors", "README.md"):
        (user / name).write_text("mine")

    def plant() -> None:
        if (root / place).exists():
            (root / place).rename(moved)
        (root / place).symlink_to(user)

    at(step, monkeypatch, plant)
    # A thread may look between the two: it finds nothing there.
    seen = rf"{root / place}( is (a link, which is not followed|not a folder)|\S*: No such file or directory)"
    with pytest.raises(StoreError, match=seen):
        run(checkpoint, texts, root, **SECTIONS)
    assert {path.read_text() for path in user.iterdir()} == {"mine"} and len([*user.iterdir()]) == 3
    (root / place).unlink()
    if moved.exists():
        moved.rename(root / place)
    assert hashes(run(checkpoint, texts, root, **SECTIONS)) == hashes(undisturbed(**SECTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l01h00q/data.parquet", "statistics/layer-01.safetensors.tmp"])
def test_a_link_with_the_name_of_a_file_is_replaced_and_not_its_target(
    name: str,
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Path],
) -> None:
    root, mine = tmp_path / "out", tmp_path / "mine.txt"
    mine.write_text("mine")
    staged = root / ".qk_sniffer" / "staging" / name

    def plant() -> None:
        staged.parent.mkdir()
        staged.symlink_to(mine)

    if name.startswith("statistics"):
        monkeypatch.setattr(compact_statistics, "encode", _after(plant, compact_statistics.encode))
    else:
        at("compaction", monkeypatch, plant)
    assert hashes(run(checkpoint, texts, root, **SECTIONS)) == hashes(undisturbed(**SECTIONS))
    assert mine.read_text() == "mine"


def _after(act: Callable[[], None], real: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `real`, called after `act`."""

    def both(*args: Any) -> Any:
        act()
        return real(*args)

    return both
