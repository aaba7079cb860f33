"""Calls the Hub: retries transient errors, and turns the others into messages with a way out.

A conflict with another writer, a rate limit, a server error and a lost connection are transient. No message contains
the token. An error of huggingface_hub may quote the token, so it is never kept as a cause.
"""

import json
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, TypeVar

import msgspec

from qk_sniffer.errors import HubError
from qk_sniffer.hub.endpoint import announce
from qk_sniffer.logs import logger
from qk_sniffer.text import is_utf8_path, one_line, utf8_way_out

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

log = logger(__name__)

REPO_TYPE = "dataset"

_TRIES = 5
_TRIES_IN_CONFLICT = 60
"""After each conflict another writer has succeeded, so that this number of writers all succeed."""
_FIRST_WAIT_S = 2.0
_LONGEST_USUAL_WAIT_S = 30.0
_LONGEST_WAIT_S = 3600.0
"""A job that occupies a machine does not wait longer for the Hub, whatever the Hub asks for."""

_CONFLICTS = {409, 412}
_TRANSIENT = {408, 429} | _CONFLICTS
"""The status codes that are worth a retry, next to those of server errors (500 and above)."""

_WITHOUT = "To capture without publishing, leave output.hf_repo_id out"

PUBLIC = (
    "this start, or an earlier one in its folder, says output.private=true, but the repository exists and is public. "
    "Make it private on its settings page. Or allow a public one: leave output.private out, and run "
    "qk_sniffer.finalize with private=false if an earlier start has said so"
)

_Result = TypeVar("_Result")


def with_retries(attempt: Callable[[], _Result], api: "HfApi", failed: Callable[[str], HubError]) -> _Result:
    """Returns the result of `attempt`, which is retried after a transient error.

    Args:
        attempt: the call.
        api: whose token is hidden in messages.
        failed: makes an error of a reason.

    Raises:
        HubError: the error of `failed`; or one that `attempt` itself raises, which is not retried.
    """
    failures = conflicts = 0
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
                failures += 1
            wait_s = _wait_s(error, failures + conflicts)
            given_up = failures == _TRIES or conflicts == _TRIES_IN_CONFLICT
            if wait_s is None or wait_s > _LONGEST_WAIT_S or given_up:
                raise failed(why) from None
            log.warning("the Hub: %s; retrying in %.0f s", why, wait_s)
            time.sleep(wait_s)


def writing_api() -> "HfApi":
    """Returns a client that raises an error if no token is set, instead of sending requests without one."""
    announce()
    from huggingface_hub import HfApi

    return HfApi(token=True)


def reading_api() -> "HfApi":
    """Returns a client that sends the token if one is set."""
    announce()
    from huggingface_hub import HfApi

    return HfApi()


def require_uploads_from(root: Path) -> None:
    """Checks that huggingface_hub can open files below the folder `root`.

    Raises:
        HubError: the library for uploads cannot.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_DISABLE_XET and not is_utf8_path(root):
        raise HubError(
            f"files in {root} cannot be uploaded to the Hub by its library hf_xet: {utf8_way_out(root)}; or set "
            "HF_HUB_DISABLE_XET=1"
        )


def require_access(repo_id: str, *, private: bool = False, api: "HfApi | None" = None) -> None:
    """Checks before a long job that it may publish to `repo_id`; only warns if the Hub cannot be reached.

    Raises:
        HubError: no token is set, the Hub refuses it, it may only read, or offline mode is on; the account may not
            write to the repository; or the repository is public although `private` is asked for.
    """
    from huggingface_hub import errors as hub

    api = api or writing_api()
    try:
        account = msgspec.convert(api.whoami(), _Account)
        is_public = private and _is_public(api, repo_id)
    except Exception as error:
        if not _is_foreseen(error):
            raise
        why = reason(error, api)
        if _status(error) in (401, 403) or isinstance(error, hub.LocalTokenNotFoundError | hub.OfflineModeIsEnabled):
            raise HubError(f"the dataset could not be published to the Hub: {why}. {_WITHOUT}") from None
        log.warning("the login to the Hub could not be checked: %s", why)
        return
    token = (account.get("auth") or _Auth()).get("accessToken") or _Token()
    if token.get("role") == "read":
        raise HubError(
            "the dataset could not be published to the Hub: the token may only read. Set HF_TOKEN to one that may "
            f"write, or log in with `hf auth login`. {_WITHOUT}"
        )
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs") or ())]
    if repo_id.split("/")[0] not in owners:
        raise HubError(
            f"the dataset could not be published to {repo_id}: the login is that of {account['name']}, which may write "
            f"to repositories of {', '.join(owners)}. Give output.hf_repo_id one of them. {_WITHOUT}"
        )
    if is_public:
        raise HubError(f"the dataset could not be published to {repo_id}: {PUBLIC}")


class _Token(TypedDict):
    role: NotRequired[str | None]


class _Auth(TypedDict):
    accessToken: NotRequired[_Token | None]


class _Organisation(TypedDict):
    name: str


class _Account(TypedDict):
    """What the Hub tells of a login."""

    name: str
    orgs: NotRequired[list[_Organisation] | None]
    auth: NotRequired[_Auth | None]


def _is_public(api: "HfApi", repo_id: str) -> bool:
    from huggingface_hub import errors as hub

    try:
        return not api.repo_info(repo_id, repo_type=REPO_TYPE).private
    except hub.RepositoryNotFoundError:
        return False


@contextmanager
def bars_on_a_terminal() -> Iterator[None]:
    """Hides the progress bars of huggingface_hub if stderr is not a terminal."""
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
    """Returns the cause of an error and its way out, if known, without the token."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalTokenNotFoundError):
        return "there is no token: set HF_TOKEN, or log in with `hf auth login`"
    if any(isinstance(cause, hub.OfflineModeIsEnabled) for cause in causes(error)):
        return "offline mode is on: unset HF_HUB_OFFLINE"
    refusal = _refusal(error)
    if refusal is None and isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__, api)  # the error says only that no copy is on this machine
    if refusal is None:
        return f"{type(error).__name__}: {_without_token(str(error), api)}"
    status = refusal.response.status_code
    answer = f"{status}, {_without_token(refusal.server_message or str(refusal), api)}"
    if isinstance(refusal, hub.GatedRepoError):
        return f"the repository is gated ({answer}): ask for access on its page"
    if status == 401:
        return f"the Hub refuses the token ({answer}): set HF_TOKEN to a valid one, or log in with `hf auth login`"
    if status == 403:
        return f"the token lacks the permission for that ({answer}): use one that has it, or another repository"
    if status == 404:
        return f"the Hub has no such repository, revision or file, or does not show it to this account ({answer})"
    return f"the Hub answers {answer}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and the errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _refusal(error: Exception) -> "HfHubHTTPError | None":
    """Returns the Hub's answer that caused `error`; None if no answer did."""
    from huggingface_hub import errors as hub

    return next((cause for cause in causes(error) if isinstance(cause, hub.HfHubHTTPError)), None)


def _status(error: Exception) -> int | None:
    refusal = _refusal(error)
    return None if refusal is None else refusal.response.status_code


def _wait_s(error: Exception, tries: int) -> float | None:
    """Returns the seconds to wait before a retry, at least those that the Hub asks for; None if a retry is useless."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    usual = min(_FIRST_WAIT_S * 2.0 ** (tries - 1), _LONGEST_USUAL_WAIT_S) * random.uniform(0.5, 1.5)
    refusal = _refusal(error)
    if refusal is not None:
        status = refusal.response.status_code
        return usual + _retry_after_s(refusal.response.headers) if status in _TRANSIENT or status >= 500 else None
    if isinstance(error, LocalEntryNotFoundError):
        return None  # no connection for a download: huggingface_hub has retried for half a minute
    for cause in causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        # A proxy's page instead of JSON: huggingface_hub parses some answers before it checks their status.
        if isinstance(cause, ConnectionError | TimeoutError | json.JSONDecodeError):
            return usual
        if _http_names(cause) & {"NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"}:
            return usual
    return None


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Returns the seconds that an answer asks to wait. Retry-After is a number of seconds or a date."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    if value:
        with suppress(ValueError, TypeError, OverflowError):  # not a date, one without a zone, or a year of many digits
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    limit = re.search(r"r=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0


def _is_foreseen(error: Exception) -> bool:
    """Whether `error` is of the Hub, the network or the machine, and not a mistake in this program."""
    return isinstance(error, OSError | ValueError | RuntimeError) or bool(_http_names(error)) or _is_of_library(error)


def _is_of_library(error: Exception) -> bool:
    """Whether huggingface_hub itself raised the error: it reads answers without a check of their form."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].partition(".")[0] == "huggingface_hub"


def _http_names(error: BaseException) -> set[str]:
    # huggingface_hub 1 uses httpx, 2 uses httpx2. This package depends on neither; their classes have the same names.
    return {base.__name__ for base in type(error).__mro__ if base.__module__.split(".")[0] in ("httpx", "httpx2")}


def _without_token(text: str, api: "HfApi") -> str:
    from huggingface_hub import get_token

    token = api.token if isinstance(api.token, str) else get_token()
    if token:
        # An invalid token (a line break in HF_TOKEN) is quoted with escapes.
        text = text.replace(token, "***").replace(repr(token)[1:-1], "***")
    return one_line(text, 300).rstrip(".")
