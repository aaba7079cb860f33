"""Wraps the file system: durable writes, checks of free space, and errors that name the path."""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from qk_sniffer.errors import StoreError

PARQUET_SHARE = 0.75
"""The size of a head's Parquet file divided by that of its vectors in the model's own dtype. Measured with random
mantissas: 0.72 for bfloat16, 0.86 for float32, whose journal is twice as large."""


Check = Callable[[], None]
"""Raises an error if the folder that a process writes to is no longer its own. Called before each step."""


def unchecked() -> None:
    """Is the check of a folder that no lock protects."""


def write_atomic(path: Path, data: bytes, *, check: Check = unchecked) -> None:
    """Writes `path` whole or not at all, and durably. Replaces an existing file."""
    temporary = path.with_name(path.name + ".tmp")
    with explained(path, "write"):
        check()
        with temporary_file(temporary) as file:
            file.write(data)
            file.flush()
            sync_file(file.fileno())
            check()
            temporary.rename(path)
        sync_folder(path.parent)


def create(path: Path) -> BinaryIO:
    """Opens a new file for writing. Replaces a file of this name, and a link without writing to its target."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


class OddFileError(OSError):
    """A path leads to a link that is not followed, or to something other than a regular file; `strerror` names it."""


def open_regular(path: Path, *, follow_links: bool = True, folder: int | None = None) -> BufferedReader:
    """Opens a regular file for reading. Does not wait for the writer of a pipe, and opens no device.

    Args:
        path: of the file.
        follow_links: whether its last part may be a link.
        folder: the descriptor of an open folder that a relative path starts from.

    Raises:
        OddFileError: it is not a regular file, or a link that is not followed.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise OddFileError(errno.ELOOP, "a link, which is not followed", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OddFileError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


@contextmanager
def temporary_file(temporary: Path) -> Iterator[BinaryIO]:
    """Creates `temporary` for a block that writes and renames it. An error removes the file.

    If the folder is replaced during the block, a file of this name is another process's: it stays.
    """
    with create(temporary) as file:
        try:
            yield file
        except BaseException:
            with suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), temporary.lstat()):
                    temporary.unlink()
            raise


def type_of(path: Path) -> str | None:
    """Returns what is at `path`, without following links: "file", "folder", "link" or "special file"; None: nothing."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _TYPES.get(stat.S_IFMT(mode), "special file")


_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields every folder from `folder` on with the sorted names of its folders and its other entries, as `os.walk`.

    A caller may remove names of folders, which are then not entered. Links are not followed. A folder that cannot be
    read is left out. The depth is not limited by the recursion of Python.
    """
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            with os.scandir(path) as entries:
                found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError:
            continue
        folders = [name for name, is_folder in found if is_folder]
        yield path, folders, [name for name, is_folder in found if not is_folder]
        waiting.extend(path / name for name in reversed(folders))


def remove(path: Path, check: Check = unchecked) -> None:
    """Removes what is at `path`, if there is anything: a folder with its content, or a link and not its target.

    `check` is called before anything is removed, and when a folder is open: what is removed from then on is of the
    folder that was at `path` during the check, although another one may take its place.
    """
    check()
    if type_of(path) != "folder":
        path.unlink(missing_ok=True)
        return
    descriptor = open_folder(path)
    try:
        check()
        while names := _names(descriptor):
            for name in names:
                _remove_entry(name, descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(path)  # noqa: PTH106 - as the entries


def _remove_entry(name: str, folder: int) -> None:
    """Removes an entry of an open folder; of a folder that contains folders, these become entries first.

    The depth is therefore not limited by the recursion of Python, the number of open files or the length of paths.
    """
    if not _is_folder(name, folder):
        os.unlink(name, dir_fd=folder)
        return
    inner = open_folder(name, folder)
    try:
        for each in _names(inner):
            if _is_folder(each, inner):
                os.rename(each, f".removed-{secrets.token_hex(8)}", src_dir_fd=inner, dst_dir_fd=folder)
            else:
                os.unlink(each, dir_fd=inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=folder)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _is_folder(name: str, folder: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def open_folder(path: Path | str, folder: int | None = None) -> int:
    """Returns the descriptor of a folder that is not a link. A relative path starts from the open `folder`."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def sync_file(descriptor: int) -> None:
    """Returns when the file's bytes are on the disk."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Returns when the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates `folder` and its missing parents durably."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


@contextmanager
def explained(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError of the block into a StoreError that names `path` and the way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"cannot {action} {path}: {reason}. Everything that was complete is kept: solve this and rerun the "
            "command to resume"
        ) from error


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a regular file, in hex."""
    with open_regular(path) as file:
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


def ensure_space(root: Path, required: int, *, hint: str = "") -> None:
    """Checks that `required` bytes are free on the disk of `root`, which need not exist yet.

    `hint` ends the ways out of the error.

    Raises:
        StoreError: less is free. The error gives both figures.
    """
    folder = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < required:
        raise StoreError(
            f"not enough disk space at {root}: about {_gigabytes(required)} are needed (journal and dataset "
            f"together) and {_gigabytes(free)} are free. Choose another output.data_root, fewer examples "
            "(dataset.max_samples), fewer heads (capture.head_sampling.count) or a lower sampler.base_rate"
            f"{hint}"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
