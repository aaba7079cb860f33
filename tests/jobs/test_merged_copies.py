"""Copies of an unfinished data root that both continue, and whose journals are then put into one folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import hashes, run, stopped_after

from qk_sniffer.store.finished_batches import GroupEnd
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.segment_writers import SegmentWriters

SECTIONS: dict[str, Any] = {"inference": {"batch_size": 4, "lookahead": 10}, "capture": {"layers": [0, 1]}}

SIZES = [(3, 5), (2, 3), (3, 2), (3, 4), (2, 7), (7, 2)]


def small_segments(batches: int, segment_items: int, checkpoint: Path, texts: Path, root: Path) -> None:
    """Runs a job that is killed in its capture; its segments have `segment_items` items or batches."""

    def is_due(self: Any) -> bool:
        return bool(self._queue) and (self._closing or len(self._queue) >= segment_items)

    def items(self: Any) -> Any:
        taken = [self._queue.popleft() for _ in range(min(segment_items, len(self._queue)))]
        for _ in filter(lambda item: isinstance(item, GroupEnd), taken):
            self._ends.popleft()
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentWriters, "_is_due", is_due)
        patch.setattr(SegmentWriters, "_items", items)
        stopped_after(batches, checkpoint, texts, root, **SECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), SIZES)
def test_no_row_is_lost_or_doubled(
    checkpoint: Path, texts: Path, tmp_path: Path, undisturbed: Callable[..., Path], one: int, other: int
) -> None:
    root, copy = tmp_path / "out", tmp_path / "copy"
    small_segments(2, 3, checkpoint, texts, root)
    shutil.copytree(root, copy)
    small_segments(3, one, checkpoint, texts, root)
    small_segments(5, other, checkpoint, texts, copy)
    shutil.copytree(Layout(copy).journal(0, 1), Layout(root).journal(0, 1), dirs_exist_ok=True)
    assert hashes(run(checkpoint, texts, root, **SECTIONS)) == hashes(undisturbed(**SECTIONS))
