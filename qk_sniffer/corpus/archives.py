"""Refuses archives of several files among texts, and keeps the library `datasets` from unpacking anything.

Its unpacking follows links in an archive to any file, opens what the names of members say, and takes what it unpacked
before for a file of the same path. A compressed file holds one text: it is decompressed while it is read.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from qk_sniffer.errors import SourceError

SINGLE = frozenset({"gzip", "bz2", "xz", "zstd"})
"""The compressions of one file that are read, by the names that `datasets` has for them."""

_SUFFIX = re.compile(r"\.(zip|7z|rar|lz4|tgz|tbz2?|txz|tar(\.(gz|bz2|xz|zst))?)\Z", re.IGNORECASE)

_PROTOCOLS = frozenset({"zip", "tar", "libarchive"})
"""Those of addresses of files in an archive."""

_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x04\x22\x4d\x18")
"""The first bytes of zip, 7z and rar archives, and of lz4."""

_PROBLEM = (
    "an archive of several files (zip, tar, 7z, rar) or lz4, which is not read as texts. Unpack it, and set "
    "dataset.path to the folder"
)


def archive_problem(head: bytes) -> str | None:
    """Returns why a file that begins with `head`, of at least 512 bytes if it has them, is not read.

    None if it is no archive. Of a tar archive, the sum of the bytes in the first header must be right.
    """
    return f"it is {_PROBLEM}" if head.startswith(_STARTS) or _is_tar(head) else None


def refuse_archives(where: str, files: Iterable[str]) -> None:
    """Refuses archives by their names, and files in them by their addresses.

    Args:
        where: the name of the source in errors.
        files: paths, addresses or patterns of them.

    Raises:
        SourceError: names the first one.
    """
    for file in files:
        if any(_SUFFIX.search(hop) or hop.partition("://")[0].lower() in _PROTOCOLS for hop in file.split("::")):
            raise SourceError(f"{where}: {file} is, or is in, {_PROBLEM}")


@contextmanager
def nothing_unpacked(where: str) -> Iterator[None]:
    """Has `datasets` refuse to unpack files in the block, whatever their names. `where` names the source in errors.

    Raises:
        SourceError: a file is an archive, or is compressed without the suffix of its compression.
    """
    from datasets.download import streaming_download_manager as streaming
    from datasets.utils import extract, file_utils

    protocol_of, unpack = file_utils._get_extraction_protocol, extract.ExtractManager.extract

    def single_protocol_of(path: str, *arguments: Any, **options: Any) -> str | None:
        protocol: str | None = protocol_of(path, *arguments, **options)
        if protocol is not None and protocol not in SINGLE:
            raise SourceError(f"{where}: {path} is {_PROBLEM}")
        return protocol

    def as_it_is(manager: Any, path: str, *_: Any, **__: Any) -> str:
        format = manager.extractor.infer_extractor_format(path)
        if format in SINGLE:
            raise SourceError(f"{where}: {path} is compressed ({format}), and its name does not say so: decompress it")
        if format is not None:
            raise SourceError(f"{where}: {path} is {_PROBLEM}")
        return path

    file_utils._get_extraction_protocol = streaming._get_extraction_protocol = single_protocol_of
    extract.ExtractManager.extract = as_it_is
    try:
        yield
    finally:
        file_utils._get_extraction_protocol = streaming._get_extraction_protocol = protocol_of
        extract.ExtractManager.extract = unpack


def _is_tar(head: bytes) -> bool:
    try:
        header = tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return header.chksum != 0  # the sum of signed bytes may be 0, as of a compressed file with many equal bytes
