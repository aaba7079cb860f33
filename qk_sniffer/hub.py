"""A dataset on the Hub: a finished folder becomes what a branch holds, in one commit.

Every try goes the same way. The repository is made if it is missing, and so is the branch, from the repository's first
commit, so that it inherits no files. Where the branch's newest commit has the title of this content there is nothing
to do. Otherwise the files go up, and one commit replaces the earlier version, on condition that the branch has not
moved meanwhile. What passes (a conflict, a rate limit, a server error, a lost connection) is tried again; a commit
that landed although its answer was lost is then found by its title.
"""

import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout, parse_head_name

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, GitCommitInfo, HfApi

log = logging.getLogger(__name__)

_TRIES = 5
_FIRST_WAIT_S = 2.0
_LONGEST_WAIT_S = 3600.0
"""A job that holds a machine does not wait longer for the Hub than this."""

_PASSING = {408, 409, 412, 429}
"""The status codes, besides those of server errors, that another try may not meet again."""

_TYPE = "dataset"


@dataclass(frozen=True)
class Published:
    """Where a dataset is on the Hub. `changed` is False where the branch held this content already."""

    url: str
    commit: str
    changed: bool


def publish(root: Path, repo_id: str, branch: str, *, private: bool = False, api: "HfApi | None" = None) -> Published:
    """Makes the dataset at `root` what the branch of the dataset repository `repo_id` holds.

    Only the files that the manifest names are published, and the manifest. Files of an earlier version that are no
    longer part of the dataset are deleted; what else the branch holds is left alone. A repository that is made here
    is private with `private`, else as its owner's default is.

    Raises:
        StoreError: the dataset is not whole.
        HubError: it could not be published. The folder is as it was, and the call may be made again.
    """
    publication = _Publication(root, repo_id, branch, private, api or _api())
    tries = 0
    while True:
        tries += 1
        try:
            return publication.attempt()
        except Exception as error:
            if not _is_foreseen(error):
                raise
            reason = _reason(error, publication.api)
            wait_s = _wait_s(error, tries)
            if wait_s is None or wait_s > _LONGEST_WAIT_S or tries == _TRIES:
                raise publication.failed(reason) from None  # a cause may quote what must not be shown
            log.warning("not published yet: %s; trying again in %.0f s", reason, wait_s)
            time.sleep(wait_s)


def require_login(api: "HfApi | None" = None) -> None:
    """Finds out before a long job that there is no login to publish with; only warns if the Hub cannot be reached.

    Raises:
        HubError: there is no token, the Hub refuses it, it may only read, or offline mode is on.
    """
    from huggingface_hub import errors as hub

    api = api or _api()
    try:
        account = api.whoami()
    except Exception as error:
        if not _is_foreseen(error):
            raise
        refused = isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (401, 403)
        reason = _reason(error, api)
        if refused or isinstance(error, hub.LocalTokenNotFoundError | hub.OfflineModeIsEnabled):
            raise HubError(f"the dataset could not be published to the Hub: {reason}. {_WITHOUT}") from None
        log.warning("the login to the Hub could not be checked: %s", reason)
        return
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            "the dataset could not be published to the Hub: the token may only read. Set HF_TOKEN to one that may "
            f"write, or log in with `hf auth login`. {_WITHOUT}"
        )


_WITHOUT = "To capture without publishing, leave output.hf_repo_id out"


class _Publication:
    """What the tries of one `publish` share."""

    def __init__(self, root: Path, repo_id: str, branch: str, private: bool, api: "HfApi") -> None:
        self.api = api
        self._root = root
        self._repo_id = repo_id
        self._branch = branch
        self._private = private
        self._manifest = manifests.read(root)
        _check_files(root, self._manifest)
        self._title = _title(self._manifest)
        self._parent: str | None = None
        """The commit that the last try was to follow."""
        self._operations: list[CommitOperationAdd | CommitOperationDelete] = []

    def attempt(self) -> Published:
        """One try, which goes on from what earlier ones did."""
        commits = self._commits()
        if self._private and not self.api.repo_info(self._repo_id, repo_type=_TYPE).private:
            raise self.failed(
                "output.private=true, but the repository exists and is public. Make it private on its settings page, "
                "or leave output.private out"
            )
        if (landed := self._landed(commits)) is not None:
            log.info("%s holds this dataset", self._url)
            return Published(self._url, landed, changed=self._parent is not None)
        head = commits[0].commit_id
        if head != self._parent:
            # Kept for another try on the same commit: they know what is uploaded, and which files are unchanged.
            self._operations = self._changes(head)
            self._parent = head
        files = self._manifest["files"].values()
        size_mb = sum(entry["bytes"] for entry in files) / 1e6
        log.info("publishing %d files, %.1f MB, to %s", len(files) + 1, size_mb, self._url)
        made = self.api.create_commit(
            self._repo_id,
            self._operations,
            commit_message=self._title,
            repo_type=_TYPE,
            revision=self._branch,
            parent_commit=head,
        )
        return Published(self._url, made.oid, changed=made.oid != head)

    def failed(self, reason: str) -> HubError:
        """What ends the publication."""
        return HubError(
            f"the dataset was not published to {self._repo_id}, branch {self._branch}: {reason}. It stays whole in "
            f"{self._root}; the same command publishes it later, without capturing again"
        )

    @property
    def _url(self) -> str:
        return f"{self.api.endpoint}/datasets/{self._repo_id}/tree/{self._branch.replace('/', '%2F')}"

    def _commits(self) -> "list[GitCommitInfo]":
        """Those of the branch, the newest first. Makes repository and branch if they are missing."""
        from huggingface_hub import errors as hub

        try:
            return self.api.list_repo_commits(self._repo_id, repo_type=_TYPE, revision=self._branch)
        except hub.GatedRepoError:  # for huggingface_hub a kind of missing repository
            raise
        except hub.RepositoryNotFoundError:
            # Not False, which would make it public whatever the owner's default is.
            private = True if self._private else None
            self.api.create_repo(self._repo_id, repo_type=_TYPE, private=private, exist_ok=True)
        except hub.RevisionNotFoundError:
            pass
        first = self.api.list_repo_commits(self._repo_id, repo_type=_TYPE)[-1].commit_id
        self.api.create_branch(self._repo_id, repo_type=_TYPE, branch=self._branch, revision=first, exist_ok=True)
        return self.api.list_repo_commits(self._repo_id, repo_type=_TYPE, revision=self._branch)

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
        there = self.api.list_repo_files(self._repo_id, repo_type=_TYPE, revision=head)
        return [
            *(CommitOperationDelete(name) for name in there if name not in names and _is_of_a_dataset(name)),
            *(CommitOperationAdd(name, self._root / name) for name in names),
            CommitOperationAdd(Layout(self._root).manifest.name, manifests.encode(self._manifest)),
        ]


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=True)  # an error where there is no token, instead of requests without one


def _check_files(root: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        path = root / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise StoreError(
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
    return file == "data.parquet" and (folder == "examples" or parse_head_name(folder) is not None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _wait_s(error: Exception, tries: int) -> float | None:
    """How long to wait before another try: at least as long as the Hub asks for. None if another would be in vain."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    usual = _FIRST_WAIT_S * 2.0 ** (tries - 1) * random.uniform(0.5, 1.5)
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            status, headers = cause.response.status_code, cause.response.headers
            asked = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
            asked = asked or re.search(r"r=0;\s*t=(\d+)", headers.get("RateLimit", ""))
            return usual + (int(asked[1]) if asked else 0) if status in _PASSING or status >= 500 else None
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        # A proxy's page instead of JSON: huggingface_hub reads some answers before it looks at their status.
        if isinstance(cause, ConnectionError | TimeoutError | json.JSONDecodeError):
            return usual
        if _http_names(cause) & {"NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"}:
            return usual
    return None


def _is_foreseen(error: Exception) -> bool:
    """Whether `error` tells of the Hub, the network or the machine, and not of a mistake in this program."""
    return isinstance(error, OSError | ValueError | RuntimeError) or bool(_http_names(error))


def _http_names(error: BaseException) -> set[str]:
    # huggingface_hub 1 uses httpx, 2 uses httpx2: neither is a library of ours, and their classes have the same names.
    return {base.__name__ for base in type(error).__mro__ if base.__module__.split(".")[0] in ("httpx", "httpx2")}


def _reason(error: Exception, api: "HfApi") -> str:
    """What went wrong, and the way out where it is known; without the token."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalTokenNotFoundError):
        return "there is no token: set HF_TOKEN, or log in with `hf auth login`"
    if isinstance(error, hub.OfflineModeIsEnabled):
        return "offline mode is on: unset HF_HUB_OFFLINE"
    refusal = next((cause for cause in _causes(error) if isinstance(cause, hub.HfHubHTTPError)), None)
    if refusal is None:
        return f"{type(error).__name__}: {_shown(str(error), api)}"
    status = refusal.response.status_code
    said = f"{status}, {_shown(refusal.server_message or str(refusal), api)}"
    if isinstance(refusal, hub.GatedRepoError):
        return f"the repository is gated ({said}): ask for access on its page"
    if status == 401:
        return f"the Hub refuses the token ({said}): set HF_TOKEN to a valid one, or log in with `hf auth login`"
    if status == 403:
        return f"the token gives no right to write there ({said}): use one that does, or another output.hf_repo_id"
    if status == 404:
        return f"the Hub knows no such place, or does not show it to this account ({said})"
    return f"the Hub answers {said}"


def _shown(text: str, api: "HfApi") -> str:
    from huggingface_hub import get_token

    token = api.token if isinstance(api.token, str) else get_token()
    if token:
        # A token that cannot be sent (a line break in HF_TOKEN) is quoted with escapes.
        text = text.replace(token, "***").replace(repr(token)[1:-1], "***")
    return " ".join(text.split())[:300].rstrip(".")
