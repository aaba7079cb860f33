"""Gives access to the files of a finished dataset, in a folder or on a branch of the Hub (`hub/branch.py`)."""

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import digest_of, open_file, open_regular, real_path
from qk_sniffer.store.open_folder import OddFileError, anchored
from qk_sniffer.store.stored import UnreadableError


class Files(Protocol):
    """The files of a dataset by their names relative to its root, with slashes: `l00h00q/data.parquet`."""

    def path(self, name: str, size: int | None = None) -> Path:
        """Returns the path of the file on this machine. In a folder it may be missing.

        If needed, it is fetched. A file that does not have `size` bytes is not.
        """

    def refetch(self, name: str, size: int | None = None) -> Path:
        """Returns the path of a file that was damaged; fetches it a second time if it was fetched.

        A file that does not have `size` bytes is not.
        """

    def fetch(self, sizes: Mapping[str, int]) -> None:
        """Fetches several files at once, which `path` would fetch one by one. `sizes` has their bytes by name."""

    def __str__(self) -> str:
        """The name of the dataset in messages."""


@dataclass(frozen=True)
class Folder:
    """The files below `root`."""

    root: Path

    def path(self, name: str, size: int | None = None) -> Path:
        """Returns the path of the file, of whatever size it is.

        Raises:
            StoreError: a link leads out of the dataset.
        """
        return inside(self.root, name)

    def refetch(self, name: str, size: int | None = None) -> Path:
        return self.path(name)

    def fetch(self, sizes: Mapping[str, int]) -> None:
        pass  # they are on this machine

    def __str__(self) -> str:
        return str(self.root)


def inside(root: Path, name: str) -> Path:
    """Returns the path of the file `name` of the dataset at `root`, which no link leads out of.

    A folder in the cache of huggingface_hub consists of links to its neighbour `blobs`. There, those that came by Xet
    are links to the `blobs` of the whole cache.

    Raises:
        StoreError: the file is elsewhere.
    """
    _resolved(root, name)
    return root / name


def open_inside(root: Path, name: str) -> BufferedReader:
    """Opens the file `name` of the dataset at `root`, as `inside` finds it.

    Opens the resolved path, and follows no link in it: a file or folder that is replaced by a link after the check is
    an error.

    Raises:
        StoreError: the file is elsewhere.
        OddFileError: it is not a regular file, or has become a link.
        OSError: it cannot be opened.
    """
    base, target = _resolved(root, name)
    if target == base:
        raise OddFileError(errno.EISDIR, "not a file", str(target))
    with anchored(base) as access:
        return open_file(target, access)


def _resolved(root: Path, name: str) -> tuple[Path, Path]:
    """Returns the resolved path of the file `name`, after the resolved folder that it is in.

    Raises:
        StoreError: it is neither in `root` nor, for a folder in the cache, among its blobs or those of the cache.
    """
    # Unlike `Path.resolve`, `real_path` gives a path for a link to itself too. Opening it fails.
    path, real = root / name, real_path(root)
    target = real_path(path)
    if target.is_relative_to(real):
        return real, target
    blobs = real.parent.parent / "blobs"
    if real.parent.name == "snapshots" and target.is_relative_to(blobs):
        return blobs, target
    shared = real.parent.parent.parent / "blobs"
    name_in_cache = target.relative_to(shared).as_posix() if target.is_relative_to(shared) else ""
    if real.parent.name == "snapshots" and _SHARED_BLOB.fullmatch(name_in_cache):
        return shared, target
    raise StoreError(f"{path} leads out of the dataset, to {target}: it is not read. Replace it by a copy of the file")


_SHARED_BLOB = re.compile("[0-9a-f]{2}/[0-9a-f]{64}")
"""The names in the `blobs` of the whole cache of huggingface_hub."""


def difference(path: Path, size: int) -> str | None:
    """Returns how the file at `path` differs from one of `size` bytes, without reading it; None if it does not.

    Only a regular file can be the same.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    return None if found.st_size == size else f"has {found.st_size:,} bytes instead of {size:,}"


class Comparison:
    """Compares files with their hashes: once, and again when a file was replaced or written to."""

    def __init__(self) -> None:
        self._states: dict[Path, tuple[int, ...]] = {}
        """Numbers that differ when a file is replaced or written to, for each file that was compared."""

    @contextmanager
    def intact(self, path: Path, sha256: str, *, way_out: str) -> Iterator[Path]:
        """Yields the path of a file for a block that reads it.

        Within the block, in this thread, `compared_file` opens no other file at this path: folders that are swapped,
        and swapped back, leave a path as it was.

        Raises:
            UnreadableError: the file is missing, has another hash than `sha256`, or was changed during the block. The
                message ends with `way_out`.
        """
        try:
            before = self._compared(path, sha256)
            if before is None:
                raise UnreadableError(path, "is damaged, or of another dataset: its sha256 differs", way_out)
            with reading(path, before):
                yield path
            if state_of(path) != before:
                raise UnreadableError(path, _CHANGED, way_out)
        except OSError as error:
            raise UnreadableError(path, f"is missing or damaged ({error.strerror})", way_out) from error

    def matches(self, path: Path, sha256: str) -> bool:
        """Whether a file has the hash `sha256`. A block that is to read it must use `intact`.

        Raises:
            OSError: the file cannot be read.
        """
        return self._compared(path, sha256) is not None

    def _compared(self, path: Path, sha256: str) -> tuple[int, ...] | None:
        """Returns the state of a file from before its comparison; None if it has another hash."""
        with open_regular(path) as file:  # once: another one may be at this path for the moment of the comparison
            before = _state(os.fstat(file.fileno()))
            if before != self._states.get(path):
                if digest_of(file) != sha256:
                    return None
                self._states[path] = before
        return before


_CHANGED = "was changed while it was read"


class _Reading(threading.local):
    """The states of the files that blocks of `reading` read in this thread, by their paths."""

    def __init__(self) -> None:
        self.files: dict[Path, list[tuple[int, ...]]] = {}


_reading = _Reading()


@contextmanager
def reading(path: Path, state: tuple[int, ...]) -> Iterator[None]:
    """Has `compared_file` open no other file at `path` than the one with this `state`, in a block and its thread."""
    being_read = _reading.files.setdefault(path, [])
    being_read.append(state)
    try:
        yield
    finally:  # of a generator, maybe in another thread
        being_read.remove(state)


@contextmanager
def compared_file(path: Path, *, way_out: str) -> Iterator[Path]:
    """Yields a path for a library that opens the file at `path`.

    Within `reading`, it is one of that file and of no other: that of its descriptor.

    Raises:
        UnreadableError: another file is at `path` now.
        OSError: there is none.
    """
    compared = _reading.files.get(path)
    if not compared or not DESCRIPTORS.is_dir():
        yield path
        return
    with open_regular(path) as file:
        if _state(os.fstat(file.fileno())) != compared[-1]:
            raise UnreadableError(path, _CHANGED, way_out)
        yield DESCRIPTORS / str(file.fileno())


DESCRIPTORS = Path("/dev/fd")
"""Has a name for each descriptor of a process, on Linux and macOS."""


def state_of(path: Path) -> tuple[int, ...]:
    """Returns numbers that differ when a file is replaced or written to, also by one of its size.

    Raises:
        OSError: there is no such file.
    """
    return _state(path.stat())


def _state(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
