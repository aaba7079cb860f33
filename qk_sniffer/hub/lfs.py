"""Recognizes the small files that Git leaves in place of large ones that it has not fetched (Git LFS)."""

import glob
import re
from pathlib import Path

from qk_sniffer.errors import SourceError

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
        try:
            if file.stat().st_size >= HEAD_BYTES:
                continue
            problem = pointer_problem(file.read_bytes())
        except OSError:
            continue
        if problem:
            raise SourceError(f"{file} cannot be loaded: {problem}")


def refuse_pointers_of_weights(folder: Path, gguf_file: str | None) -> None:
    """Checks that the weights that a checkpoint is loaded from are no pointers of Git LFS.

    Raises:
        SourceError: a file is one.
    """
    if gguf_file is not None:
        refuse_pointers(folder, glob.escape(gguf_file))
    elif any(folder.glob("*.safetensors")):  # other formats of the same weights are not loaded
        refuse_pointers(folder, "*.safetensors", "config.json")
    else:
        refuse_pointers(folder, "*.bin", "config.json")
