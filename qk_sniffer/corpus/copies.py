"""Keeps the copies that `datasets` makes of local files apart by the content of the files, and checks their folder."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from qk_sniffer.corpus.data_files import (
    DataFile,
    FormatError,
    compression,
    open_bytes,
)
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.lfs import HEAD_BYTES
from qk_sniffer.store.disk import walk
from qk_sniffer.store.files import inside
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
            f"{where}: its Parquet files are compressed once more, are of a folder of media, or have other options in "
            "its README.md or .huggingface.yaml than columns: they are not read, because the library datasets does "
            "not bound their size. Name them in dataset.data_files, decompressed; dataset.filter chooses examples"
        )


def check_compressed(files: Sequence[DataFile]) -> None:
    """Checks that compressed files, which `datasets` decompresses, do not expand out of proportion.

    The library tells them by their first bytes too, whatever their names are.

    Raises:
        FormatError: one does, or is an archive. The message names it.
    """
    for file in files:
        try:
            with open_bytes(file, compressed=False) as raw:
                head = raw.read(HEAD_BYTES)
            if compression(file.path, head) is not None:
                with open_bytes(file) as content:
                    while content.read(1 << 20):
                        pass
        except FormatError as error:
            raise FormatError(f"{file.path}: {error}") from error


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


@contextmanager
def own_downloads() -> Iterator[None]:
    """Checks the files that `datasets` downloads in the block, before it reads them and after the block.

    They may be in the cache already, which may come from someone else, with links to any file.

    Raises:
        StoreError: a link leads out of the repository's folder in the cache of the Hub, or out of the folder that has
            the files of other addresses.
    """
    from datasets.utils import file_utils
    from huggingface_hub import HfApi

    hub: Any = HfApi
    others: Any = file_utils
    download, fetch, got = hub.hf_hub_download, others.get_from_cache, []

    def checked(api: Any, repo_id: str, filename: str, *arguments: Any, **options: Any) -> Any:
        path = download(api, repo_id, filename, *arguments, **options)
        got.append((Path(str(path).removesuffix(filename)), filename))
        inside(*got[-1])
        return path

    def fetched(*arguments: Any, **options: Any) -> Any:
        path = fetch(*arguments, **options)
        got.append((Path(path).parent, Path(path).name))
        inside(*got[-1])
        return path

    hub.hf_hub_download, others.get_from_cache = checked, fetched
    try:
        yield
    finally:
        hub.hf_hub_download, others.get_from_cache = download, fetch
        for folder, name in got:  # an error of the block may quote the file
            inside(folder, name)


def check_place(where: str, folder: str) -> None:
    """Checks the place of a copy before `datasets` makes it: the library writes through links that are there.

    Args:
        where: the name of the source in errors.
        folder: that of the copy. The library makes it under another name, which it may have left there.

    Raises:
        SourceError: a link leads out of the cache, or a folder cannot be listed.
    """
    from datasets import config as library

    unfinished = Path(f"{folder}.incomplete")
    try:
        for path in (Path(folder), unfinished):
            inside(Path(library.HF_DATASETS_CACHE), str(path.absolute()))
    except StoreError as error:
        raise SourceError(f"{where}: {error}, or delete that link") from error
    if unfinished.is_dir():
        check_copy(where, unfinished)


def check_copy(where: str, folder: Path) -> None:
    """Checks a copy that `datasets` has made, maybe earlier: the cache may come from someone else.

    `where` is the name of the source in errors.

    Raises:
        SourceError: a link leads out of the cache, to a copy of other texts for example; or a folder cannot be listed.
    """
    from datasets import config as library

    try:
        for path, _, names in walk(folder.absolute(), _unlisted):
            for name in names:
                inside(Path(library.HF_DATASETS_CACHE), str(path / name))
    except StoreError as error:
        raise SourceError(f"{where}: {error}, or delete the folder {folder}") from error


def _unlisted(error: OSError) -> None:
    # Its files may be opened by their names all the same.
    raise StoreError(f"{error.filename} cannot be listed: {error.strerror}. Get the right to read it")
