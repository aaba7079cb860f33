"""Tells whether anything in a folder has changed, except below the folders that a program may write."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def state(folder: Path, *ours: Path) -> dict[str, tuple[object, ...]]:
    """Returns every name below `folder` with its type, permissions, time and content. Follows no link."""
    found: dict[str, tuple[object, ...]] = {}
    for name, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if Path(name, each) not in ours]
        for each in (*folders, *files):
            path = Path(name, each)
            facts = path.lstat()
            content: object = None
            if stat.S_ISLNK(facts.st_mode):
                content = str(path.readlink())
            elif stat.S_ISREG(facts.st_mode):
                content = path.read_bytes()
            found[path.relative_to(folder).as_posix()] = facts.st_mode, facts.st_mtime_ns, content
    return found


@contextmanager
def unchanged(folder: Path, *ours: Path) -> Iterator[None]:
    """Asserts that the block changes nothing below `folder`, except below `ours`."""
    before = state(folder, *ours)
    yield
    assert state(folder, *ours) == before


def deepen(path: Path, levels: int) -> None:
    """Creates `path` with as many folders in each other: more than Python recurses, or a path can name."""
    path.mkdir(parents=True)
    folder = os.open(path, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("inner", dir_fd=folder)
        inner = os.open("inner", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
