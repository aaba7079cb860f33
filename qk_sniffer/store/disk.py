"""What the store asks of a file system: durable renames, room, and errors that say which path."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qk_sniffer.errors import StoreError

PARQUET_SHARE = 0.75
"""Size of a head's Parquet file over that of its vectors in the model's own dtype: 0.72 was measured for bfloat16
(vectors of random mantissas), 0.86 for float32 with its full mantissa, whose journal is twice as large."""


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `path` whole or not at all, and durably. A file that is there is replaced."""
    beside = path.with_name(path.name + ".tmp")
    with explained(path, "write"):
        try:
            with beside.open("wb") as file:
                file.write(data)
                sync_file(file.fileno())
            beside.rename(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


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
    """Makes `folder`, and those above it that are missing, durably."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


@contextmanager
def explained(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError of the block into a StoreError that names `path` and what may be done."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"cannot {action} {path}: {reason}. What was complete before is kept: mend this and run the same "
            "command again"
        ) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def required_bytes(num_vectors: int, head_dim: int, itemsize: int) -> int:
    """Disk space for `num_vectors` vectors of `head_dim` numbers of `itemsize` bytes: journal and Parquet together.

    Both exist at once when the dataset is made from the journal. The other columns are in the margin of a tenth.
    """
    journal = num_vectors * head_dim * itemsize
    return int(1.1 * (1 + PARQUET_SHARE * (1.2 if itemsize > 2 else 1.0)) * journal)


def ensure_space(root: Path, required: int) -> None:
    """Checks that `required` bytes are free where `root` is or will be.

    Raises:
        StoreError: with both figures.
    """
    folder = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < required:
        raise StoreError(
            f"not enough disk space at {root}: about {_gigabytes(required)} are needed (journal and Parquet "
            f"together) and {_gigabytes(free)} are free. Choose another output.data_root, fewer examples "
            "(dataset.max_samples), fewer heads (capture.head_sampling.count) or a lower sampler.base_rate"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
