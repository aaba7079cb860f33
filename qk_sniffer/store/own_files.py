"""Tells files of this package from those of others in a folder that a user names, and replaces only its own.

The name of a file does not tell: `heads.csv` or `status.json` may be anyone's. A file is of this package if its content
says so. An empty file is anyone's too, but replacing it loses nothing.
"""

import os
import re
import secrets
from collections.abc import Callable

from qk_sniffer.errors import StoreError
from qk_sniffer.store.open_folder import OpenFolder

IsOwn = Callable[[OpenFolder, str], bool]
"""Whether a file of an open folder is one that this package has written. Called only for regular files."""

MADE_BY = {"made_by": "qk-sniffer"}
"""The metadata of a Parquet table of results."""

WAY_OUT = "move it away, or give the output another place"

_TEMPORARY = re.compile(r"\..+-[0-9a-f]{16}\.tmp", re.DOTALL)

_START, _END, _MOST = 1 << 13, 1 << 20, 1 << 26
"""The bytes of a file that are searched for a mark: at its start, at its end, and of one that may have it anywhere."""


def temporary_name(name: str) -> str:
    """Returns a new name for a file until it takes the place of `name`. No file of a user has it."""
    return f".{name}-{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` gives such names. A write that a kill interrupted leaves a file of one."""
    return _TEMPORARY.fullmatch(name) is not None


def refuse_foreign(folder: OpenFolder, name: str, is_own: IsOwn, way_out: str = WAY_OUT) -> None:
    """Checks that nothing of someone else has a name in an open folder. `way_out` ends the error.

    Raises:
        StoreError: something has it: a file that `is_own` does not know, a link, or no file.
    """
    kind = folder.type_of(name)
    if kind is None or (kind == "file" and (_is_empty(folder, name) or is_own(folder, name))):
        return
    problem = "was not written by qk-sniffer" if kind == "file" else f"is a {kind}"
    raise StoreError(f"{folder.path / name} {problem}, and is not replaced: {way_out}")


def rename_over_own(
    folder: OpenFolder, temporary: str, name: str, is_own: IsOwn | None, way_out: str = WAY_OUT
) -> None:
    """Renames a file of an open folder. Replaces nothing of someone else; None as `is_own`: anything.

    Raises:
        StoreError: as `refuse_foreign`.
    """
    if is_own is None:
        folder.rename(temporary, folder, name)
        return
    refuse_foreign(folder, name, is_own, way_out)
    if folder.type_of(name) is None:
        try:
            folder.rename_to_free(temporary, name)
        except FileExistsError:  # it has appeared meanwhile
            refuse_foreign(folder, name, is_own, way_out)
        else:
            return
    folder.rename(temporary, folder, name)


def starts_with(pattern: bytes) -> IsOwn:
    """Returns a check of files whose first bytes match a regular expression."""
    return _finds(re.compile(pattern).match, _START)


def contains(pattern: bytes) -> IsOwn:
    """Returns a check of files, of up to 64 MB, in which a regular expression finds something."""
    return _finds(re.compile(pattern).search, _MOST)


def is_marked_table(folder: OpenFolder, name: str) -> bool:
    """Whether a file is a Parquet table whose metadata have `MADE_BY`."""
    with folder.open(name) as file:
        start = file.read(4)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END))
        return start == b"PAR1" and _MARK.search(file.read(_END)) is not None


_MARK = re.compile(b"|".join(rb"%b.{1,4}%b" % (key.encode(), value.encode()) for key, value in MADE_BY.items()), re.S)


def _finds(find: Callable[[bytes], object], most: int) -> IsOwn:
    """Returns a check of files in whose first bytes, at most `most`, `find` finds something."""

    def is_own(folder: OpenFolder, name: str) -> bool:
        with folder.open(name) as file:
            return find(file.read(most)) is not None

    return is_own


def _is_empty(folder: OpenFolder, name: str) -> bool:
    return folder.lstat(name).st_size == 0
