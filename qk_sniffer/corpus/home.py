"""Refuses files that a source of texts takes from elsewhere on this machine or on the network.

A folder or repository of texts may come from someone else. Its card may name any path or address, and a link in it may
lead to any file. Such a file may be a secret, and its tokens would be captured and published with the texts.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import has_magic
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from qk_sniffer.corpus.archives import SINGLE, refuse_archives
from qk_sniffer.corpus.data_files import DataFile
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.store.disk import real_path
from qk_sniffer.store.files import inside

_SELF_CONTAINED = frozenset(
    {
        *("cache", "conll", "csv", "json", "parquet", "text", "xml"),
        *("audiofolder", "imagefolder", "videofolder"),
    }
)
"""The formats of `datasets` that open no files but those that it has found. Others do: `harbor` opens neighbours of
theirs, which may be links, and a file of `hdf5`, `iceberg` or `lance` may name any file."""

_HINT = f". Of addresses, a card may have those of its compressed files: {', '.join(sorted(SINGLE))}"


@contextmanager
def own_patterns(where: str, data_files: Any, home: str) -> Iterator[None]:
    """Checks each pattern that `datasets` resolves in the block, before it lists a folder or asks an address for it.

    Args:
        where: the name of the source in errors.
        data_files: `dataset.data_files`, whose patterns may be elsewhere.
        home: the folder, or the address of the repository at a commit, of the source.

    Raises:
        SourceError: the card of the source has a pattern of files elsewhere, or a `data_dir` elsewhere, from which
            patterns start; or a pattern is of archives.
    """
    from datasets import data_files as library

    named, resolve = set(texts_of(data_files)), library.resolve_pattern

    def checked(pattern: str, base_path: str, *arguments: Any, **options: Any) -> Any:
        if pattern not in named:
            if not _is_own_pattern(pattern, base_path):
                raise _elsewhere(where, pattern)
            if base_path != home and not _is_own_pattern(base_path, home):
                raise _elsewhere(where, base_path)
            if "://" not in home and not _starts_inside(pattern, base_path, home):
                raise _elsewhere(where, pattern)
        refuse_archives(where, [pattern])
        return resolve(pattern, base_path, *arguments, **options)

    library.resolve_pattern = checked
    try:
        yield
    finally:
        library.resolve_pattern = resolve


def texts_of(values: Any) -> Iterator[str]:
    """Yields the names of files in `dataset.data_files`, which may be a text, a list or a mapping."""
    if isinstance(values, str):
        yield values
    elif values is not None:
        for value in values.values() if isinstance(values, dict) else values:
            yield from texts_of(value)


def _is_own_pattern(pattern: str, base: str) -> bool:
    """Whether all files of a pattern are in the folder, or at the address of the repository, `base`."""
    *members, last = pattern.split("::") if "://" in pattern else [pattern]
    if not all(map(_is_member, members)):
        return False
    if "://" in base:
        last = last.removeprefix(f"{base}/")
        return "://" not in last and not os.path.normpath(last).startswith(("/", ".."))
    return "://" not in last and Path(os.path.normpath(Path(base, last))).is_relative_to(base)


def _starts_inside(pattern: str, base: str, home: str) -> bool:
    """Whether no link leads out of `home` before the first folder that is listed for a pattern.

    Links in the listed folders are not followed.
    """
    path = os.path.join(base, pattern.rpartition("::")[2] if "://" in pattern else pattern)  # noqa: PTH118
    if not path.startswith(home):
        return False
    inner = path[len(home) :]
    if not has_magic(inner):  # nothing is listed for a file
        return True
    fixed = takewhile(lambda part: not has_magic(part), inner.split("/"))
    try:
        return real_path(Path(home + "/".join(fixed))).is_relative_to(real_path(Path(home)))
    except StoreError:
        return False


def _elsewhere(where: str, file: str) -> SourceError:
    return SourceError(
        f"{where}: its README.md or .huggingface.yaml names {file}, which is not a file of this dataset: it is "
        f"not read. Name the files to read in dataset.data_files{_HINT if '://' in file else ''}"
    )


def check_home(where: str, files: Iterable[str], home: Path | str, *, is_named: bool) -> None:
    """Checks that the files of a source are its own.

    Args:
        where: the name of the source in errors.
        files: paths, or addresses of the Hub. That of the content of a compressed file ends with that of the file.
        home: the resolved folder, or the address of the repository at a commit, of the source.
        is_named: whether `dataset.data_files` names them. Then they may be elsewhere, but no link may lead there.

    Raises:
        SourceError: a file is elsewhere.
    """
    for file in files:
        is_own = file.rpartition("::")[2].startswith(home) if isinstance(home, str) else _is_inside(where, home, file)
        if not (is_own or is_named):
            raise _elsewhere(where, file)


def check_format(where: str, builder: Any) -> None:
    """Checks that what `datasets` reads is in the files that `check_home` sees. `builder` is of that library.

    Raises:
        SourceError: its format may lead to other files, or is that of Arrow files. The library maps these into memory,
            and versions of it do not check them: a damaged one ends the process, with no error.
    """
    format = type(builder).__module__.rpartition(".")[2]
    if format == "arrow":
        raise SourceError(
            f"{where}: its data files are Arrow files, which are not read: a damaged one would end the job without a "
            "message. Convert them to parquet, as with datasets.Dataset.from_file('a.arrow').to_parquet('a.parquet'); "
            "of many datasets on the Hub, dataset.revision=refs/convert/parquet has such a copy"
        )
    if format not in _SELF_CONTAINED:
        raise SourceError(
            f"{where}: the files that its README.md, .huggingface.yaml or dataset.data_files names are of the format "
            f"{format}, which may lead to other files of this machine: they are not read. Convert them to parquet or "
            "jsonl"
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
    """Whether `hop`, as in `gzip://a.csv`, is of the content of the next file in its chain.

    Other protocols may open any path, as `reference` does those in a list.
    """
    protocol, separator, path = hop.partition("://")
    return bool(separator) and protocol in SINGLE and ".." not in PurePosixPath(path).parts


def _check_link(where: str, folder: Path, path: str) -> None:
    try:
        inside(folder, path)
    except StoreError as error:
        raise SourceError(f"{where}: {error}, or name that file in dataset.data_files") from error
