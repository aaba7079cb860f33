"""Keeps the copies that `datasets` makes of local files apart by the content of the files, and checks their folder."""

import hashlib
from collections.abc import Sequence
from typing import Any, cast

from qk_sniffer.corpus.data_files import DataFile, open_bytes
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
