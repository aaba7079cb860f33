"""Puts names and other values into Markdown, so that none can leave its place, whatever characters it holds.

The pages are a dataset's card and the list of branches. Their values come from manifests and branches, which other
people may have written. A value without special characters appears as it is.
"""

import json
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from qk_sniffer.text import printable

_MARKUP = re.compile(
    r"""
    ^\W | ^\d+[.)] | \W$                 # a mark may begin a list, and spaces may begin code or break a line
    | (?<![^\W_])_ | _(?![^\W_])         # an underscore between letters or digits is no markup
    | (?<=www)\.                         # "www." begins a link in GitHub's Markdown
    | [^\w\ .,/;=()'"+?-]
    """,
    flags=re.VERBOSE | re.IGNORECASE,
)
"""Matches ending with a character that must be escaped in text."""


def plain(text: object) -> str:
    """Returns a value as text of a sentence, a heading, a link or a cell, without any markup of its own."""
    return _entities(printable(text))


def code(text: object) -> str:
    """Returns a value as a span of code.

    In a cell, a `|` is escaped by a backslash, even within code, and parsers differ in how they read two backslashes
    before it. So a value with both characters is written as HTML.
    """
    shown = printable(text)
    if not shown.strip() or ("|" in shown and "\\" in shown):
        return f"<code>{_entities(shown)}</code>"
    fence = "`" * (_longest_run(shown) + 1)
    space = " " if shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{space}{shown}{space}{fence}"


def link(text: str, url: str) -> str:
    """Returns a link. `text` is a result of `plain` or `code`; the names in `url` are results of `in_url`."""
    return f"[{text}]({url})"


def in_url(name: str, safe: str = "") -> str:
    """Returns a name as a part of a URL. Slashes are quoted too, unless they are `safe`."""
    return quote(name.encode("utf-8", "surrogatepass"), safe=safe)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table. Its cells are text of this package and results of `plain`, `code` and `link`."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"{table_row(line)}\n" for line in lines)


def table_row(cells: Sequence[str]) -> str:
    """Returns a line of a table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def block(language: str, text: str) -> str:
    """Returns a block of code; its fence is longer than any in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def yaml_string(text: object) -> str:
    """Returns a value as a quoted string in the front matter."""
    return json.dumps(printable(text), ensure_ascii=False)


def tex(text: object) -> str:
    """Returns a value as text of a field in BibTeX, where braces must match even after a backslash."""
    words = {"\\": r"\textbackslash{}", "{": r"\textbraceleft{}", "}": r"\textbraceright{}"}
    words |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    words |= {each: f"\\{each}" for each in "_&%#$"}
    return "".join(words.get(each, each) for each in printable(text))


def _entities(text: str) -> str:
    """Replaces all punctuation that could be markup. Parsers never take a character that is so written for markup."""

    def shown(found: re.Match[str]) -> str:
        return f"{found[0][:-1]}&#{ord(found[0][-1])};"

    return _MARKUP.sub(shown, text)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
