"""Makes the page of a report: one HTML file with its style, its script and its facts.

A dataset may be someone else's. Its texts are in the page only as JSON in a block of data, where no `<` begins a tag;
the scripts show them as text. The page's Content-Security-Policy allows the style and the script of this package alone,
by their digests, and no connection.
"""

import base64
import hashlib
import json
from importlib.resources import files

from qk_sniffer.errors import QkSnifferError
from qk_sniffer.report.packed import Json
from qk_sniffer.store.own_files import starts_with
from qk_sniffer.text import in_mb

MARK = '<meta name="generator" content="qk-sniffer report">'

IS_REPORT = starts_with(rb'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n' + MARK.encode())
"""Whether a file is a page of this program."""

MOST_BYTES = 5_000_000
"""The largest size of a page."""

_SHEDDABLE = ("points", "attention", "by_position", "rms", "distance")
"""The parts of the details of heads that a page leaves out if it would be too large, in this order."""


def page(facts: Json) -> bytes:
    """Returns the page of the facts that `report_facts` collects.

    Raises:
        QkSnifferError: the page would be larger than `MOST_BYTES`.
    """
    made = _page(facts)
    for part in _SHEDDABLE:
        if len(made) <= MOST_BYTES:
            break
        details = {
            name: {key: detail[key] for key in detail if key != part} for name, detail in facts["details"].items()
        }
        facts = {**facts, "details": details}
        made = _page(facts)
    if len(made) > MOST_BYTES:
        raise QkSnifferError(
            f"the report would have {in_mb(len(made))}: the dataset has too many heads for one page "
            f"({len(facts['heads']):,}). python -m qk_sniffer.heads ranks them in a table"
        )
    return made


_SCRIPTS = ("charts.js", "heads.js", "report.js")

_FACTS = "const facts = JSON.parse(document.getElementById('facts').textContent);"


def _page(facts: Json) -> bytes:
    style = _asset("report.css")
    # A block of its own: nothing of the script is a global name.
    script = f"'use strict';{{{_FACTS}{''.join(map(_asset, _SCRIPTS))}}}"
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:"
    parts = {
        "mark": MARK,
        "policy": f"{policy}; base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "facts": _in_script(facts),
    }
    # Split at the marks first: a value may hold the text of a mark.
    pieces = _asset("report.html").split("@@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces)).encode()


def _in_script(facts: Json) -> str:
    """Returns JSON in ASCII that ends no block of a page: other characters, and those of tags, are escaped."""
    text = json.dumps(facts, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return files("qk_sniffer.report").joinpath("page", name).read_text(encoding="utf-8")
