"""Reads a dataset on a branch of the Hub: each file is fetched on its first use.

huggingface_hub caches files by commit. No file is fetched twice, and all files are of one commit.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.hub.answers import is_commit
from qk_sniffer.hub.client import REPO_TYPE, bars_on_a_terminal, reading_api, with_retries
from qk_sniffer.hub.endpoint import check_address, public
from qk_sniffer.hub.revisions import is_hub_id
from qk_sniffer.logs import logger
from qk_sniffer.markdown import in_url
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.files import inside
from qk_sniffer.store.layout import CARD, MANIFEST
from qk_sniffer.store.stored import LARGE
from qk_sniffer.text import is_branch_name, shortened

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo, HfApi

log = logger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Branch:
    """The dataset on the branch `name` of the dataset repository `repo_id`, at `commit`.

    Raises:
        HubError: these are not names of a repository and a branch, and a commit. huggingface_hub makes paths of them.
    """

    repo_id: str
    name: str
    commit: str

    def __post_init__(self) -> None:
        _check_place(self.repo_id, self.name)
        if not is_commit(self.commit):
            raise HubError(f"{self.commit!r} is not a commit of the dataset repository {self.repo_id}")

    def path(self, name: str, size: int | None = None) -> Path:
        """Returns the local copy of the file `name`, which is fetched if necessary.

        Raises:
            HubError: the file cannot be fetched.
            StoreError: it does not have the `size` that the manifest lists, or a link leads out of the cache's folder.
        """
        return _call(self.repo_id, self.name, lambda api: download(api, self.repo_id, name, self.commit, size=size))

    def refetch(self, name: str, size: int | None = None) -> Path:
        """Fetches the file again, to replace a damaged copy on this machine.

        Raises:
            HubError: the file cannot be fetched.
            StoreError: it does not have the `size` that the manifest lists, or a link leads out of the cache's folder.
        """

        def again(api: "HfApi") -> Path:
            return download(api, self.repo_id, name, self.commit, force=True, size=size)

        return _call(self.repo_id, self.name, again)

    def has(self, name: str) -> bool:
        """Whether the file exists. An existing file is fetched.

        Raises:
            HubError: the file cannot be fetched.
        """
        from huggingface_hub.errors import RemoteEntryNotFoundError

        def ask(api: "HfApi") -> bool:
            try:
                download(api, self.repo_id, name, self.commit)
            except RemoteEntryNotFoundError:
                return False
            return True

        return _call(self.repo_id, self.name, ask)

    def fetch(self, sizes: Mapping[str, int]) -> None:
        """Fetches the files that are not on this machine yet, in parallel and with a progress bar.

        Raises:
            HubError: a file cannot be fetched.
            StoreError: it does not have the size that `sizes` has for it.
        """
        from huggingface_hub import try_to_load_from_cache

        def is_here(name: str) -> bool:
            return isinstance(
                try_to_load_from_cache(self.repo_id, name, revision=self.commit, repo_type=REPO_TYPE), str
            )

        if missing := [name for name in sizes if not is_here(name)]:
            there = _call(self.repo_id, self.name, lambda api: _sizes(api, self.repo_id, self.commit))
            for name in missing:
                _check_size(self, name, there.get(name), sizes[name])
            log.info("fetching %d files of %s", len(missing), self)
            with bars_on_a_terminal():
                _call(self.repo_id, self.name, lambda api: _snapshot(api, self.repo_id, missing, self.commit))

    @property
    def url(self) -> str:
        """The page of the branch."""
        from huggingface_hub import constants

        return branch_url(constants.ENDPOINT, self.repo_id, self.name)

    def __str__(self) -> str:
        return f"{self.repo_id}, branch {self.name}"


def branch_url(endpoint: str, repo_id: str, branch: str) -> str:
    """Returns the address of a branch's page."""
    return f"{public(endpoint)}/datasets/{repo_id}/tree/{in_url(branch)}"


def find(repo_id: str, branch: str) -> Branch | None:
    """Returns the branch at its newest commit, with or without a dataset; None if it does not exist.

    Raises:
        HubError: the Hub cannot be reached, or does not show the repository to this account.
    """
    from huggingface_hub import errors as hub

    def ask(api: "HfApi") -> str | None:
        try:
            return api.repo_info(repo_id, repo_type=REPO_TYPE, revision=branch).sha
        except hub.GatedRepoError:  # a subclass of RepositoryNotFoundError
            raise
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError):
            return None

    _check_place(repo_id, branch)
    commit = _call(repo_id, branch, ask)
    return None if commit is None else Branch(repo_id, branch, commit)


def open_branch(repo_id: str, revision: str | None) -> Branch:
    """Opens the dataset at `revision`, from the cache of huggingface_hub if the Hub cannot be reached.

    Raises:
        HubError: the dataset does not exist, or is neither cached nor within reach.
    """
    check_address()
    from huggingface_hub import errors as hub

    branch = revision or "main"

    def ask(api: "HfApi") -> str:
        try:
            snapshot = download(api, repo_id, MANIFEST, branch).parent
        except hub.GatedRepoError:
            raise
        except hub.RepositoryNotFoundError:
            raise HubError(
                f"there is no dataset repository {repo_id} on the Hub, nor a folder of that name; a private one is "
                "shown after a login (`hf auth login`, or HF_TOKEN in the environment)"
            ) from None
        except (hub.RevisionNotFoundError, hub.RemoteEntryNotFoundError):
            raise HubError(
                f"{repo_id} has no dataset of qk-sniffer at the revision {branch!r}; name a branch with "
                f"revision=...{_branches(api, repo_id)}"
            ) from None
        _remember(snapshot, branch)
        return snapshot.name

    _check_place(repo_id, branch)
    return Branch(repo_id, branch, _call(repo_id, branch, ask))


def _check_place(repo_id: str, revision: str) -> None:
    if not is_hub_id(repo_id):
        raise HubError(f"{repo_id!r} is not the name of a repository on the Hub; it must be owner/name")
    if not is_branch_name(revision):
        raise HubError(f"{revision!r} is not a revision of {repo_id}; it must be a branch, a tag or a commit")


def _call(repo_id: str, revision: str, ask: "Callable[[HfApi], _Result]") -> _Result:
    api = reading_api()

    def failed(reason: str) -> HubError:
        return HubError(f"the dataset {repo_id} at {revision!r} cannot be read from the Hub: {reason}")

    return with_retries(lambda: ask(api), api, failed)


def download(
    api: "HfApi", repo_id: str, name: str, revision: str, *, force: bool = False, size: int | None = None
) -> Path:
    """Returns the path of the local copy of a file, which is fetched if necessary.

    The cache may come from someone else, with links to any file: none is followed out of the cache.

    Args:
        size: the size that the file must have; None for any, of a manifest or a card up to `LARGE`.

    Raises:
        HubError: the file is too large, or `revision` is no branch, tag or commit.
        StoreError: it has another size, or a link leads out of the cache.
        Exception: those of huggingface_hub.
    """
    _check_place(repo_id, revision)
    fetch: Any = partial(
        api.hf_hub_download, repo_id, name, repo_type=REPO_TYPE, revision=revision, force_download=force
    )
    if size is not None or name in (MANIFEST, CARD):  # the sizes of the other files are in the manifest
        if force:
            there = _size_to_fetch(api, repo_id, name, revision)
        else:
            found = fetch(dry_run=True)
            there = _missing_size(found)
            fetch = partial(fetch, revision=found.commit_hash)  # a branch may move until the file is fetched
        if size is not None:
            _check_size(f"{repo_id} at {revision!r}", name, there, size)
        elif (there or 0) > LARGE:
            raise HubError(f"{name} of {repo_id} at {revision!r} is larger than {LARGE >> 20:,} MB: it is not fetched")
    path: str = fetch()
    return inside(Path(path.removesuffix(name)), name)


def _remember(snapshot: Path, revision: str) -> None:
    """Records the commit of a revision in the cache, for a later start without a network.

    huggingface_hub does so only for a file that it fetches by the name of a branch. A cache may come from someone else:
    nothing is written through a link out of the repository's folder.
    """
    with suppress(OSError, StoreError):  # the cache may be read-only
        ref = inside(snapshot.parent.parent, f"refs/{revision}")
        if revision != snapshot.name and (not ref.exists() or ref.read_text() != snapshot.name):
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(ref, snapshot.name.encode())


def _missing_size(info: "DryRunFileInfo") -> int | None:
    """Returns the size of a file that a download would fetch; None if it is on this machine."""
    return info.file_size if info.will_download else None


def _size_to_fetch(api: "HfApi", repo_id: str, name: str, revision: str) -> int | None:
    """Returns the size of a file on the Hub; a dry run would tell that of the copy on this machine."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo_id, name, repo_type=REPO_TYPE, revision=revision, endpoint=api.endpoint)
    return api.get_hf_file_metadata(url=url).size


def _check_size(where: object, name: str, there: int | None, listed: int) -> None:
    """Checks the size of a file before it is fetched: a foreign repository may hold any amount of data.

    `there` is None for a file that does not exist, which the download reports, or is on this machine.
    """
    if there is not None and there != listed:
        raise StoreError(
            f"{name} of {where} has {there:,} bytes instead of the {listed:,} that manifest.json lists: it is not "
            "fetched"
        )


def _sizes(api: "HfApi", repo_id: str, revision: str) -> dict[str, int]:
    """Returns the sizes of all files, by name."""
    listed = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=REPO_TYPE)
    return {each.path: each.size for each in listed if hasattr(each, "size")}


def _snapshot(api: "HfApi", repo_id: str, names: list[str], revision: str) -> Any:
    return api.snapshot_download(repo_id, repo_type=REPO_TYPE, revision=revision, allow_patterns=names)


def _branches(api: "HfApi", repo_id: str) -> str:
    """Returns the branches of a repository for a message."""
    try:
        found = sorted(ref.name for ref in api.list_repo_refs(repo_id, repo_type=REPO_TYPE).branches)
    except Exception:  # the list only adds to a message about another error
        return ""
    names = [name for name in found if name != "main"]
    return f"; it has: {shortened(names, 30)}" if names else "; it has none"
