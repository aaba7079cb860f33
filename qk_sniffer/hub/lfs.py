"""Recognizes the small files that Git leaves in place of large ones that it has not fetched (Git LFS)."""

import re
from pathlib import Path

from qk_sniffer.errors import SourceError
from qk_sniffer.store.disk import open_regular

HEAD_BYTES = 1024
"""A pointer file is shorter than this."""

_POINTER = re.compile(rb"\Aversion https://git-lfs\.github\.com/spec/v\d+\n(?:[^\n]*\n)*?size (\d+)\s*", re.MULTILINE)


def pointer_problem(head: bytes) -> str | None:
    """Returns why a file that begins with `head` holds no data; None if it is not a pointer of Git LFS."""
    found = _POINTER.match(head)
    if found is None:
        return None
    return (
        f"it is a Git LFS pointer to a file of {int(found[1]):,} bytes, which was not fetched: run `git lfs pull` in "
        "its repository"
    )


def refuse_pointers(folder: Path, *patterns: str) -> None:
    """Checks that no file in `folder` of one of these patterns is a pointer of Git LFS.

    A file that cannot be read is left to its reader.

    Raises:
        SourceError: a file is one.
    """
    for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
        refuse_pointer(file)


def refuse_pointer(file: Path) -> None:
    """Checks that a file is no pointer of Git LFS. One that cannot be read is left to its reader.

    Raises:
        SourceError: it is one.
    """
    try:
        with open_regular(file) as opened:  # a pipe would be waited for
            content = opened.read(HEAD_BYTES)
    except OSError:
        return
    if len(content) < HEAD_BYTES and (problem := pointer_problem(content)):
        raise SourceError(f"{file} cannot be loaded: {problem}")


def refuse_pointers_of_model(folder: Path, gguf_file: str | None) -> None:
    """Checks that neither the config of a checkpoint nor its GGUF file, if it is loaded from one, is a pointer.

    Raises:
        SourceError: it is one.
    """
    refuse_pointer(folder / ("config.json" if gguf_file is None else gguf_file))
