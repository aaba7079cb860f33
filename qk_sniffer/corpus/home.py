"""Refuses files that a source of texts takes from elsewhere on this machine or on the network.

A folder or repository of texts may come from someone else. Its card may name any path or address, and a link in it may
lead to any file. Such a file may be a secret, and its tokens would be captured and published with the texts.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.store.files import inside


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
        address = file.rpartition("::")[2]
        if isinstance(home, str):
            is_own = address.startswith(home)
        else:
            if is_own := Path(os.path.normpath(address)).is_relative_to(home):
                _check_link(where, home, address)
        if not (is_own or is_named):
            raise SourceError(
                f"{where}: its README.md names {file}, which is not a file of this dataset: it is not read. Name the "
                "files to read in dataset.data_files"
            )


def _check_link(where: str, folder: Path, path: str) -> None:
    try:
        inside(folder, path)
    except StoreError as error:
        raise SourceError(f"{where}: {error}, or name that file in dataset.data_files") from error
