"""Names the Hub that this process talks to, and announces any other than huggingface.co before anything is sent to it.

The login of the user goes to that address. It comes from the environment, as `HF_ENDPOINT`. That address and those of
proxies may hold passwords and tokens. No message shows them: libraries quote parts of an address that they cannot read,
so it is refused before they read it. huggingface_hub reads its address when it is imported.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlsplit

from qk_sniffer.errors import SourceError
from qk_sniffer.hub.answers import check_answers
from qk_sniffer.logs import logger
from qk_sniffer.text import OPEN_PROTOCOLS, SHORTEST_SECRET, hide, hide_in_address, is_address

log = logger(__name__)

HUB = "https://huggingface.co"

_HOST = r"(\[[0-9a-fA-F:.]+\]|[^]/?#@:[\s\x00-\x1f]+)(:[0-9]{1,5})?"

_ADDRESS = re.compile(rf"(?P<scheme>https?://)([^/?#]*@)?(?P<host>{_HOST})(?P<path>/[^?#@]*)?", re.IGNORECASE)

_PROXY = re.compile(rf"((https?|socks[45][ah]?)://([^/?#]*@)?)?{_HOST}/?", re.IGNORECASE)

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
"""The variables with addresses of proxies, also in capitals."""

LOGINS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""The variables that hold the login."""

_NUMBERS: Mapping[str, Callable[[str], float]] = {
    "HF_HUB_DOWNLOAD_TIMEOUT": int,
    "HF_HUB_ETAG_TIMEOUT": int,
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": float,
}
"""The variables that huggingface_hub and datasets read as numbers when they are imported."""

_announced: set[str] = set()


def check_address() -> None:
    """Checks the variables of the environment that libraries fail at when they are imported: an address and numbers.

    From here on, no message shows a login in the environment, or secrets in the address of the Hub or of a proxy.

    Call this before the first import of huggingface_hub, transformers, datasets or peft.

    Raises:
        SourceError: `HF_ENDPOINT` is no address, or another variable is no number. The error does not show its value.
    """
    for name, kind in _NUMBERS.items():
        try:
            kind(os.environ.get(name, "0"))
        except ValueError:
            what = "a whole number of seconds" if kind is int else "a number of bytes"
            raise SourceError(
                f"the value of {name} in the environment is not {what}: correct it, or unset it"
            ) from None
    for login in (os.environ.get(name, "") for name in LOGINS):
        if len(login) >= SHORTEST_SECRET:
            hide(login)
    for address in _proxies().values():
        hide_in_address(_whole(address))
    if endpoint := os.environ.get("HF_ENDPOINT"):
        hide_in_address(_whole(endpoint))
        _check("HF_ENDPOINT", endpoint)


def announce() -> None:
    """Logs a warning that names the Hub of this process, once, unless it is huggingface.co or offline mode is on.

    From here on, no message of this process shows the token either, and files are stored by names that are checked
    (`hub/answers.py`).

    Call this before the first request. `hub.client` calls it for its clients. A caller that lets transformers or
    datasets talk to the Hub calls it too.

    Raises:
        SourceError: `HF_ENDPOINT` or a variable of a proxy is no address. The error does not show its value.
    """
    check_address()
    check_answers()
    from huggingface_hub import constants, get_token

    token = get_token()
    if token is not None and len(token) >= SHORTEST_SECRET:
        hide(token)
    endpoint = constants.ENDPOINT
    hide_in_address(endpoint)
    if constants.HF_HUB_OFFLINE:
        return
    for name, address in {**_proxies(), "HF_ENDPOINT": endpoint}.items():
        _check(name, address)
    if is_huggingface(endpoint) or endpoint in _announced:
        return
    _announced.add(endpoint)
    log.warning(
        "HF_ENDPOINT is set: what this process asks of the Hub, and the login's token, go to %s instead of %s%s",
        endpoint,
        HUB,
        "" if _scheme(endpoint) == "https" else ". That connection is not encrypted",
    )


def note_proxies(names: Iterable[str]) -> None:
    """Notes variables of proxies that a file `.env` has set, which may be someone else's."""
    _of_env.update(names)


def refuse_open_address(address: str) -> None:
    """Checks that no proxy of a file `.env` would read what is asked of an address of the web, its login included.

    Args:
        address: the name of a file, which may be an address, or a chain of them as in `zip://a.csv::http://host/a.zip`.

    Raises:
        SourceError: such a proxy is set, and the connection is not encrypted.
    """
    hops = [hop for hop in address.split("::") if is_address(hop)]
    if _of_env and not all(hop.lower().startswith((*OPEN_PROTOCOLS, *_NOT_READ)) for hop in hops):
        raise SourceError(
            f"{address} is not read: its connection may not be encrypted, and .env sets {', '.join(sorted(_of_env))}, "
            "so that a proxy would see its login and its query. Give an address of https://, or set the proxy in the "
            "environment"
        )


_NOT_READ = ("https://", "file://")
"""The protocols, next to those of the Hub and of archives, of which a proxy reads nothing."""

_of_env: set[str] = set()


def _proxies() -> dict[str, str]:
    """Returns the addresses of proxies in the environment, by the names of their variables."""
    names = (spelling for name in _PROXIES for spelling in (name, name.upper()))
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _check(name: str, value: str) -> None:
    is_hub = name == "HF_ENDPOINT"
    if not ((_ADDRESS if is_hub else _PROXY).fullmatch(value) and _is_readable(_whole(value))):
        example = "https://name:password@host:port/path" if is_hub else "http://name:password@host:port"
        raise SourceError(
            f"the environment variable {name} is not an address such as {example}, where name, password and port may "
            "be missing. Its value is not shown, because it may hold a password. Set it to an address, and write the "
            "characters / ? # [ ] of a password as %2F %3F %23 %5B %5D; or unset it"
        )


def _whole(address: str) -> str:
    """Returns an address with a protocol, which that of a proxy may lack."""
    return address if "://" in address else f"http://{address}"


def _is_readable(address: str) -> bool:
    """Whether Python takes an address apart, as huggingface_hub has it do. Its errors quote names and passwords."""
    try:
        return urlsplit(address).hostname is not None
    except ValueError:
        return False


def public(endpoint: str) -> str:
    """Returns an address for pages, files and people: its scheme, host and port. `***` stands for a path.

    A name and password are left out. The path of a mirror may be a token.
    """
    found = _ADDRESS.fullmatch(endpoint)
    if found is None:
        return "***"
    return f"{found['scheme']}{found['host']}{'/***' if (found['path'] or '').strip('/') else ''}"


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
