"""Files are removed whatever the folders around them look like."""

import os
from pathlib import Path

from support.surroundings import deepen

from qk_sniffer.store.disk import remove


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
