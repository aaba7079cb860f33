"""Names the Hub that this process talks to, and announces any other than huggingface.co before anything is sent to it.

The login of the user goes to that address. It comes from the environment, as `HF_ENDPOINT`. That address and those of
proxies may hold passwords. No message shows them: libraries quote parts of an address that they cannot read, so it is
refused before they read it.
"""

import os
import re
from urllib.parse import urlsplit

from qk_sniffer.errors import SourceError
from qk_sniffer.logs import logger
from qk_sniffer.text import SHORTEST_SECRET, hide

log = logger(__name__)

HUB = "https://huggingface.co"

_LOGIN = re.compile("(?<=//)[^/?#]*@")

_HOST = r"(\[[0-9a-fA-F:.]+\]|[^]/?#@:[\s\x00-\x1f]+)(:[0-9]{1,5})?"

_ADDRESS = re.compile(rf"https?://([^/?#]*@)?{_HOST}(/[^?#@]*)?", re.IGNORECASE)

_PROXY = re.compile(rf"((https?|socks[45][ah]?)://([^/?#]*@)?)?{_HOST}/?", re.IGNORECASE)

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
"""The variables with addresses of proxies, also in capitals."""

_announced: set[str] = set()


def announce() -> None:
    """Logs a warning that names the Hub of this process, once, unless it is huggingface.co or offline mode is on.

    From here on, no message of this process shows the login: the token, and a name and password in the address.

    Call this before the first request. `hub.client` calls it for its clients. A caller that lets transformers or
    datasets talk to the Hub calls it too.

    Raises:
        SourceError: `HF_ENDPOINT` or a variable of a proxy is no address. The error does not show its value.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    proxies = {name: os.environ[name] for each in _PROXIES for name in (each, each.upper()) if os.environ.get(name)}
    _hide_logins(endpoint, *proxies.values())
    if constants.HF_HUB_OFFLINE:
        return
    for name, value in proxies.items():
        _check(name, value, _PROXY, "http://name:password@host:port")
    _check("HF_ENDPOINT", endpoint, _ADDRESS, "https://name:password@host:port/path")
    if is_huggingface(endpoint) or endpoint in _announced:
        return
    _announced.add(endpoint)
    log.warning(
        "HF_ENDPOINT is set: what this process asks of the Hub, and the login's token, go to %s instead of %s%s",
        endpoint,
        HUB,
        "" if _scheme(endpoint) == "https" else ". That connection is not encrypted",
    )


def _check(name: str, value: str, form: re.Pattern[str], example: str) -> None:
    if not form.fullmatch(value):
        raise SourceError(
            f"the environment variable {name} is not an address such as {example}, where name, password and port may "
            "be missing. Its value is not shown, because it may hold a password. Set it to an address, and write the "
            "characters / ? # of a password as %2F %3F %23; or unset it"
        )


def _hide_logins(*addresses: str) -> None:
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and len(token) >= SHORTEST_SECRET:
        hide(token)
    for address in addresses:
        if (login := _LOGIN.search(address)) is not None:
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
