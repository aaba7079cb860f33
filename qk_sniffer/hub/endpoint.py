"""Names the Hub that this process talks to, and announces any other than huggingface.co before anything is sent to it.

The login of the user goes to that address. It comes from the environment, as `HF_ENDPOINT`.
"""

import os
import re
from urllib.parse import urlsplit

from qk_sniffer.logs import logger
from qk_sniffer.text import hide

log = logger(__name__)

HUB = "https://huggingface.co"

_LOGIN = re.compile("(?<=//)[^/?#]*@")

_SHORTEST_SECRET = 8
"""A shorter text is no token, and may be a part of any word."""

_announced: set[str] = set()


def announce() -> None:
    """Logs a warning that names the Hub of this process, once, unless it is huggingface.co or offline mode is on.

    From here on, no message of this process shows the login: the token, and a name and password in the address.

    Call this before the first request. `hub.client` calls it for its clients. A caller that lets transformers or
    datasets talk to the Hub calls it too.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    _hide_login(endpoint)
    if constants.HF_HUB_OFFLINE or is_huggingface(endpoint) or endpoint in _announced:
        return
    _announced.add(endpoint)
    log.warning(
        "HF_ENDPOINT is set: what this process asks of the Hub, and the login's token, go to %s instead of %s%s",
        endpoint,
        HUB,
        "" if _scheme(endpoint) == "https" else ". That connection is not encrypted",
    )


def _hide_login(endpoint: str) -> None:
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and len(token) >= _SHORTEST_SECRET:
        hide(token)
    if (login := _LOGIN.search(endpoint)) is not None:
        hide(f"//{login[0]}", "//***@")


def without_login(endpoint: str) -> str:
    """Returns an address without a name and password, for pages, files and people."""
    return _LOGIN.sub("", endpoint, count=1)


def is_huggingface(endpoint: str) -> bool:
    """Whether an address is that of huggingface.co, in any spelling, and encrypted."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        return False
    return (
        (parts.scheme, parts.hostname) == ("https", "huggingface.co")
        and port in (None, 443)
        and "@" not in parts.netloc
        and (parts.path.strip("/"), parts.query, parts.fragment) == ("", "", "")
    )


def is_encrypted() -> bool:
    """Whether the environment names a Hub that is reached by https, as it does without HF_ENDPOINT."""
    return _scheme(os.environ.get("HF_ENDPOINT", HUB)) == "https"


def _scheme(endpoint: str) -> str:
    return endpoint.partition("://")[0].lower()
