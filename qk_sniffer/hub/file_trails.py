"""Notices that a path has led to another file for a moment, even if it leads back to the first one afterwards.

The content of a file is compared at one moment, and a library opens its path at another. A link on the way, the folder
or the file may be swapped in between, and swapped back.
"""

import stat
from collections.abc import Iterable
from pathlib import Path

from qk_sniffer.errors import SourceError

_MOST_LINKS = 40
"""The links on a path that Linux follows."""

_Entry = tuple[str, int, int, int, int, int]
"""A path, with device, inode, size, and the times of the last changes of content and of attributes.

A rename changes the last time, which cannot be set.
"""


class Trails:
    """The links and files that some paths lead over and to, at the time that this was made."""

    def __init__(self, folder: Path, paths: Iterable[Path]) -> None:
        """Looks up `paths`, which are in `folder` or folders in it, and these folders."""
        folders = {folder, *(path.parent for path in paths)}
        self._before = {path: _trail(path) for path in sorted(folders.union(paths))}

    def check(self, what: str) -> None:
        """Checks that nothing on the way has been replaced, renamed or written, nor any entry of the folders.

        Raises:
            SourceError: something has. The message begins with `what`.
        """
        for path, before in self._before.items():
            if _trail(path) != before:
                raise SourceError(
                    f"{what}: {path}, or a link on its way, was replaced, renamed or written while it was loaded. "
                    "Rerun the command, which keeps what was captured before. Give a checkpoint that is written again "
                    "and again a copy of its own"
                )


def _trail(path: Path) -> list[_Entry]:
    """Returns the links on the way of a path, in the order of their use, and what it leads to."""
    found: list[_Entry] = []
    pending, here = list(reversed(path.absolute().parts)), Path("/")
    while pending:
        part = pending.pop()
        here = here.parent if part == ".." else here / part
        try:
            facts = here.lstat()
        except OSError:  # its reader reports it
            return [*found, (str(here), 0, 0, 0, 0, 0)]
        if stat.S_ISLNK(facts.st_mode) or not pending:
            found.append((str(here), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
        if stat.S_ISLNK(facts.st_mode) and len(found) <= _MOST_LINKS:
            target = here.readlink()
            pending += reversed(target.parts)
            here = Path("/") if target.is_absolute() else here.parent
    return found
