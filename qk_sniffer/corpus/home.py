"""Refuses files that a source of texts takes from elsewhere on this machine or on the network.

A folder or repository of texts may come from someone else. Its card may name any path or address, and a link in it may
lead to any file. Such a file may be a secret, and its tokens would be captured and published with the texts.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from qk_sniffer.corpus.data_files import DataFile
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.store.files import inside

_PACKED = frozenset({"zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4"})
"""The protocols of archives and compressed files. Others may open any path, as `reference` does those in a list."""

_HINT = f". Of addresses, a card may have those of files in its archives: {', '.join(sorted(_PACKED))}"


def check_home(where: str, files: Iterable[str], home: Path | str, *, is_named: bool) -> None:
    """Checks that the files of a source are its own.

    Args:
        where: the name of the source in errors.
        files: paths, or addresses of the Hub. That of a file in an archive ends with that of the archive.
        home: the resolved folder, or the address of the repository at a commit, of the source.
        is_named: whether `dataset.data_files` names them. Then they may be elsewhere, but no link may lead there.

    Raises:
        SourceError: a file is elsewhere.
    """
    for file in files:
        is_own = file.rpartition("::")[2].startswith(home) if isinstance(home, str) else _is_inside(where, home, file)
        if not (is_own or is_named):
            raise SourceError(
                f"{where}: its README.md or .huggingface.yaml names {file}, which is not a file of this dataset: it is "
                f"not read. Name the files to read in dataset.data_files{_HINT if '://' in file else ''}"
            )


def data_file(path: str, home: Path) -> DataFile:
    """Returns a file that `check_home` has accepted for the folder `home`. Outside of it are only files of the user."""
    return DataFile(path, home if Path(os.path.normpath(path)).is_relative_to(home) else None)


def _is_inside(where: str, folder: Path, file: str) -> bool:
    """Whether all that is opened for `file` is in the folder.

    Raises:
        SourceError: a link leads out of the folder.
    """
    *members, path = file.split("::") if "://" in file else [file]
    # A path may hold `::`. The readers of this package open it as it is, and `datasets` the part before.
    opened = {path, path.partition("::")[0]}
    own = {path for path in opened if Path(os.path.normpath(path)).is_relative_to(folder)}
    for path in own:
        _check_link(where, folder, path)
    return own == opened and all(_is_member(hop) for hop in members)


def _is_member(hop: str) -> bool:
    """Whether `hop`, as in `zip://a.csv`, is of the content of the next file in its chain."""
    protocol, separator, path = hop.partition("://")
    return bool(separator) and protocol in _PACKED and ".." not in PurePosixPath(path).parts


def _check_link(where: str, folder: Path, path: str) -> None:
    try:
        inside(folder, path)
    except StoreError as error:
        raise SourceError(f"{where}: {error}, or name that file in dataset.data_files") from error
