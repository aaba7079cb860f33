"""Keeps the copies that `datasets` makes of local files apart by the content of the files, and checks their folder."""

import hashlib
import zipfile
from collections.abc import Sequence
from typing import Any, cast

from qk_sniffer.corpus.data_files import ARCHIVES, DataFile, FormatError, open_bytes, refuse_expansion
from qk_sniffer.errors import SourceError
from qk_sniffer.text import is_utf8_path, utf8_way_out


def digest_of(files: Sequence[DataFile]) -> str:
    """Returns a digest of the contents of files. `datasets` itself compares times, which other files may have too."""
    whole = hashlib.sha256()
    for file in files:
        with open_bytes(file, compressed=False) as content:
            whole.update(hashlib.file_digest(cast(Any, content), "sha256").digest())
    return whole.hexdigest()[:32]


def check_unchanged(files: Sequence[DataFile]) -> None:
    """Checks that files are those whose content `digest_of` read, and that no link leads out of their folder by now.

    Raises:
        ChangedError: one is another.
        StoreError: a link leads out.
    """
    for file in files:
        with open_bytes(file, compressed=False):
            pass


def check_archives(files: Sequence[DataFile]) -> None:
    """Checks that the archives among the files, which `datasets` unpacks, do not expand out of proportion.

    Archives that Python cannot read (7z, rar, lz4) are left out.

    Raises:
        FormatError: one does. The message names it.
    """
    for file in files:
        try:
            if file.path.lower().endswith(".zip"):
                _check_members(file)
            elif file.path.lower().endswith(ARCHIVES):
                with open_bytes(file) as content:
                    while content.read(1 << 20):
                        pass
        except FormatError as error:
            raise FormatError(f"{file.path}: {error}") from error


def _check_members(file: DataFile) -> None:
    with open_bytes(file, compressed=False) as content:
        try:
            members = zipfile.ZipFile(content).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            return  # `datasets` reports it
        for member in members:
            refuse_expansion(member.compress_size, member.file_size, "unpack it first")
        refuse_expansion(content.seek(0, 2), sum(member.file_size for member in members), "unpack it first")


def check_cache(where: str) -> None:
    """Checks that `datasets` can write its copies. `where` is the name of the source in errors.

    Raises:
        SourceError: the library cannot open the folder.
    """
    from datasets import config as library

    if not is_utf8_path(library.HF_DATASETS_CACHE):
        raise SourceError(
            f"{where}: datasets cannot write its cache to {library.HF_DATASETS_CACHE}: "
            f"{utf8_way_out(library.HF_DATASETS_CACHE)}; or set HF_HOME or HF_DATASETS_CACHE to another folder, or "
            "dataset.streaming=true"
        )
