"""Sends a file of a dataset to the Hub only as its manifest lists it: what is compared is what is sent.

Whoever can write to the folder may replace a file, or a folder, by a link to a secret at any moment. So each file is
opened once. Its hash is compared with the manifest before any of it is sent, and huggingface_hub gets the open file.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Self

from huggingface_hub import CommitOperationAdd

from qk_sniffer.errors import StoreError
from qk_sniffer.store.files import open_inside

_DESCRIPTORS = Path("/proc/self/fd")


def changed(path: Path) -> StoreError:
    """Returns the error for a file of the dataset that is not the one of its manifest."""
    return StoreError(
        f"{path} is missing or has changed since manifest.json was written; the dataset was not published. "
        "Restore the file, or recreate the dataset with output.overwrite=true"
    )


class CheckedFile(CommitOperationAdd):
    """An addition of a file, which is open within the `with` block of the addition.

    After the block, huggingface_hub reads it only as a part of the commit itself, which small files are. Then it is
    opened and compared a second time, whole in memory.
    """

    def __init__(self, root: Path, name: str, sha256: str) -> None:
        """Opens the file and compares it.

        Args:
            root: of the dataset.
            name: relative to the root.
            sha256: in the manifest, in hex.

        Raises:
            StoreError: the file is elsewhere, is missing, or is not the one of the manifest.
        """
        self._path = root / name
        self._root = root
        self._expected = sha256
        self._file = self._open(name)
        try:
            self._before = self._facts()
            # The library hf_xet takes paths alone. Where the system has none for an open file, HTTP is used.
            address = _DESCRIPTORS / str(self._file.fileno())
            super().__init__(name, str(address) if address.exists() else self._file)
            if self.upload_info.sha256.hex() != sha256:  # huggingface_hub hashes a file once, at first use
                raise changed(self._path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.path_or_fileobj = b""  # the number of a closed descriptor may become that of any file

    def check_unchanged(self) -> None:
        """Checks that nothing else was written to the open file since it was opened.

        Raises:
            StoreError: it was.
        """
        if self._facts() != self._before:  # also after a change of its owner, its mode or its name
            self._file.seek(0)
            if hashlib.file_digest(self._file, "sha256").hexdigest() != self._expected:
                raise changed(self._path)

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """Gives the content to huggingface_hub.

        Raises:
            StoreError: the file is closed, and the one at its path now is not the one of the manifest.
        """
        if not self._file.closed:
            with super().as_file(with_tqdm) as content:
                yield content
            return
        with self._open(self.path_in_repo) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != self._expected:
            raise changed(self._path)
        yield io.BytesIO(data)

    def _open(self, name: str) -> BufferedReader:
        try:
            return open_inside(self._root, name)
        except OSError as error:
            raise changed(self._path) from error

    def _facts(self) -> tuple[int, int, int]:
        facts = os.fstat(self._file.fileno())
        return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
