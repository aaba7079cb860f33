"""Finds the commit of a revision of a Hub repository, so that a job loads one state of the repository.

Each start asks the Hub once, without the retries of the loading libraries, which take half a minute and more without a
network.
"""

import re
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from qk_sniffer.errors import SourceError
from qk_sniffer.hub.answers import is_commit
from qk_sniffer.hub.client import causes, reading_api
from qk_sniffer.text import is_utf8_path, shortened, utf8_way_out

Kind = Literal["dataset", "model"]

_TIMEOUT_S = 10.0


class HubUnreachableError(SourceError):
    """The Hub gives no answer: offline mode, no network, or a server error. A cached copy may still be usable."""


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a repository on the Hub: `name` or `owner/name`."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return re.fullmatch(rf"{part}(?:/{part})?", name, flags=re.ASCII) is not None


def hub_commit(kind: Kind, name: str, revision: str | None = None) -> str:
    """Returns the commit of `revision` (branch, tag or commit; None for the default branch) of a repository.

    Raises:
        HubUnreachableError: the Hub gives no usable answer.
        SourceError: the repository or revision does not exist, or is not open to this account.
    """
    from huggingface_hub import errors as hub

    try:
        commit = reading_api().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S).sha
    except hub.GatedRepoError as error:
        raise refusal_of_gated(kind, name) from error
    except hub.RevisionNotFoundError:
        raise SourceError(f"{kind} {name!r} has no revision {revision!r}.{_revisions(kind, name)}") from None
    except hub.RepositoryNotFoundError:
        raise SourceError(
            f"{kind} {name!r} is neither a local path nor on the Hub, where a private repository needs a login "
            "(`hf auth login`, or HF_TOKEN in the environment)."
        ) from None
    except hub.OfflineModeIsEnabled:
        raise HubUnreachableError("the Hub cannot be reached: offline mode is on (HF_HUB_OFFLINE=1)") from None
    except hub.HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.UNAUTHORIZED:
            raise _unreachable(error) from error
        raise HubUnreachableError(
            "the Hub refuses the token: set HF_TOKEN to a valid one, log in with `hf auth login`, or leave the token "
            "out for what is public"
        ) from error
    except Exception as error:  # errors of any HTTP library below, and server errors
        raise _unreachable(error) from error
    if commit is None or not is_commit(commit):  # it becomes a part of paths
        raise HubUnreachableError(f"the Hub cannot be reached: it named no commit for {name!r}")
    return commit


def refuse_gated(kind: Kind, name: str, error: Exception) -> None:
    """Raises another error for one of a library if its cause is that the account may not read a gated repository.

    The Hub names the commits of such a repository to everybody, so `hub_commit` does not find out.

    Raises:
        SourceError: the repository is gated.
    """
    from huggingface_hub.errors import GatedRepoError

    if any(isinstance(cause, GatedRepoError) for cause in causes(error)):
        raise refusal_of_gated(kind, name) from error


def refusal_of_gated(kind: Kind, name: str) -> SourceError:
    """Returns the error of a gated repository that the account may not read."""
    return SourceError(
        f"{kind} {name!r} is gated on the Hub: ask for access on its page, then log in (`hf auth login`, or HF_TOKEN "
        "in the environment)."
    )


def _unreachable(error: Exception) -> HubUnreachableError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return HubUnreachableError(f"the Hub cannot be reached: {reason}")


def cached_commit(kind: Kind, name: str, revision: str | None = None) -> str | None:
    """Returns the commit of `revision` in the local Hub cache; None if the cache does not tell.

    The cache stores no branch name for a snapshot that was loaded by its commit. A single snapshot counts as the
    default branch, one of several does not.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    ref = folder / "refs" / (revision or "main")
    if ref.is_file():
        with ref.open("rb") as file:
            commit = file.read(50).strip()
        found = commit.decode("ascii", "replace")
        return found if is_commit(found) else None  # it becomes a part of paths, and the cache may be someone else's
    snapshots = [path.name for path in folder.glob("snapshots/*") if is_commit(path.name)]
    if revision in snapshots:
        return revision
    return snapshots[0] if len(snapshots) == 1 and revision in (None, "main") else None


def repository_files(name: str, commit: str) -> list[str]:
    """Returns the names of the files of a model repository at a commit, from the Hub or else from the local cache.

    Empty if neither knows them.
    """
    from huggingface_hub import constants

    try:
        return reading_api().list_repo_files(name, revision=commit)
    except Exception:  # the list only adds to a message about another error
        snapshot = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots", commit)
        return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Returns the path of a file of a model repository, fetched if needed; None if the repository has no such file.

    The local cache is asked first.

    Raises:
        HubUnreachableError: the cache does not tell, and the Hub gives no answer.
        SourceError: the repository is gated, and this account has no access to it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not is_hub_id(name):
        return None
    cached = try_to_load_from_cache(name, file, revision=revision)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None
    try:
        commit, files = _listed(name, revision)
        return Path(hf_hub_download(name, file, revision=commit)) if file in files else None
    except Exception as error:  # errors of any HTTP library below
        refuse_gated("model", name, error)
        raise _unreachable(error) from error


def _listed(name: str, revision: str | None) -> tuple[str | None, frozenset[str]]:
    """Returns the commit of a revision of a model repository, and the names of its files; asks once for a commit."""
    known = _files_at.get((name, revision or ""))
    if known is not None:
        return revision, known
    facts = reading_api().model_info(name, revision=revision, timeout=_TIMEOUT_S)
    if not is_commit(facts.sha):
        raise ValueError(f"it named no commit for {name!r}")
    files = frozenset(sibling.rfilename for sibling in facts.siblings or ())
    _files_at[name, str(facts.sha)] = files
    return facts.sha, files


_files_at: dict[tuple[str, str], frozenset[str]] = {}
"""The names of the files of repositories, by name and commit."""


def check_cache() -> None:
    """Checks that models of the Hub can be loaded from the local cache.

    Raises:
        SourceError: the libraries for weights and tokenizers cannot open the cache's folder.
    """
    from huggingface_hub import constants

    if not is_utf8_path(constants.HF_HUB_CACHE):
        raise SourceError(
            f"models cannot be loaded from the Hub's cache in {constants.HF_HUB_CACHE}: "
            f"{utf8_way_out(constants.HF_HUB_CACHE)}; or set HF_HOME or HF_HUB_CACHE to another folder"
        )


def _revisions(kind: Kind, name: str) -> str:
    try:
        refs = reading_api().list_repo_refs(name, repo_type=kind)
    except Exception:  # the list only adds to a message about another error
        return ""
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    return f" It has: {shortened(names, 20)}; a commit works too."


def hub_commit_of(commit: str | None) -> str | None:
    """Returns the commit, or None for the digest that a local checkpoint has instead of a commit."""
    return None if commit is None or commit.startswith("sha256:") else commit


def current_commit(name: str, revision: str) -> str:
    """Returns the commit of `revision` of a model repository, from the Hub or else from the local cache.

    Raises:
        SourceError: neither has it, or `name` is not that of a repository.
    """
    if name.endswith(".gguf") and (Path(name).is_file() or not is_hub_id(name)):
        folder, file = Path(name).parent, Path(name).name
        raise SourceError(f"model {name} is a GGUF file: set model.name={folder} model.gguf_file={file} instead")
    if not is_hub_id(name):
        raise SourceError(
            f"model {name} is neither a folder nor a Hub id: give model.name (or model.tokenizer.name) a folder with "
            "config.json, or org/name"
        )
    try:
        return hub_commit("model", name, revision)
    except HubUnreachableError as unreachable:
        if (cached := cached_commit("model", name, revision)) is not None:
            return cached
        raise SourceError(
            f"model {name} at {revision}: {unreachable}, and no copy of it is in the local cache. Rerun the command "
            "where the Hub can be reached, or set model.name to a folder with the checkpoint. model=pydoc_tiny needs "
            "no network"
        ) from None
