"""A finished folder becomes what a branch of the Hub holds, in one commit.

Every try goes the same way. The repository is made if it is missing, and so is the branch, from the repository's first
commit, so that it inherits no files. Where the branch's newest commit has the title of this content there is nothing
to do. Otherwise the files go up, and one commit replaces the earlier version, on condition that the branch has not
moved meanwhile. What passes (a conflict, a rate limit, a server error, a lost connection) is tried again; a commit
that landed although its answer was lost is then found by its title.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.hub.branch import Branch, branch_url
from qk_sniffer.hub.catalogue import update_catalogue
from qk_sniffer.hub.client import PUBLIC, REPO_TYPE, bars_on_a_terminal, with_retries, writing_api
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import CARD, MANIFEST, PICTURES, Layout, parse_head_name
from qk_sniffer.store.manifest import FileEntry

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, GitCommitInfo, HfApi

log = logging.getLogger(__name__)

_FILES_AT_A_TIME, _BYTES_AT_A_TIME = 64, 1_000_000_000
"""After so much a line says how far the upload is."""

Guard = Callable[[Branch], None]
"""Raises an error where the dataset must not take the place of the one that a branch holds."""


@dataclass(frozen=True)
class Published:
    """Where a dataset is on the Hub. `changed` is False where the branch held this content already."""

    url: str
    commit: str
    changed: bool


def publish(
    root: Path,
    repo_id: str,
    branch: str,
    card: bytes,
    *,
    private: bool = False,
    guard: Guard | None = None,
    api: "HfApi | None" = None,
) -> Published:
    """Makes the dataset at `root` what the branch of the dataset repository `repo_id` holds, and lists it on main.

    Publishes the manifest, the files that it names, the pictures, and `card` instead of the folder's card. Deletes the
    files of an earlier version that the dataset no longer has, and leaves all other files of the branch alone. Creates
    a missing repository: private with `private`, else with its owner's default. Calls `guard` with each version that
    the dataset would replace.

    Raises:
        StoreError: the dataset is not whole; or what `guard` raises.
        HubError: it could not be published, or not listed. The folder is as it was, and the call may be made again.
    """
    api = api or writing_api()
    publication = _Publication(root, repo_id, branch, card, private, guard, api)
    published = with_retries(publication.attempt, api, publication.failed)
    update_catalogue(api, repo_id)
    return published


class _Publication:
    """What the tries of one `publish` share."""

    def __init__(
        self, root: Path, repo_id: str, branch: str, card: bytes, private: bool, guard: Guard | None, api: "HfApi"
    ) -> None:
        self.api = api
        self._root = root
        self._repo_id = repo_id
        self._branch = branch
        self._private = private
        self._guard = guard
        manifest = manifests.read(root)
        if changed := manifests.changed_files(root, manifest):
            raise _changed(root / changed[0])
        pictures = [path.relative_to(root).as_posix() for path in Layout(root).pictures()]
        self._card = card
        self._manifest = manifests.with_files(
            manifest,
            {CARD: FileEntry.of(self._card)} | {name: FileEntry.of((root / name).read_bytes()) for name in pictures},
        )
        self._title = _title(self._manifest)
        self._parent: str | None = None
        """The commit that the last try was to follow."""
        self._operations: list[CommitOperationAdd | CommitOperationDelete] = []

    def attempt(self) -> Published:
        """One try, which goes on from what earlier ones did."""
        commits = self._commits()
        if self._private and not self.api.repo_info(self._repo_id, repo_type=REPO_TYPE).private:
            raise self.failed(PUBLIC)
        if (landed := self._landed(commits)) is not None:
            log.info("%s holds this dataset", self._url)
            return Published(self._url, landed, changed=self._parent is not None)
        head = commits[0].commit_id
        if head != self._parent:
            if self._guard is not None:
                self._guard(Branch(self._repo_id, self._branch, head))
            # Kept for another try on the same commit: they know what is uploaded, and which files are unchanged.
            self._operations = self._changes(head)
            self._parent = head
        with bars_on_a_terminal():
            self._upload()
            made = self.api.create_commit(
                self._repo_id,
                self._operations,
                commit_message=self._title,
                repo_type=REPO_TYPE,
                revision=self._branch,
                parent_commit=head,
            )
        return Published(self._url, made.oid, changed=made.oid != head)

    def _upload(self) -> None:
        """Uploads the files that are not small text, some at a time; what an earlier try has uploaded is left out."""
        from huggingface_hub import CommitOperationAdd

        additions = [each for each in self._operations if isinstance(each, CommitOperationAdd)]
        size = sum(each.upload_info.size for each in additions)
        log.info("publishing %d files, %.1f MB, to %s", len(additions), size / 1e6, self._url)
        num_files, num_bytes = 0, 0
        for some in _portions(additions):
            self.api.preupload_lfs_files(
                self._repo_id, some, repo_type=REPO_TYPE, revision=self._branch, free_memory=False
            )
            for each in some:
                self._check_content(each)
            num_files += len(some)
            num_bytes += sum(each.upload_info.size for each in some)
            if len(some) < len(additions):
                log.info("uploaded %d files, %.1f of %.1f MB", num_files, num_bytes / 1e6, size / 1e6)

    def _check_content(self, addition: "CommitOperationAdd") -> None:
        # Uploaded files have been hashed on their way, if not before (huggingface_hub 1); the others are texts from
        # memory, and of these huggingface_hub 2 knows no hash.
        entry, info = self._manifest["files"].get(addition.path_in_repo), addition.upload_info
        if entry is not None and getattr(info, "is_hashed", True) and info.sha256.hex() != entry["sha256"]:
            raise _changed(self._root / addition.path_in_repo)

    def failed(self, reason: str) -> HubError:
        """What ends the publication."""
        return HubError(
            f"the dataset was not published to {self._repo_id}, branch {self._branch}: {reason}. It stays whole in "
            f"{self._root}; the command of its job, run again, publishes it without capturing again"
        )

    @property
    def _url(self) -> str:
        return branch_url(self.api.endpoint, self._repo_id, self._branch)

    def _commits(self) -> "list[GitCommitInfo]":
        """Those of the branch, the newest first. Makes repository and branch if they are missing."""
        from huggingface_hub import errors as hub

        try:
            return self.api.list_repo_commits(self._repo_id, repo_type=REPO_TYPE, revision=self._branch)
        except hub.GatedRepoError:  # for huggingface_hub a kind of missing repository
            raise
        except hub.RepositoryNotFoundError:
            # Not False, which would make it public whatever the owner's default is.
            private = True if self._private else None
            self.api.create_repo(self._repo_id, repo_type=REPO_TYPE, private=private, exist_ok=True)
        except hub.RevisionNotFoundError:
            pass
        first = self.api.list_repo_commits(self._repo_id, repo_type=REPO_TYPE)[-1].commit_id
        self.api.create_branch(self._repo_id, repo_type=REPO_TYPE, branch=self._branch, revision=first, exist_ok=True)
        try:
            return self.api.list_repo_commits(self._repo_id, repo_type=REPO_TYPE, revision=self._branch)
        except hub.RevisionNotFoundError:  # another job makes it in this moment, or the Hub does not show it yet
            raise TimeoutError(f"the branch {self._branch} is not there yet") from None

    def _landed(self, commits: "list[GitCommitInfo]") -> str | None:
        """The commit of this content: the newest, or else one that came after the start of an earlier try."""
        if self._parent is None:
            newer = commits[:1]
        else:
            newer = list(takewhile(lambda commit: commit.commit_id != self._parent, commits))
        return next((commit.commit_id for commit in newer if commit.title == self._title), None)

    def _changes(self, head: str) -> "list[CommitOperationAdd | CommitOperationDelete]":
        """What makes the files at the commit `head` this dataset."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = self._manifest["files"]
        there = self.api.list_repo_files(self._repo_id, repo_type=REPO_TYPE, revision=head)
        return [
            *(CommitOperationDelete(name) for name in there if name not in names and _is_of_a_dataset(name)),
            *(CommitOperationAdd(name, self._root / name) for name in names if name != CARD),
            CommitOperationAdd(CARD, self._card),
            CommitOperationAdd(MANIFEST, manifests.encode(self._manifest)),
        ]


def _portions(additions: "Sequence[CommitOperationAdd]") -> "Iterator[Sequence[CommitOperationAdd]]":
    start, size = 0, 0
    for number, each in enumerate(additions):
        if number > start and (number - start == _FILES_AT_A_TIME or size + each.upload_info.size > _BYTES_AT_A_TIME):
            yield additions[start:number]
            start, size = number, 0
        size += each.upload_info.size
    yield additions[start:]


def _changed(path: Path) -> StoreError:
    return StoreError(
        f"{path} is missing or has changed since manifest.json was written; the dataset was not published. "
        "Restore the file, or make the dataset anew with output.overwrite=true"
    )


def _title(manifest: dict[str, Any]) -> str:
    content = manifests.encode({key: value for key, value in manifest.items() if key != "timings"})
    digest = hashlib.sha256(content).hexdigest()[:16]
    config = manifest["config"]
    return f"{config['model']['slug']} on {config['dataset']['slug']}: {manifest['rows']:,} rows [{digest}]"


def _is_of_a_dataset(name: str) -> bool:
    """Whether `name` is that of a file of some dataset, but not of the card and the manifest, which all have."""
    folder, _, file = name.partition("/")
    if folder == PICTURES:
        return file.endswith(".png")
    return file == "data.parquet" and (folder == "examples" or parse_head_name(folder) is not None)
