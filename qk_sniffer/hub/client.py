"""How the Hub is asked: what passes is tried again, what does not becomes an error with the way out.

What passes is a conflict with another writer, a rate limit, a server error, a lost connection. No message holds the
token, and none of the library's errors is kept as a cause, which might quote it.
"""

import json
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from qk_sniffer.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)

REPO_TYPE = "dataset"

_TRIES = 5
_TRIES_IN_CONFLICT = 60
"""After a conflict somebody else has come through: of so many writers, every one does."""
_FIRST_WAIT_S = 2.0
_LONGEST_USUAL_WAIT_S = 30.0
_LONGEST_WAIT_S = 3600.0
"""A job that holds a machine does not wait longer for the Hub than this, whatever the Hub asks for."""

_CONFLICTS = {409, 412}
_PASSING = {408, 429} | _CONFLICTS
"""The status codes, besides those of server errors, that another try may not meet again."""

_WITHOUT = "To capture without publishing, leave output.hf_repo_id out"

PUBLIC = (
    "output.private=true, but the repository exists and is public. Make it private on its settings page, or leave "
    "output.private out"
)

_Result = TypeVar("_Result")


def with_retries(attempt: Callable[[], _Result], api: "HfApi", failed: Callable[[str], HubError]) -> _Result:
    """What `attempt` returns, tried again after what passes. `failed` makes an error of the reason.

    Raises:
        HubError: that of `failed`; or one that `attempt` raises itself, which is not tried again.
    """
    tries = conflicts = 0
    while True:
        try:
            return attempt()
        except Exception as error:
            if not _is_foreseen(error):
                raise
            why = reason(error, api)
            if _status(error) in _CONFLICTS:
                conflicts += 1
            else:
                tries += 1
            wait_s = _wait_s(error, tries + conflicts)
            given_up = tries == _TRIES or conflicts == _TRIES_IN_CONFLICT
            if wait_s is None or wait_s > _LONGEST_WAIT_S or given_up:
                raise failed(why) from None
            log.warning("the Hub: %s; trying again in %.0f s", why, wait_s)
            time.sleep(wait_s)


def writing_api() -> "HfApi":
    """The Hub for who publishes: an error where there is no token, instead of requests without one."""
    from huggingface_hub import HfApi

    return HfApi(token=True)


def require_access(repo_id: str, *, private: bool = False, api: "HfApi | None" = None) -> None:
    """Finds out before a long job that it could not publish to `repo_id`; only warns if the Hub cannot be reached.

    Raises:
        HubError: there is no token, the Hub refuses it, it may only read, or offline mode is on; the repository belongs
            to somebody else; it is public and shall be `private`.
    """
    from huggingface_hub import errors as hub

    api = api or writing_api()
    try:
        account = api.whoami()
        is_public = private and _is_public(api, repo_id)
    except Exception as error:
        if not _is_foreseen(error):
            raise
        why = reason(error, api)
        if _status(error) in (401, 403) or isinstance(error, hub.LocalTokenNotFoundError | hub.OfflineModeIsEnabled):
            raise HubError(f"the dataset could not be published to the Hub: {why}. {_WITHOUT}") from None
        log.warning("the login to the Hub could not be checked: %s", why)
        return
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            "the dataset could not be published to the Hub: the token may only read. Set HF_TOKEN to one that may "
            f"write, or log in with `hf auth login`. {_WITHOUT}"
        )
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))]
    if repo_id.split("/")[0] not in owners:
        raise HubError(
            f"the dataset could not be published to {repo_id}: the login is that of {account['name']}, which may write "
            f"to repositories of {', '.join(owners)}. Give output.hf_repo_id one of them. {_WITHOUT}"
        )
    if is_public:
        raise HubError(f"the dataset could not be published to {repo_id}: {PUBLIC}")


def _is_public(api: "HfApi", repo_id: str) -> bool:
    from huggingface_hub import errors as hub

    try:
        return not api.repo_info(repo_id, repo_type=REPO_TYPE).private
    except hub.RepositoryNotFoundError:
        return False


@contextmanager
def bars_on_a_terminal() -> Iterator[None]:
    """Hides the progress bars of huggingface_hub where they would fill a log."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()


def reason(error: Exception, api: "HfApi") -> str:
    """What went wrong, and the way out where it is known; without the token."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalTokenNotFoundError):
        return "there is no token: set HF_TOKEN, or log in with `hf auth login`"
    if any(isinstance(cause, hub.OfflineModeIsEnabled) for cause in _causes(error)):
        return "offline mode is on: unset HF_HUB_OFFLINE"
    refusal = _refusal(error)
    if refusal is None and isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__, api)  # it says that nothing is on this machine either, and its cause why
    if refusal is None:
        return f"{type(error).__name__}: {_shown(str(error), api)}"
    status = refusal.response.status_code
    said = f"{status}, {_shown(refusal.server_message or str(refusal), api)}"
    if isinstance(refusal, hub.GatedRepoError):
        return f"the repository is gated ({said}): ask for access on its page"
    if status == 401:
        return f"the Hub refuses the token ({said}): set HF_TOKEN to a valid one, or log in with `hf auth login`"
    if status == 403:
        return f"the token gives no right to that ({said}): use one that does, or another repository"
    if status == 404:
        return f"the Hub knows no such place, or does not show it to this account ({said})"
    return f"the Hub answers {said}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _refusal(error: Exception) -> "HfHubHTTPError | None":
    """The Hub's answer that is behind `error`, if one is."""
    from huggingface_hub import errors as hub

    return next((cause for cause in _causes(error) if isinstance(cause, hub.HfHubHTTPError)), None)


def _status(error: Exception) -> int | None:
    refusal = _refusal(error)
    return None if refusal is None else refusal.response.status_code


def _wait_s(error: Exception, tries: int) -> float | None:
    """How long to wait before another try: at least as long as the Hub asks for. None if another would be in vain."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    usual = min(_FIRST_WAIT_S * 2.0 ** (tries - 1), _LONGEST_USUAL_WAIT_S) * random.uniform(0.5, 1.5)
    refusal = _refusal(error)
    if refusal is not None:
        status = refusal.response.status_code
        return usual + _asked_s(refusal.response.headers) if status in _PASSING or status >= 500 else None
    if isinstance(error, LocalEntryNotFoundError):
        return None  # no connection for a download, for which huggingface_hub has itself tried half a minute
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        # A proxy's page instead of JSON: huggingface_hub reads some answers before it looks at their status.
        if isinstance(cause, ConnectionError | TimeoutError | json.JSONDecodeError):
            return usual
        if _http_names(cause) & {"NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"}:
            return usual
    return None


def _asked_s(headers: Mapping[str, str]) -> float:
    """The seconds that an answer asks to wait; Retry-After is a number of them, or a date."""
    asked = headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    if asked:
        with suppress(ValueError, TypeError):  # no date, or one without a zone
            return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    limit = re.search(r"r=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0


def _is_foreseen(error: Exception) -> bool:
    """Whether `error` tells of the Hub, the network or the machine, and not of a mistake in this program."""
    return isinstance(error, OSError | ValueError | RuntimeError) or bool(_http_names(error))


def _http_names(error: BaseException) -> set[str]:
    # huggingface_hub 1 uses httpx, 2 uses httpx2: neither is a library of ours, and their classes have the same names.
    return {base.__name__ for base in type(error).__mro__ if base.__module__.split(".")[0] in ("httpx", "httpx2")}


def _shown(text: str, api: "HfApi") -> str:
    from huggingface_hub import get_token

    token = api.token if isinstance(api.token, str) else get_token()
    if token:
        # A token that cannot be sent (a line break in HF_TOKEN) is quoted with escapes.
        text = text.replace(token, "***").replace(repr(token)[1:-1], "***")
    return " ".join(text.split())[:300].rstrip(".")
