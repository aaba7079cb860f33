"""Opens the rows of `dataset.path`: a Hub repository, a local folder, a file, or the embedded documentation.

The library `datasets` reads all of them. This module replaces its errors by errors that name the problem and the way
out. It imports `datasets` inside functions, so that a mistyped setting is reported without loading it.
"""

import glob
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.copies import check_cache, is_stale
from qk_sniffer.corpus.home import check_home
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.revisions import HubUnreachableError, hub_commit, is_hub_id
from qk_sniffer.logs import logger
from qk_sniffer.store import stored
from qk_sniffer.text import is_utf8_path, shortened, utf8_way_out

log = logger(__name__)

PYDOC = "pydoc"
"""The `dataset.path` of the documentation topics that ship with every Python."""

SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
"""The reader of `datasets` for each suffix of a data file."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""The suffixes of compressed files. They may follow any suffix except `.parquet`, which is compressed inside."""

_NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_DOCUMENT = "sample_by=document"


class _Info(TypedDict):
    """The description that `datasets` stores next to its copy of a dataset."""

    config_name: NotRequired[str | None]


@dataclass(frozen=True)
class Source:
    """The rows of a source, and its `name` in messages."""

    name: str
    rows: Any
    """A `datasets.Dataset`, or an `IterableDataset` when streaming."""
    commit: str | None = None
    """The commit of a Hub repository; None for other sources."""
    files: tuple[str, ...] = ()
    """The local files of the rows; empty if the files are remote."""

    def read(self, rows: Any) -> Iterator[dict[str, Any]]:
        """Iterates over `rows`, which are `self.rows` or some of their columns.

        Raises:
            SourceError: a row cannot be read.
        """
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise _unreadable(self.name, error, self.files) from error
            yield row

    def column_types(self) -> dict[str, str]:
        """Returns the name of each column's type; `unknown` for a stream without types whose first value is null."""
        if self.rows.features is not None:
            features = self.rows.features.items()
            return {column: getattr(feature, "dtype", None) or type(feature).__name__ for column, feature in features}
        first = next(self.read(self.rows), None)
        if first is None:
            raise _empty(self.name)
        names = {str: "string", type(None): "unknown"}
        return {column: names.get(type(value), type(value).__name__) for column, value in first.items()}


def open_source(config: DatasetConfig, commit: str | None = None) -> Source:
    """Opens the rows of `config.split`.

    Args:
        commit: the commit of a Hub dataset that an earlier start of the job pinned; None pins `config.revision` now.

    Raises:
        SourceError: `config.path` does not exist, has no such config or split, or cannot be read.
    """
    path = config.path
    if not path:
        raise SourceError("dataset.path is not set")
    local = Path(path)
    with _quiet():
        if path == PYDOC:
            return _pydoc(config)
        if local.is_file():
            return _file(config, local)
        if local.is_dir():
            return _folder(config, local.resolve())
        if not is_hub_id(path) or _reader(local):
            raise SourceError(f"dataset.path={path}: there is no such file or folder (looked for {local.absolute()})")
        return _hub(config, path, commit)


def _pydoc(config: DatasetConfig) -> Source:
    from pydoc_data.topics import topics

    from datasets import Dataset

    _refuse(config, "the embedded documentation", "name", "revision", "data_files")
    names = sorted(topics)
    rows = Dataset.from_dict({"id": names, "text": [topics[name] for name in names]})
    where = f"dataset {PYDOC}"
    if config.split != "train":
        raise _no_split(where, config.split, ["train"])
    return Source(where, rows.to_iterable_dataset() if config.streaming else rows)


def _file(config: DatasetConfig, file: Path) -> Source:
    _refuse(config, "a file", "name", "revision", "data_files")
    where = f"file {file}"
    if not _reader(file):
        raise SourceError(f"{where}: a file of this type cannot be read. {_supported()}")
    return _rows(where, _building(where, lambda: _files_builder([str(file.resolve())])), config)


def _folder(config: DatasetConfig, folder: Path) -> Source:
    _refuse(config, "a local folder", "revision")
    where = f"folder {folder}"
    if not is_utf8_path(folder.name):  # `datasets` names a class and its cache after the folder
        raise SourceError(f"{where}: datasets cannot read a folder of this name: {utf8_way_out(folder.name)}")
    if config.name is not None or config.data_files is not None or _names_its_files(folder):
        return _rows(where, _building(where, lambda: _builder(str(folder), config)), config, home=folder)
    files = _data_files(folder)
    if not files:
        raise SourceError(f"{where} holds no data files: {_listing(folder)}. {_supported()}")
    formats = sorted({_reader(Path(file)) for file in files})
    if len(formats) > 1:
        raise SourceError(
            f"{where} holds files of several types ({', '.join(formats)}): {_listing(folder)}. Choose the files, as in "
            "dataset.data_files='*.jsonl'"
        )
    return _rows(where, _building(where, lambda: _whole_folder(folder, config, files)), config, home=folder)


def _whole_folder(folder: Path, config: DatasetConfig, files: list[str]) -> Any:
    # `datasets` takes words in file names for splits (`train`, `my_test.txt`), and then leaves out all other files.
    try:
        builder = _builder(str(folder), config)
    except Exception:
        return _files_builder(files)
    used = {file for of_split in builder.config.data_files.values() for file in of_split}
    return builder if used >= set(files) else _files_builder(files)


def _hub(config: DatasetConfig, path: str, commit: str | None) -> Source:
    where = f"dataset {path}"
    try:
        commit = hub_commit("dataset", path, commit or config.revision)
    except HubUnreachableError as unreachable:
        return _cached(config, path, commit, unreachable)
    builder = _building(where, lambda: _builder(path, config, revision=commit))
    if builder.hash != commit:  # if `datasets` finds no data files, it uses another commit from its cache
        raise SourceError(f"{where}: commit {commit} has no data files that can be read, or the connection was lost")
    return _rows(where, builder, config, commit, home=f"hf://datasets/{path}@{commit}/")


def _cached(config: DatasetConfig, path: str, commit: str | None, unreachable: HubUnreachableError) -> Source:
    """Opens the copy that `datasets` made of a Hub repository when the Hub could be reached."""
    from datasets import config as library
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    where = f"dataset {path}"
    *owner, name = path.split("/")
    folder = Path(library.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(name)]))
    # (config name, commit) -> folder. The variant that reads a text file as one example comes last, and is kept.
    copies = {}
    for info in sorted(folder.glob("*/*/*/dataset_info.json"), key=lambda info: _DOCUMENT in str(info)):
        variant = info.parts[-4]
        try:
            facts = stored.read(info, _Info, way_out="delete its folder", most_bytes=stored.LARGE, follow_links=True)
        except (OSError, StoreError) as error:  # the copy does not count
            log.warning("%s", error)
            continue
        config_name = facts.get("config_name") or variant
        if variant in (config_name, f"{config_name}-{_DOCUMENT}"):
            copies[config_name, info.parts[-2]] = info.parent
    wanted = commit or (config.revision if config.revision != "main" else None)
    found = [key for key in copies if config.name in (None, key[0]) and wanted in (None, key[1])]
    if config.data_files is not None or len(found) != 1:
        have = "; ".join(f"config {name} at commit {sha}" for name, sha in copies) or "nothing"
        needed = f"config {config.name or '(not named)'} at {wanted or 'any commit'}"
        if config.data_files is not None:
            needed += " with dataset.data_files, which cannot be looked up in the cache"
        raise SourceError(
            f"{where}: there is no local path of this name, and {unreachable}. The job needs {needed}; {folder} has "
            f"{have}. Run once where the Hub can be reached, choose a cached copy with dataset.name and "
            "dataset.revision=<commit>, or download the files and set dataset.path to their folder. "
            f"dataset={PYDOC} needs no network"
        )
    config_name, commit = found[0]
    variant, version = copies[found[0]].parts[-3:-1]
    builder = Cache(dataset_name=name, repo_id=path, config_name=variant, version=version, hash=commit)
    return _rows(where, builder, config, commit)


def _builder(path: str, config: DatasetConfig, **options: Any) -> Any:
    from datasets import load_dataset_builder

    options |= {"name": config.name, "data_files": config.data_files}
    builder = load_dataset_builder(path, **options)
    if getattr(builder.config, "sample_by", None) == "line":  # a text file is one example
        builder = load_dataset_builder(path, sample_by="document", **options)
    return builder


def _files_builder(files: list[str]) -> Any:
    from datasets import load_dataset_builder

    reader = _reader(Path(files[0]))
    options = {"sample_by": "document"} if reader == "text" else {}
    return load_dataset_builder(reader, data_files={"train": [glob.escape(file) for file in files]}, **options)


def _building(where: str, make: Callable[[], Any]) -> Any:
    """Returns the result of `make`.

    Raises:
        SourceError: `make` failed.
    """
    try:
        return make()
    except Exception as error:
        message = str(error)
        if isinstance(error, ValueError) and ("BuilderConfig" in message or "Config name is missing" in message):
            listed = re.search(r"\[(.*?)\]", message, flags=re.DOTALL)
            names = listed.group(1).replace("'", "") if listed else message
            raise SourceError(f"{where}: no such config. Choose one with dataset.name: {names}") from error
        if isinstance(error, FileNotFoundError):
            raise SourceError(f"{where}: {_first_lines(message)}. Check dataset.data_files") from error
        if "find cache for" in message:  # the message of `datasets` for a Hub repository without readable files
            raise SourceError(f"{where}: no data files that can be read. Check dataset.data_files") from error
        raise _unreadable(where, error, ()) from error


def _rows(
    where: str, builder: Any, config: DatasetConfig, commit: str | None = None, *, home: Path | str | None = None
) -> Source:
    """Opens the rows of `config.split`. `home` is the folder, or the address of the repository, of their files."""
    data_files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
    if home is not None:
        is_named = config.data_files is not None
        check_home(where, [file for paths in data_files.values() for file in paths], home, is_named=is_named)
    known = list(data_files or builder.info.splits or [])
    splits = [config.split] if config.streaming else re.split(r"\s*\+\s*", re.sub(r"\[.*?\]", "", config.split))
    if known and not {name.strip() for name in splits} <= {*known, "all"}:
        raise _no_split(where, config.split, known, streaming=config.streaming)
    files = tuple(file for name in splits for file in data_files.get(name, ()) if "://" not in file)
    try:
        if config.streaming:
            return Source(where, builder.as_streaming_dataset(split=config.split), commit, files)
        check_cache(where)
        builder.download_and_prepare(download_mode="reuse_cache_if_exists" if is_stale(builder, files) else None)
        return Source(where, builder.as_dataset(split=config.split), commit, files)
    except StopIteration as error:
        raise _empty(where) from error
    except SourceError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise _empty(where) from error
        if isinstance(error, ValueError) and re.search(r"split|slice|instruction", str(error), flags=re.IGNORECASE):
            raise SourceError(f"{where}: dataset.split={config.split}: {_first_lines(str(error))}") from error
        raise _unreadable(where, error, files) from error


def _empty(where: str) -> SourceError:
    return SourceError(f"{where} has no rows")


def _no_split(where: str, split: str, known: list[str], streaming: bool = False) -> SourceError:
    hint = ". Streaming reads a whole split: use dataset.max_samples for a part" if streaming and "[" in split else ""
    return SourceError(f"{where} has no split {split!r}. Choose one with dataset.split: {', '.join(known)}{hint}")


def _unreadable(where: str, error: Exception, files: tuple[str, ...]) -> SourceError:
    # The error does not always name the file. Reading each file alone finds it.
    for file in filter(lambda file: _reader(Path(file)), files if len(files) > 1 else ()):
        try:
            for _ in _files_builder([file]).as_streaming_dataset("train").with_format("arrow").iter(10_000):
                pass
        except StopIteration:
            continue  # an empty file
        except Exception as own:
            return SourceError(f"{where}: file {file} cannot be read: {_reason(own)}")
    return SourceError(f"{where} cannot be read: {_reason(error)}")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # the parser's message instead of "an error occurred"
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error}). Convert it, for example with `iconv -f latin1 -t utf-8`"
    if "BatchSize must be greater than 0" in str(error):
        return "it has no rows. Leave it out"
    if "zstd not supported" in str(error):
        return "a .zst file needs the package zstandard (`pip install zstandard`)"
    return _first_lines(str(error)) or type(error).__name__


def _first_lines(message: str, most: int = 4) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return " ".join(lines[:most])


def _reader(file: Path) -> str:
    """Returns the name of the reader for a file of this name; empty if no reader reads it."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            return ""
    return SUFFIXES.get(suffixes[-1], "") if suffixes else ""


def _data_files(folder: Path) -> list[str]:
    def visible(parts: tuple[str, ...]) -> bool:
        return not any(part.startswith((".", "__")) for part in parts)

    return sorted(
        str(file)
        for file in folder.rglob("*")
        if _reader(file) and file.name not in _NOT_DATA and visible(file.relative_to(folder).parts) and file.is_file()
    )


def _names_its_files(folder: Path) -> bool:
    """Whether the folder has a dataset card that lists the files of its configs."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    return front is not None and re.search(r"^configs:", front.group(1), flags=re.MULTILINE) is not None


def _listing(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if {"state.json", "dataset_dict.json"} & set(names):
        return "it was written by `save_to_disk`; write it with `to_parquet` instead"
    return shortened(names, 8) or "it is empty"


def _supported() -> str:
    return f"Supported: {', '.join(SUFFIXES)}; all but .parquet also with {', '.join(COMPRESSED)}"


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
