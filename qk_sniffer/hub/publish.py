"""Publishes a finished folder to a branch of the Hub, in one commit.

Each attempt takes the same steps. It creates the repository if it is missing, and the branch from the repository's
first commit, so that the branch inherits no files. If the branch's newest commit has the title of this content, nothing
is left to do. Otherwise the attempt uploads the files, and one commit replaces the earlier version, provided that the
branch has not moved. A transient error (a conflict, a rate limit, a server error, a lost connection) leads to another
attempt. If the answer to a commit was lost, the next attempt finds the commit by its title.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.hub.branch import Branch, branch_url
from qk_sniffer.hub.catalogue import update_catalogue
from qk_sniffer.hub.client import PUBLIC, REPO_TYPE, bars_on_a_terminal, with_retries, writing_api
from qk_sniffer.logs import logger
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import open_inside
from qk_sniffer.store.layout import CARD, MANIFEST, Layout, is_dataset_file
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import Check, unchecked
from qk_sniffer.store.places import has_mark
from qk_sniffer.text import shortened

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, GitCommitInfo, HfApi

log = logger(__name__)

_FILES_AT_A_TIME, _BYTES_AT_A_TIME = 64, 1_000_000_000
"""The sizes of a part of the upload, after which a line is logged."""

Guard = Callable[[Branch], None]
"""Raises an error if the dataset must not replace the one on the branch."""


@dataclass(frozen=True)
class Published:
    """The place of a dataset on the Hub. `changed` is False if the branch already had this content."""

    url: str
    commit: str
    changed: bool


def publish(
    root: Path,
    manifest: Mapping[str, Any],
    repo_id: str,
    branch: str,
    card: bytes,
    *,
    private: bool = False,
    guard: Guard | None = None,
    check: Check = unchecked,
    api: "HfApi | None" = None,
) -> Published:
    """Publishes the dataset at `root` to a branch of the dataset repository `repo_id`, and lists it on main.

    Publishes the manifest, the files that it lists, the pictures, and `card` instead of the folder's card. Deletes the
    files of an earlier version that the dataset no longer has. All other files of the branch stay. On a branch
    without a manifest, files with the names of a dataset's are replaced only without `guard`.

    Only files within the root are sent, and only under the names of a dataset's files. Each file is opened once, and
    compared with its sha256 in the manifest before any of it is sent (`hub/checked_file.py`).

    Args:
        root: of a whole dataset, which is not changed.
        manifest: the dataset's, as `manifests.read` returns it.
        repo_id: created if it is missing.
        branch: created if it is missing.
        card: the branch's README.md.
        private: creates a missing repository as a private one; otherwise the owner's default decides.
        guard: called with each version that the dataset would replace; None replaces anything.
        check: called before the files are read, and before each step that changes the branch. It raises an error if
            another dataset is at `root` now.
        api: the client; by default one with the stored token.

    Raises:
        StoreError: a file is missing, is not the one of the manifest or is elsewhere; `guard` refuses; or the branch
            has files of someone else.
        HubError: the dataset could not be published, or not be listed. The call may be repeated.
    """
    api = api or writing_api()
    publication = _Publication(root, manifest, repo_id, branch, card, private, guard, check, api)
    published = with_retries(publication.attempt, api, publication.failed)
    update_catalogue(api, repo_id)
    return published


class _Publication:
    """The state of one `publish` over its attempts."""

    def __init__(
        self,
        root: Path,
        manifest: Mapping[str, Any],
        repo_id: str,
        branch: str,
        card: bytes,
        private: bool,
        guard: Guard | None,
        check: Check,
        api: "HfApi",
    ) -> None:
        from qk_sniffer.hub.checked_file import changed

        self.api = api
        self._root = root
        self._repo_id = repo_id
        self._branch = branch
        self._private = private
        self._guard = guard
        self._check = check
        check()
        if others := manifests.changed_files(root, manifest):
            raise changed(root / others[0])
        self._card = card
        self._manifest = manifests.with_files(manifest, {CARD: FileEntry.of(card), **_new_pictures(root, manifest)})
        self._title = _title(self._manifest)
        self._parent: str | None = None
        """The parent of the last attempt's commit."""
        self._deletions: list[CommitOperationDelete] = []
        self._additions: dict[str, CommitOperationAdd] = {}
        """The files that were uploaded for this parent, by name. The commit has all of them."""

    def attempt(self) -> Published:
        """Makes one attempt, which resumes from the state of earlier ones."""
        commits = self._commits()
        self._check_privacy()
        if (landed := self._landed(commits)) is not None:
            log.info("%s has this dataset", self._url)
            return Published(self._url, landed, changed=self._parent is not None)
        head = commits[0].commit_id
        if head != self._parent:
            if self._guard is not None:
                self._guard(Branch(self._repo_id, self._branch, head))
            on_branch = self.api.list_repo_files(self._repo_id, repo_type=REPO_TYPE, revision=head)
            if self._guard is not None and MANIFEST not in on_branch:
                self._refuse_foreign(on_branch, first=commits[-1].commit_id)
            # Kept for a retry on the same commit: the additions know the uploaded files.
            self._deletions, self._additions = self._outdated(on_branch), {}
            self._parent = head
        with bars_on_a_terminal():
            self._check()
            self._upload()
            self._check()
            self._check_privacy()  # an upload may take hours
            commit = self.api.create_commit(
                self._repo_id,
                [*self._deletions, *self._additions.values()],
                commit_message=self._title,
                repo_type=REPO_TYPE,
                revision=self._branch,
                parent_commit=head,
            )
        return Published(self._url, commit.oid, changed=commit.oid != head)

    def _check_privacy(self) -> None:
        """Checks that a repository which is to be private is.

        Raises:
            HubError: it is public.
        """
        if self._private and not self.api.repo_info(self._repo_id, repo_type=REPO_TYPE).private:
            raise self.failed(PUBLIC)

    def _upload(self) -> None:
        """Uploads the files, except small texts, in parts; leaves out those that an earlier attempt has uploaded."""
        own = {CARD: self._card, MANIFEST: manifests.encode(self._manifest)}
        sizes = {name: entry["bytes"] for name, entry in self._manifest["files"].items()}
        sizes |= {name: len(content) for name, content in own.items()}
        size = sum(sizes.values())
        log.info("publishing %d files, %.1f MB, to %s", len(sizes), size / 1e6, self._url)
        num_files, num_bytes = 0, 0
        for some in _portions(sizes):
            if not set(some) <= set(self._additions):
                self._upload_some(some, own)
            num_files += len(some)
            num_bytes += sum(sizes[name] for name in some)
            if len(some) < len(sizes):
                log.info("uploaded %d files, %.1f of %.1f MB", num_files, num_bytes / 1e6, size / 1e6)

    def _upload_some(self, names: list[str], own: Mapping[str, bytes]) -> None:
        """Uploads some files. `own` has the content of those that do not come from the folder."""
        from huggingface_hub import CommitOperationAdd

        from qk_sniffer.hub.checked_file import CheckedFile

        with ExitStack() as opened:
            files = {
                name: opened.enter_context(CheckedFile(self._root, name, self._manifest["files"][name]["sha256"]))
                for name in names
                if name not in own
            }
            additions = {name: files.get(name) or CommitOperationAdd(name, own[name]) for name in names}
            self.api.preupload_lfs_files(
                self._repo_id,
                list(additions.values()),
                repo_type=REPO_TYPE,
                revision=self._branch,
                free_memory=False,
            )
            for file in files.values():
                file.check_unchanged()
        if ignored := [name for name, addition in additions.items() if addition._should_ignore]:
            raise self.failed(
                f"a .gitignore of the branch leaves out {shortened(ignored, 5)}. Remove the file or its rule there"
            )
        for addition in additions.values():
            # Otherwise the commit lacks what the branch has now: maybe in a newer commit, which is taken back by then.
            addition._remote_oid = None
        self._additions |= additions

    def failed(self, reason: str) -> HubError:
        """Returns the error that ends the publication."""
        return HubError(
            f"the dataset was not published to {self._repo_id}, branch {self._branch}: {reason}. It stays whole in "
            f"{self._root}; rerun the command of its job to publish it without capturing again"
        )

    @property
    def _url(self) -> str:
        return branch_url(self.api.endpoint, self._repo_id, self._branch)

    def _commits(self) -> "list[GitCommitInfo]":
        """Returns the commits of the branch, the newest first. Creates a missing repository or branch."""
        from huggingface_hub import errors as hub

        try:
            return self._history(self._branch)
        except hub.GatedRepoError:  # a subclass of RepositoryNotFoundError
            raise
        except hub.RepositoryNotFoundError:
            if self._parent is not None:  # deleted since: it may have been private, and its owner may not want it
                raise
            # False would make it public, whatever the owner's default is.
            private = True if self._private else None
            self.api.create_repo(self._repo_id, repo_type=REPO_TYPE, private=private, exist_ok=True)
        except hub.RevisionNotFoundError:
            pass
        first = self._history()[-1].commit_id
        self.api.create_branch(self._repo_id, repo_type=REPO_TYPE, branch=self._branch, revision=first, exist_ok=True)
        try:
            return self._history(self._branch)
        except hub.RevisionNotFoundError:  # another job is creating it, or the Hub does not show it yet
            raise TimeoutError(f"the branch {self._branch} does not exist yet") from None

    def _history(self, branch: str = "main") -> "list[GitCommitInfo]":
        """Returns the commits of a branch that exists, the newest first."""
        commits = self.api.list_repo_commits(self._repo_id, repo_type=REPO_TYPE, revision=branch)
        if not commits:
            raise ValueError(f"the Hub lists no commit of the branch {branch}")
        return commits

    def _landed(self, commits: "list[GitCommitInfo]") -> str | None:
        """Returns the commit of this content: the newest one, or one that is newer than an earlier attempt's parent."""
        if self._parent is None:
            newer = commits[:1]
        else:
            newer = list(takewhile(lambda commit: commit.commit_id != self._parent, commits))
        return next((commit.commit_id for commit in newer if commit.title == self._title), None)

    def _refuse_foreign(self, on_branch: Sequence[str], first: str) -> None:
        """Refuses to replace files of a branch without a dataset, except for those of the repository's first commit.

        `first` is the first commit of the branch. It is another one if the history of the branch was squashed: then it
        has all files of the branch, whoever made them.

        Raises:
            StoreError: names them.
        """
        if not any(map(is_dataset_file, on_branch)):
            return
        new = {*on_branch}
        if first == self._history()[-1].commit_id:
            new.difference_update(self.api.list_repo_files(self._repo_id, repo_type=REPO_TYPE, revision=first))
        if found := sorted(filter(is_dataset_file, new)):
            raise StoreError(
                f"not published: {self._repo_id}, branch {self._branch}, has {shortened(found, 5)} and no {MANIFEST}, "
                "so they are not of a dataset of qk-sniffer. Publish to another branch (output.hf_branch=..., of "
                "finalize hf_branch=...), or replace them: name the branch to finalize (hf_branch=...), or give the "
                "job output.overwrite=true"
            )

    def _outdated(self, on_branch: Sequence[str]) -> "list[CommitOperationDelete]":
        """Returns the deletions of the files of the dataset on the branch that this one does not have."""
        from huggingface_hub import CommitOperationDelete

        names = self._manifest["files"]
        outdated = [name for name in on_branch if name not in names and is_dataset_file(name)]
        return [CommitOperationDelete(name) for name in outdated if MANIFEST in on_branch]


def _portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yields parts of the names of files. `sizes` has their bytes."""
    part: list[str] = []
    size = 0
    for name, bytes_of_it in sizes.items():
        if part and (len(part) == _FILES_AT_A_TIME or size + bytes_of_it > _BYTES_AT_A_TIME):
            yield part
            part, size = [], 0
        part.append(name)
        size += bytes_of_it
    yield part


def _new_pictures(root: Path, manifest: Mapping[str, Any]) -> dict[str, FileEntry]:
    """Returns the entries of the pictures that the manifest does not list.

    No digest tells what these files are. In a dataset from someone else, a hard link may have the name of a picture and
    the content of any file of this machine.

    Raises:
        StoreError: a picture cannot be read, a link leads out of the dataset, or this package has not drawn it.
    """
    entries = {}
    for picture in Layout(root).pictures():
        name = picture.relative_to(root).as_posix()
        try:
            with open_inside(root, name) as file:
                if name not in manifest["files"]:
                    if not has_mark(file):
                        raise StoreError(
                            f"{picture} was not drawn by qk-sniffer, and is not published: move it out of the dataset, "
                            "and rerun the command"
                        )
                    file.seek(0)
                    size = os.fstat(file.fileno()).st_size
                    entries[name] = FileEntry(None, size, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise StoreError(
                f"{picture} cannot be published: {error.strerror}. Repair or remove it, and rerun the command"
            ) from error
    return entries


def _title(manifest: dict[str, Any]) -> str:
    content = manifests.encode({key: value for key, value in manifest.items() if key != "timings"})
    digest = hashlib.sha256(content).hexdigest()[:16]
    config = manifest["config"]
    return f"{config['model']['slug']} on {config['dataset']['slug']}: {manifest['rows']:,} rows [{digest}]"
