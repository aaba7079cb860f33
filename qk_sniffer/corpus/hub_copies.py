"""Finds the copies of a Hub dataset on this machine, and keeps what is needed to read them without a network.

The files are in the cache of huggingface_hub. A listing of our own names those of each config and split, which only the
Hub knows otherwise. `datasets` keeps copies in a format of its own, of the formats that it reads.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from qk_sniffer.corpus.data_files import DataFile
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.endpoint import announce
from qk_sniffer.logs import logger
from qk_sniffer.store import stored
from qk_sniffer.store.disk import make_folder, open_file, write_atomic
from qk_sniffer.store.files import inside
from qk_sniffer.store.open_folder import anchored
from qk_sniffer.text import leads_out

log = logger(__name__)

_DOCUMENT = "sample_by=document"
_DOWNLOADS = 8


@dataclass(frozen=True)
class Listing:
    """The files of one config of a repository at a commit."""

    commit: str
    config_name: str
    data_files: Any
    """`dataset.data_files` of the job that chose them."""
    format: str
    """A key of `rows.FORMATS`."""
    options: Mapping[str, Any]
    """Of the reader."""
    splits: Mapping[str, Sequence[str]]
    """The names of the files in the repository, by split."""


class _Stored(TypedDict):
    """A listing as JSON."""

    commit: str
    config_name: str
    data_files: Any
    format: Literal["parquet", "json", "csv", "text"]
    options: dict[str, Any]
    splits: dict[str, list[str]]


class _Info(TypedDict):
    """The description that `datasets` stores next to its copy of a dataset."""

    config_name: NotRequired[str | None]


def snapshot(repo_id: str, commit: str) -> Path:
    """Returns the folder of a commit in the cache of huggingface_hub, which may be missing."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"datasets--{repo_id.replace('/', '--')}", "snapshots", commit)


def fetch(repo_id: str, commit: str, names: Sequence[str]) -> list[DataFile]:
    """Returns files of a repository in the cache; fetches those that are not there.

    Raises:
        SourceError: a link leads out of the cache.
    """
    from huggingface_hub import hf_hub_download

    announce()

    def one(name: str) -> DataFile:
        return _own(hf_hub_download(repo_id, name, repo_type="dataset", revision=commit), name)

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return list(pool.map(one, names))


def fetched(repo_id: str, commit: str, names: Sequence[str]) -> list[DataFile] | None:
    """Returns files of a repository in the cache; None if one is not there.

    Raises:
        SourceError: a name or a link leads out of the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    there = []
    for name in names:
        if leads_out(name):
            raise SourceError(
                f"the cache lists {name!r} among the files of {repo_id}, which no repository can have: delete the "
                f"folder {_folder(repo_id)}, and run once where the Hub can be reached"
            )
        path = try_to_load_from_cache(repo_id, name, revision=commit, repo_type="dataset")
        if isinstance(path, str):
            there.append(_own(path, name))
    return there if len(there) == len(names) else None


def _own(path: str, name: str) -> DataFile:
    """Returns the file `name` in the cache, at `path`. A cache may come from someone else, with links to any file.

    Raises:
        SourceError: a link leads out of the repository's folder in the cache.
    """
    snapshot = Path(path.removesuffix(name))
    try:
        return DataFile(str(inside(snapshot, name)), snapshot)
    except StoreError as error:
        raise SourceError(str(error)) from error


def remember(repo_id: str, listing: Listing) -> None:
    """Stores a listing. A cache that cannot be written costs only later use without a network.

    A cache may come from someone else: nothing is written through a link in it.
    """
    from datasets import config as library

    data = stored.encode(asdict(listing), sort_keys=True)
    key = json.dumps([listing.config_name, listing.data_files], sort_keys=True)
    file = _folder(repo_id) / f"{listing.commit}-{sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        cache = Path(library.HF_DATASETS_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        with anchored(cache) as access:
            make_folder(file.parent, access)
            with suppress(OSError), open_file(file, access) as found:
                if found.read() == data:
                    return
            write_atomic(file, data, access=access)
    except (OSError, StoreError) as error:
        log.warning("the files of %s cannot be listed for use without a network: %s", repo_id, error)


def listings(repo_id: str, data_files: Any) -> list[Listing]:
    """Returns the stored listings of the files that `dataset.data_files` chooses."""
    found = []
    for file in sorted(_folder(repo_id).glob("*.json")):
        try:
            facts = stored.read(file, _Stored, way_out="delete it", most_bytes=stored.LARGE)
        except (OSError, StoreError) as error:
            log.warning("%s", error)
            continue
        if facts["data_files"] == data_files:
            found.append(Listing(**{each.name: facts[each.name] for each in fields(Listing)}))  # type: ignore[literal-required]
    return found


def library_copies(repo_id: str) -> tuple[Path, dict[tuple[str, str], Path]]:
    """Returns the folder of the copies that `datasets` made, and the copies by config and commit."""
    from datasets import config as library
    from datasets.naming import camelcase_to_snakecase

    *owner, name = repo_id.split("/")
    folder = Path(library.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(name)]))
    copies = {}
    # The variant that reads a text file as one example comes last, and is kept.
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
    return folder, copies


def _folder(repo_id: str) -> Path:
    from datasets import config as library

    return Path(library.HF_DATASETS_CACHE, "qk_sniffer", repo_id.replace("/", "___"))
