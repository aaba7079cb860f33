"""Names the Hub that this process talks to, and announces any other than huggingface.co before anything is sent to it.

The login of the user goes to that address. It comes from the environment, as `HF_ENDPOINT`.
"""

import os
import re
from urllib.parse import urlsplit

from qk_sniffer.logs import logger

log = logger(__name__)

HUB = "https://huggingface.co"

_announced: set[str] = set()


def announce() -> None:
    """Logs a warning that names the Hub of this process, once, unless it is huggingface.co or offline mode is on.

    Call this before the first request. `hub.client` calls it for its clients. A caller that lets transformers or
    datasets talk to the Hub calls it too.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE or is_huggingface(endpoint) or endpoint in _announced:
        return
    _announced.add(endpoint)
    shown = re.sub(r"(?<=//)[^/?#]*@", "***@", endpoint)  # without a password
    log.warning(
        "HF_ENDPOINT is set: what this process asks of the Hub, and the login's token, go to %s instead of %s%s",
        shown,
        HUB,
        "" if _scheme(endpoint) == "https" else ". That connection is not encrypted",
    )


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
