"""Opens the rows of `dataset.path`: a Hub repository, a local folder, a file, or the embedded documentation.

The library `datasets` finds the configs, splits and files of a folder or repository. The readers of this package give
the values of parquet, json, csv and txt files (`rows.py`), and the library those of other formats. This module replaces
its errors by errors that name the problem and the way out. It imports `datasets` inside functions, so that a mistyped
setting is reported without loading it.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus import hub_copies
from qk_sniffer.corpus.archives import nothing_unpacked, refuse_archives
from qk_sniffer.corpus.card_options import format_of, plain_options
from qk_sniffer.corpus.copies import (
    check_cache,
    check_compressed,
    check_copy,
    check_place,
    check_unchanged,
    digest_of,
    own_downloads,
    refuse_parquet,
)
from qk_sniffer.corpus.data_files import COMPRESSED, ChangedError, DataFile, first_lines, reason
from qk_sniffer.corpus.dataset_cards import names_its_files, own_descriptions, yaml_limited
from qk_sniffer.corpus.home import check_format, check_home, data_file, own_patterns, texts_of
from qk_sniffer.corpus.rows import LibraryRows, ListRows, Rows, no_rows
from qk_sniffer.corpus.splits import named_splits, no_split, rows_of_files
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.endpoint import refuse_open_address
from qk_sniffer.hub.revisions import HubUnreachableError, hub_commit, is_hub_id, refusal_of_gated
from qk_sniffer.logs import logger
from qk_sniffer.store.disk import walk
from qk_sniffer.text import hide_in_address, is_utf8_path, shortened, utf8_way_out

log = logger(__name__)

PYDOC = "pydoc"
"""The `dataset.path` of the documentation topics that ship with every Python."""

SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
"""The format of a data file with each suffix."""

_NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Source:
    """The rows of a source, and its `name` in messages."""

    name: str
    rows: Rows
    commit: str | None = None
    """The commit of a Hub repository; None for other sources."""


def open_source(config: DatasetConfig, commit: str | None = None) -> Source:
    """Opens the rows of `config.split`.

    Args:
        commit: the commit of a Hub dataset that an earlier start of the job pinned; None pins `config.revision` now.

    Raises:
        SourceError: `config.path` does not exist, has no such config or split, or cannot be read; or a proxy of `.env`
            would see what is asked of an address.
    """
    path = config.path
    if not path:
        raise SourceError("dataset.path is not set")
    for name in (path, *texts_of(config.data_files)):
        hide_in_address(name)
        refuse_open_address(name)
    local = Path(path)
    if path == PYDOC:
        return _pydoc(config)
    if local.is_file():
        return _file(config, local)
    with _quiet():
        if local.is_dir():
            return _folder(config, local.resolve())
        if not is_hub_id(path) or _reader(local):
            raise SourceError(f"dataset.path={path}: there is no such file or folder (looked for {local.absolute()})")
        return _hub(config, path, commit)


def _pydoc(config: DatasetConfig) -> Source:
    from pydoc_data.topics import topics

    _refuse(config, "the embedded documentation", "name", "revision", "data_files")
    where = f"dataset {PYDOC}"
    if config.split != "train":
        raise no_split(where, config.split, ["train"])
    return Source(where, ListRows([{"id": name, "text": topics[name]} for name in sorted(topics)]))


def _file(config: DatasetConfig, file: Path) -> Source:
    _refuse(config, "a file", "name", "revision", "data_files")
    where = f"file {file}"
    reader = _reader(file)
    if not reader:
        raise SourceError(f"{where}: a file of this type cannot be read. {_supported()}")
    return Source(where, rows_of_files(where, {"train": [DataFile(str(file))]}, reader, {}, config))


def _folder(config: DatasetConfig, folder: Path) -> Source:
    _refuse(config, "a local folder", "revision")
    where = f"folder {folder}"
    if not is_utf8_path(folder.name):  # `datasets` names a class and its cache after the folder
        raise SourceError(f"{where}: datasets cannot read a folder of this name: {utf8_way_out(folder.name)}")
    with own_descriptions(where, folder):
        return Source(where, _rows_of_folder(where, config, folder))


def _rows_of_folder(where: str, config: DatasetConfig, folder: Path) -> Rows:
    if config.name is not None or config.data_files is not None or names_its_files(where, folder):
        builder = _building(where, lambda: _builder(where, str(folder), config))
        return _of_builder(where, builder, config, folder)
    files = _data_files(folder)
    if not files:
        raise SourceError(f"{where} holds no data files: {_listing(folder)}. {_supported()}")
    formats = sorted({_reader(Path(file)) for file in files})
    if len(formats) > 1:
        raise SourceError(
            f"{where} holds files of several types ({', '.join(formats)}): {_listing(folder)}. Choose the files, as in "
            "dataset.data_files='*.jsonl'"
        )
    splits = _splits(folder, config, files)
    # A card that lists no configs may have added some in another way.
    check_home(where, [file for of_split in splits.values() for file in of_split], folder, is_named=False)
    return rows_of_files(where, _in(splits, folder), formats[0], {}, config)


def _in(splits: dict[str, list[str]], folder: Path) -> dict[str, list[DataFile]]:
    return {split: [data_file(file, folder) for file in files] for split, files in splits.items()}


def _splits(folder: Path, config: DatasetConfig, files: list[str]) -> dict[str, list[str]]:
    """Returns the files of each split: those that `datasets` finds, or all as `train` if it finds only some."""
    # It takes words in file names for splits (`train`, `my_test.txt`), and then leaves out all other files.
    try:
        found = _files_of(_builder(f"folder {folder}", str(folder), config))
    except SourceError:
        raise
    except Exception:
        return {"train": files}
    of_all = {file for of_split in found.values() for file in of_split}
    # It takes the name of the folder for a pattern: of `texts*`, it finds the files of `texts2` too.
    is_wider = has_magic(str(folder)) and not all(Path(file).is_relative_to(folder) for file in of_all)
    return found if of_all >= set(files) and not is_wider else {"train": files}


def _of_builder(where: str, builder: Any, config: DatasetConfig, folder: Path) -> Rows:
    """Opens the rows of a local folder, of which `builder` has found the files."""
    data_files = _checked_files(where, builder, config, folder)
    named = [file for files in data_files.values() for file in files]
    format, options = format_of(where, builder)
    if format is None or any("://" in file for file in named):
        return _of_library(where, builder, config, folder)
    return rows_of_files(where, _in(data_files, folder), format, options, config)


def _hub(config: DatasetConfig, path: str, commit: str | None) -> Source:
    where = f"dataset {path}"
    try:
        commit = hub_commit("dataset", path, commit or config.revision)
    except HubUnreachableError as unreachable:
        return _cached(config, path, commit, unreachable)
    with own_descriptions(where, hub_copies.snapshot(path, commit)):
        builder = _building(where, lambda: _builder(where, path, config, revision=commit), path)
    if builder.hash != commit:  # if `datasets` finds no data files, it uses another commit from its cache
        raise SourceError(f"{where}: commit {commit} has no data files that can be read, or the connection was lost")
    home = f"hf://datasets/{path}@{commit}/"
    data_files = _checked_files(where, builder, config, home)
    named = [file for files in data_files.values() for file in files]
    format, options = format_of(where, builder)
    if format is None or not all(file.startswith(home) for file in named):
        is_own = all(file.rpartition("::")[2].startswith(home) for file in named)
        # The commit does not pin files elsewhere, such as those of another revision.
        return Source(where, _of_library(where, builder, config), commit if is_own else None)
    if config.streaming:
        streamed = {split: [DataFile(file) for file in files] for split, files in data_files.items()}
        return Source(where, rows_of_files(where, streamed, format, options, config), commit)
    names = {split: [file.removeprefix(home) for file in files] for split, files in data_files.items()}
    chosen = {split: names[split] for split in named_splits(where, config, list(names))}
    try:
        paths = {split: hub_copies.fetch(path, commit, files) for split, files in chosen.items()}
    except Exception as error:
        raise SourceError(f"{where} cannot be read: {reason(error)}") from error
    listed = hub_copies.Listing(commit, config.name or builder.config.name, config.data_files, format, options, names)
    hub_copies.remember(path, listed)
    return Source(where, rows_of_files(where, paths, format, options, config), commit)


def _cached(config: DatasetConfig, path: str, commit: str | None, unreachable: HubUnreachableError) -> Source:
    """Opens the copy of a Hub repository that was made when the Hub could be reached."""
    from datasets.packaged_modules.cache.cache import Cache

    where = f"dataset {path}"
    folder, library_copies = hub_copies.library_copies(path)
    copies: dict[tuple[str, str], Path | hub_copies.Listing] = {}
    if config.data_files is None:
        copies |= library_copies
    copies |= {(each.config_name, each.commit): each for each in hub_copies.listings(path, config.data_files)}
    wanted = commit or (config.revision if config.revision != "main" else None)
    found = [key for key in copies if config.name in (None, key[0]) and wanted in (None, key[1])]
    if len(found) != 1:
        have = "; ".join(f"config {name} at commit {sha}" for name, sha in copies) or "nothing"
        needed = f"config {config.name or '(not named)'} at {wanted or 'any commit'}"
        if config.data_files is not None:
            needed += " with these dataset.data_files"
        raise SourceError(
            f"{where}: there is no local path of this name, and {unreachable}. The job needs {needed}; {folder} has "
            f"{have}. Run once where the Hub can be reached, choose a cached copy with dataset.name and "
            "dataset.revision=<commit>, or download the files and set dataset.path to their folder. "
            f"dataset={PYDOC} needs no network"
        )
    _, commit = found[0]
    copy = copies[found[0]]
    if isinstance(copy, hub_copies.Listing):
        paths = {}
        for split in named_splits(where, config, list(copy.splits)):
            files = hub_copies.fetched(path, commit, copy.splits[split])
            if files is None:
                raise SourceError(
                    f"{where}: the cache lacks files of split {split!r} at commit {commit}, and {unreachable}. Run "
                    "once where the Hub can be reached"
                )
            paths[split] = files
        return Source(where, rows_of_files(where, paths, copy.format, copy.options, config), commit)
    log.warning(
        "%s: read from a copy that the library datasets made, with the types that it guessed. Run once where the Hub "
        "can be reached to read the files themselves",
        where,
    )
    check_copy(where, copy)
    variant, version = copy.parts[-3:-1]
    name = path.rpartition("/")[2]
    builder = Cache(dataset_name=name, repo_id=path, config_name=variant, version=version, hash=commit)
    return Source(where, _of_library(where, builder, config), commit)


def _builder(where: str, path: str, config: DatasetConfig, **options: Any) -> Any:
    from datasets import load_dataset_builder

    home = f"hf://datasets/{path}@{options['revision']}" if "revision" in options else path
    options |= {"name": config.name, "data_files": config.data_files}
    patterns = own_patterns(where, config.data_files, home)
    with patterns, yaml_limited(where), plain_options(where), nothing_unpacked(where):
        builder = load_dataset_builder(path, **options)
        if getattr(builder.config, "sample_by", None) == "line":  # a text file is one example
            builder = load_dataset_builder(path, sample_by="document", **options)
    return builder


def _building(where: str, make: Callable[[], Any], repository: str | None = None) -> Any:
    """Returns the result of `make`, which reads a local folder, or a repository of the Hub.

    Raises:
        SourceError: `make` failed.
    """
    try:
        return make()
    except SourceError:
        raise
    except Exception as error:
        message = str(error)
        if repository is not None and "is a gated dataset" in message:  # the Hub's own answer is not in the chain
            raise refusal_of_gated("dataset", repository) from error
        if isinstance(error, ValueError) and ("BuilderConfig" in message or "Config name is missing" in message):
            listed = re.search(r"\[(.*?)\]", message, flags=re.DOTALL)
            names = listed.group(1).replace("'", "") if listed else message
            raise SourceError(f"{where}: no such config. Choose one with dataset.name: {names}") from error
        # Two messages of `datasets` for a repository without files that it can read.
        if "find cache for" in message or "data files found" in message:
            raise SourceError(f"{where} has no data files that can be read. Check dataset.data_files") from error
        if isinstance(error, FileNotFoundError):
            suffixes = r"with any supported extension \[.*"  # of hundreds
            found = re.sub(suffixes, "with a suffix that datasets reads", first_lines(message))
            raise SourceError(f"{where}: {found}. Check dataset.data_files") from error
        raise SourceError(f"{where} cannot be read: {reason(error)}") from error


def _files_of(builder: Any) -> dict[str, list[str]]:
    """Returns the files of each split that a builder of `datasets` has found."""
    return {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}


def _checked_files(where: str, builder: Any, config: DatasetConfig, home: Path | str) -> dict[str, list[str]]:
    """Returns the files of each split, once all are those of the source, and none of `config.split` is an archive."""
    found = _files_of(builder)
    for files in found.values():
        check_home(where, files, home, is_named=config.data_files is not None)
    refuse_archives(where, (file for name in named_splits(where, config, list(found)) for file in found[name]))
    return found


def _of_library(where: str, builder: Any, config: DatasetConfig, folder: Path | None = None) -> Rows:
    """Opens the rows of `config.split`, which the library reads. Its copy of local files is of their content.

    The library opens files by their paths. Those of `folder` are checked before and after that.
    """
    check_format(where, builder)
    data_files = _files_of(builder)
    known = list(data_files or builder.info.splits or [])
    files = [file for name in named_splits(where, config, known) for file in data_files.get(name, ())]
    refuse_parquet(where, type(builder.config).__name__.removesuffix("Config").lower(), files)
    opened = dict.fromkeys(file.rpartition("::")[2] if "://" in file else file for file in files)
    local = [data_file(file, folder) if folder else DataFile(file) for file in opened if "://" not in file]
    try:
        check_compressed(local)
        if config.streaming:
            with nothing_unpacked(where):
                return LibraryRows(where, builder.as_streaming_dataset(split=config.split))
        check_cache(where)
        copy = f"{builder.cache_dir}-{digest_of(local)}" if local else str(builder.cache_dir)
        check_place(where, copy)
        with nothing_unpacked(where), own_downloads():
            builder.download_and_prepare(copy if local else None)
        check_unchanged(local)
        check_copy(where, Path(copy))
        return LibraryRows(where, builder.as_dataset(split=config.split))
    except StopIteration as error:
        raise no_rows(where) from error
    except SourceError:
        raise
    except ChangedError as error:
        raise SourceError(f"{where}: a file was changed while the job read it: rerun the command") from error
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise no_rows(where) from error
        if isinstance(error, ValueError) and re.search(r"split|slice|instruction", str(error), flags=re.IGNORECASE):
            raise SourceError(f"{where}: dataset.split={config.split}: {first_lines(str(error))}") from error
        raise SourceError(f"{where} cannot be read: {reason(error)}") from error


def _reader(file: Path) -> str:
    """Returns the name of the reader for a file of this name; empty if no reader reads it."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return ""
    return SUFFIXES.get(suffixes[-1], "") if suffixes else ""


def _data_files(folder: Path) -> list[str]:
    found = []
    for path, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        visible = (path / name for name in names if name not in _NOT_DATA and not name.startswith((".", "__")))
        # Unlike `Path.is_file`, this is no error for a path that is too long.
        found += [str(file) for file in visible if _reader(file) and os.path.isfile(file)]  # noqa: PTH113
    return sorted(found)


def _listing(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if {"state.json", "dataset_dict.json"} & set(names):
        return "it was written by `save_to_disk`; write it with `to_parquet` instead"
    return shortened(names, 8) or "it is empty"


def _supported() -> str:
    return (
        f"Supported: {', '.join(SUFFIXES)}; all but .parquet also with {', '.join(COMPRESSED)}. Unpack archives first"
    )


def _refuse(config: DatasetConfig, what: str, *keys: str) -> None:
    given = [f"dataset.{key}={getattr(config, key)}" for key in keys if getattr(config, key) is not None]
    if given:
        raise SourceError(f"dataset.path={config.path} is {what}: {', '.join(given)} does not apply. Leave it out")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the logs of `datasets`, whose errors are reported here, and its progress bars outside a terminal."""
    import datasets

    verbosity, bars = datasets.utils.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    if bars and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
