"""Checks the copies of texts that `datasets` keeps in its cache: their folder, and whether they are still current."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qk_sniffer.errors import SourceError
from qk_sniffer.text import is_utf8_path, utf8_way_out


def is_stale(builder: Any, files: Sequence[str]) -> bool:
    """Whether a local file may have changed since `datasets` made its copy of the files.

    `datasets` compares the time of the last change of content, which an archive or `cp -p` gives to other files too.
    """
    try:
        made = Path(builder.cache_dir, "dataset_info.json").stat().st_mtime_ns
        return any(Path(file).stat().st_ctime_ns >= made for file in files)
    except OSError:  # there is no copy, or an error that the reader explains
        return False


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
