"""Keeps the copies that `datasets` makes of local files apart by the content of the files, and checks their folder."""

import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, cast

from qk_sniffer.corpus.data_files import (
    ARCHIVES,
    UNCHECKED_ARCHIVES,
    DataFile,
    FormatError,
    compression,
    open_bytes,
    refuse_expansion,
)
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.lfs import HEAD_BYTES
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


def refuse_unchecked(where: str, files: Iterable[str]) -> None:
    """Refuses files that are, or are in, archives whose content has a size that nothing tells before it is unpacked.

    `files` are paths or addresses. That of a file in an archive ends with that of the archive.

    Raises:
        SourceError: names the first one.
    """
    for file in files:
        if any(hop.lower().endswith(UNCHECKED_ARCHIVES) for hop in file.split("::")):
            raise SourceError(f"{where}: {file} is refused: {_UNCHECKED}")


def refuse_parquet(where: str, format: str, files: Iterable[str]) -> None:
    """Refuses Parquet files that `datasets` would read. Its reader takes whole row groups, of whatever size.

    Args:
        where: the name of the source in errors.
        format: that of the files.
        files: paths or addresses.

    Raises:
        SourceError: there is such a file.
    """
    if format == "parquet" or any(file.partition("::")[0].lower().endswith(".parquet") for file in files):
        raise SourceError(
            f"{where}: its Parquet files are in an archive, are of a folder of media, or have other options in its "
            "README.md or .huggingface.yaml than columns: they are not read, because the library datasets does not "
            "bound their size. Unpack them and name them in dataset.data_files; dataset.filter chooses rows"
        )


_UNCHECKED = "the size of what is packed in it (7z, rar, lz4) is not known before it is unpacked. Unpack it yourself"

_UNCHECKED_STARTS = (b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x04\x22\x4d\x18")
"""The first bytes of such files."""


def check_archives(files: Sequence[DataFile]) -> None:
    """Checks that the packed files, which `datasets` unpacks, do not expand out of proportion.

    The library tells them by their first bytes too, whatever their names are.

    Raises:
        FormatError: one does, or Python cannot tell the size of its content. The message names it.
    """
    for file in files:
        with open_bytes(file, compressed=False) as raw:
            head = raw.read(HEAD_BYTES)
        name = file.path.lower()
        try:
            if head.startswith(_UNCHECKED_STARTS):
                raise FormatError(_UNCHECKED)
            if name.endswith(".zip") or head.startswith(b"PK"):
                _check_members(file)
            elif name.endswith(ARCHIVES) or compression(name, head) is not None:
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
