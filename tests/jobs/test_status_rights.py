"""Tests that the table of jobs tells of what this user may not read, and does not leave it out silently."""

import tempfile
from pathlib import Path

from support.rights import without_root
from support.store_cases import Captured, make_dataset

from qk_sniffer.jobs.status import look


def test_what_may_not_be_read_is_told() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for each in ("closed", "sealed"):
            (folder / each).mkdir()
            make_dataset(folder / each, Captured())
        (folder / "open" / "job").mkdir(parents=True)
        (folder / "closed").chmod(0)
        (folder / "sealed" / "manifest.json").chmod(0)
        problems: list[str] = []
        try:
            with without_root():
                assert look(folder, lambda error: problems.append(str(error))) == []
        finally:
            (folder / "closed").chmod(0o700)
    assert len(problems) == 2
    for each, problem in zip(("closed", "sealed/manifest.json"), sorted(problems), strict=True):
        assert problem.startswith(f"{folder / each} cannot be read: Permission denied: change its rights")
