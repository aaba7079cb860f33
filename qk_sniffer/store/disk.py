"""Wraps the file system: durable writes, checks of free space, and errors that name the path."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from qk_sniffer.errors import StoreError
from qk_sniffer.store.open_folder import PLAIN, Access, OddFileError, regular
from qk_sniffer.store.own_files import IsOwn, refuse_foreign, rename_over_own, temporary_name

PARQUET_SHARE = 0.75
"""The size of a head's Parquet file divided by that of its vectors in the model's own dtype. Measured with random
mantissas: 0.72 for bfloat16, 0.86 for float32, whose journal is twice as large."""


RESUME = "Everything that was complete is kept: solve this and rerun the command to resume"
"""The way out when a job cannot read or write a file."""


def write_atomic(
    path: Path, data: bytes, *, access: Access = PLAIN, is_own: IsOwn | None = None, way_out: str = RESUME
) -> None:
    """Writes `path` whole or not at all, and durably. Replaces an existing file.

    In a folder that a user names, `is_own` says which files may be replaced. None is for a folder whose files are all
    of this package. `way_out` ends the error.

    Raises:
        StoreError: the file cannot be written, or is of someone else.
    """
    temporary = f"{path.name}.tmp" if is_own is None else temporary_name(path.name)
    with explained(path, "write", way_out), access.open(path.parent) as folder:
        access.check()
        if is_own is not None:
            refuse_foreign(folder, path.name, is_own)
        with folder.temporary(temporary) as file:
            file.write(data)
            file.flush()
            sync_file(file.fileno())
            access.check()
            rename_over_own(folder, temporary, path.name, is_own)
        folder.sync()


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. Does not wait for the writer of a pipe, and opens no device.

    Raises:
        OddFileError: it is not a regular file.
        OSError: it cannot be opened.
    """
    return regular(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), path)


def open_file(path: Path, access: Access = PLAIN) -> BufferedReader:
    """Opens a regular file for reading; a link is not followed.

    Raises:
        OddFileError: it is not a regular file, or a link is in the way.
        OSError: it cannot be opened.
    """
    with access.open(path.parent) as folder:
        return folder.open(path.name)


def type_of(path: Path, access: Access = PLAIN) -> str | None:
    """Returns what is at `path`, without following links: "file", "folder", "link" or "special file"; None: nothing."""
    try:
        with access.open(path.parent) as folder:
            return folder.type_of(path.name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def paths_in(folder: Path, access: Access = PLAIN) -> list[Path]:
    """Returns the paths in a folder, sorted; none if there is no such folder."""
    try:
        with access.open(folder) as found:
            return [folder / name for name in found.names()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def real_path(path: Path) -> Path:
    """Returns the path that `path` leads to when all links are followed. What is missing there stays as it is.

    `os.path.realpath` takes an entry for no link if its path is longer than the system allows. A shorter path with
    links leads to it all the same, and on from there.

    Raises:
        StoreError: a path on the way is too long.
    """
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise StoreError(
                f"{path} leads over a path that is longer than the system allows, where links cannot be followed: it "
                "is not read. Give its files and folders shorter names"
            ) from None
    return Path(os.path.realpath(path))


def walk(
    folder: Path, left_out: Callable[[OSError], None] = lambda _: None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields every folder from `folder` on with the sorted names of its folders and its other entries, as `os.walk`.

    A caller may remove names of folders, which are then not entered. Links are not followed. A folder that cannot be
    read is left out, and `left_out` gets its error. The depth is not limited by the recursion of Python.
    """
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            with os.scandir(path) as entries:
                found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError as error:
            left_out(error)
            continue
        folders = [name for name, is_folder in found if is_folder]
        yield path, folders, [name for name, is_folder in found if not is_folder]
        waiting.extend(path / name for name in reversed(folders))


def remove(path: Path, access: Access = PLAIN) -> None:
    """Removes what is at `path`, if there is anything: a folder with its content, or a link and not its target.

    Raises:
        StoreError: it cannot be removed.
    """
    access.check()
    with explained(path, "remove"), suppress(FileNotFoundError), access.open(path.parent) as folder:
        folder.remove(path.name, access.check)


def sync_file(descriptor: int) -> None:
    """Returns when the file's bytes are on the disk."""
    os.fsync(descriptor)


def sync_folder(folder: Path, access: Access = PLAIN) -> None:
    """Returns when the names in `folder` are on the disk."""
    with access.open(folder) as found:
        found.sync()


def make_folder(folder: Path, access: Access = PLAIN) -> None:
    """Creates `folder` and its missing parents durably."""
    access.open(folder, create=True).close()


@contextmanager
def explained(path: Path, action: str, way_out: str = RESUME) -> Iterator[None]:
    """Turns an OSError of the block into a StoreError that names `path` and the way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, OddFileError):
            reason = f"{error.filename} is {reason}"
        raise StoreError(f"cannot {action} {path}: {reason}. {way_out}") from error


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a regular file, in hex."""
    with open_regular(path) as file:
        return digest_of(file)


def digest_of(file: BufferedReader) -> str:
    """Returns the sha256 of an open file, in hex."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def required_bytes(num_vectors: int, head_dim: int, itemsize: int) -> int:
    """Returns the bytes on disk of `num_vectors` vectors of `head_dim` numbers of `itemsize` bytes each.

    Counts journal and Parquet together, because both exist during compaction. A margin of a tenth covers the other
    columns.
    """
    journal = num_vectors * head_dim * itemsize
    return int(1.1 * (1 + PARQUET_SHARE * (1.2 if itemsize > 2 else 1.0)) * journal)


def required_statistics_bytes(num_heads: int, head_dim: int, groups: int, *, covariance: bool) -> int:
    """Returns the bytes on disk of the statistics of `num_heads` heads, counted once for each stage.

    Counts the dataset's and those of `groups` groups of batches in the journal, because both exist during compaction.
    """
    of_head = 4 * (head_dim**2 if covariance else head_dim) + 24 * head_dim + 64
    return int(1.1 * num_heads * of_head * (groups + 1))


LESS_SPACE = (
    "Choose another output.data_root, fewer examples (dataset.max_samples), fewer heads (capture.head_sampling.count) "
    "or a lower sampler.base_rate"
)
"""The ways out of a job that needs more space than there is."""


def ensure_space(root: Path, required: int, *, way_out: str = LESS_SPACE) -> None:
    """Checks that `required` bytes are free on the disk of `root`, which need not exist yet.

    `way_out` ends the error.

    Raises:
        StoreError: less is free. The error gives both figures.
    """
    folder = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < required:
        raise no_space(root, required, free, way_out=way_out)


def no_space(root: Path, required: int, free: int, *, way_out: str = LESS_SPACE) -> StoreError:
    """Returns the error of a job that needs `required` bytes on the disk of `root`, where `free` bytes are free."""
    return StoreError(
        f"not enough disk space at {root}: about {_gigabytes(required)} are needed (journal and dataset "
        f"together) and {_gigabytes(free)} are free. {way_out}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
