"""Files are removed whatever the folders around them look like."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.surroundings import deepen

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.examples import open_corpus
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import job_status, sweep
from qk_sniffer.jobs.status import look
from qk_sniffer.store.disk import remove, walk
from qk_sniffer.store.open_folder import PLAIN, Checked, OpenFolder


@pytest.mark.slow
def test_a_folder_of_any_depth_is_removed(tmp_path: Path) -> None:
    deepen(tmp_path / "deep", 1100)
    (tmp_path / "deep" / "file").write_text("x")
    remove(tmp_path / "deep")
    assert not os.path.lexists(tmp_path / "deep")


def test_the_targets_of_links_stay(tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "file").write_text("mine")
    folder = tmp_path / "folder" / "a" / "b"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent, folder.parent.parent):
        (place / "to-folder").symlink_to(tmp_path / "user")
        (place / "to-file").symlink_to(tmp_path / "user" / "file")
    remove(tmp_path / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "user")
    remove(tmp_path / "link")
    remove(tmp_path / "link")  # nothing is there
    assert [path.name for path in tmp_path.iterdir()] == ["user"]
    assert (tmp_path / "user" / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_deep_folder_of_someone_else_hides_nothing_and_is_no_error(tmp_path: Path) -> None:
    deep, sweeps = tmp_path / "texts" / "deep", tmp_path / "sweep"
    deepen(deep, 1500)
    sweeps.mkdir()
    status = job_status.Status(3, str(tmp_path / "root"), "m", state=job_status.FAILED, began=True)
    status.write(sweeps)
    (deep / "a.txt").write_text("a text")
    (tmp_path / "texts" / ".hidden").mkdir()
    (tmp_path / "texts" / ".hidden" / "b.txt").write_text("hidden")
    (tmp_path / "texts" / "link").symlink_to(tmp_path)
    try:
        assert [line.status.number for line in look(tmp_path)] == [3]
        assert list(sweep.statuses(tmp_path)) == [3]
        assert [example.content for example in open_corpus(DatasetConfig(path=str(deep.parent))).examples()] == [
            "a text"
        ]
        folders = [path for path, _, _ in walk(deep)]
        assert folders[0] == deep and len(folders) > 600, "those whose path is not too long"
    finally:
        remove(deep)


def test_a_folder_that_takes_the_place_of_a_removed_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for each in (folder, other):
        (each / "inner").mkdir(parents=True)
        (each / "inner" / "file").write_text(each.name)
    real = OpenFolder.folder

    def check() -> None:
        if (folder / "inner" / "file").read_text() != "folder":
            raise StoreError("replaced")

    def open_another(*arguments: Any) -> OpenFolder:
        monkeypatch.undo()
        folder.rename(tmp_path / "away")
        other.rename(folder)
        return real(*arguments)

    monkeypatch.setattr(OpenFolder, "folder", open_another)
    with pytest.raises(StoreError, match="replaced"):
        remove(folder, Checked(PLAIN, check))
    assert (folder / "inner" / "file").exists() and (tmp_path / "away" / "inner" / "file").exists()
