"""Which commit of a Hub repository a job uses, and whether the Hub can be reached at all.

Every start asks the Hub once, without the retries that the loading libraries make (half a minute and more when there
is no network). The answer is a commit, so that everything loaded afterwards is of one state of the repository.
"""

import re
from pathlib import Path
from typing import Literal

from qk_sniffer.errors import SourceError

Kind = Literal["dataset", "model"]

_TIMEOUT_S = 10.0


class HubUnreachableError(SourceError):
    """The Hub gives no answer: offline mode, no network, or a server error. A cached copy may still serve."""


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a repository on the Hub: `name` or `owner/name`."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return re.fullmatch(rf"{part}(?:/{part})?", name, flags=re.ASCII) is not None


def hub_commit(kind: Kind, name: str, revision: str | None = None) -> str:
    """The commit that `revision` (branch, tag or commit; null for the default branch) of a repository stands at.

    Raises:
        HubUnreachableError: there was no usable answer.
        SourceError: there is no such repository or revision, or it is not open to this account.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        commit = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_TIMEOUT_S).sha
    except hub.GatedRepoError:
        raise SourceError(
            f"{kind} {name!r} is gated on the Hub: ask for access on its page, then log in (`hf auth login`, or "
            "HF_TOKEN in the environment)."
        ) from None
    except hub.RevisionNotFoundError:
        raise SourceError(f"{kind} {name!r} has no revision {revision!r}.{_revisions(kind, name)}") from None
    except hub.RepositoryNotFoundError:
        raise SourceError(
            f"{kind} {name!r} is neither a local path nor on the Hub, where a private repository needs a login "
            "(`hf auth login`, or HF_TOKEN in the environment)."
        ) from None
    except hub.OfflineModeIsEnabled:
        raise HubUnreachableError("the Hub cannot be reached: offline mode is on (HF_HUB_OFFLINE=1)") from None
    except Exception as error:  # the transport's own errors, whichever HTTP library is beneath, and server errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubUnreachableError(f"the Hub cannot be reached: {reason}") from error
    if commit is None:
        raise HubUnreachableError(f"the Hub cannot be reached: it named no commit for {name!r}")
    return commit


def cached_commit(kind: Kind, name: str, revision: str | None = None) -> str | None:
    """The commit of `revision` as far as the files in the local Hub cache tell; null if they do not.

    A snapshot that was loaded by its commit leaves no branch name behind: the only snapshot there is taken for the
    default branch, several are not guessed among.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    ref = folder / "refs" / (revision or "main")
    if ref.is_file():
        return ref.read_text().strip()
    snapshots = [path.name for path in folder.glob("snapshots/*")]
    if revision in snapshots:
        return revision
    return snapshots[0] if len(snapshots) == 1 and revision in (None, "main") else None


def _revisions(kind: Kind, name: str, most: int = 20) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:  # only a help in a message about something else
        return ""
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f" It has: {', '.join(names[:most])}{more}; a commit will do too."
