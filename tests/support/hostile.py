"""Names and links that a dataset of someone else may hold, and what a parser of Markdown makes of a page with them."""

import os
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

SECRET = "${oc.env:HF_TOKEN}"

TERMINAL = "\x1b]0;owned\x07\x1b[2J\r\nwhole: 2 heads\x7f\x9b31m\u202e\u2066\u200b\u2028\x85"
"""A name with characters that control a terminal, and a line that imitates one of ours."""

_PIECES = [
    *("`", "``", "```", "~~~", "|", "\\", "\\|", "](", "[", "![", ")", "<", ">", "<b>", "<!--", "-->", "<script>"),
    *("\n", "\n\n", "\r", "\t", "# ", "\n# ", "---", "\n---\n", "***", "_", "__", "~~", "&", "&amp;", "&#124;"),
    *("$", "{", "}", "@", "%", '"', "'", "=", "+", "- ", "1. ", ":", "http://evil.com", "www.evil.com", "a@b.com"),
    *("^", ";", TERMINAL, SECRET, "\u2029", "\ud800", "\ufeff", "a", "org/model", " ", "  ", "é", "\U0001f642", "/"),
]

names = st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), min_size=1, max_size=6).map("".join).filter(bool)
"""Names with pieces of Markdown, HTML, YAML, TeX and control sequences."""


def tokens(page: str) -> Iterator[Token]:
    """Yields the tokens of a page as GitHub's Markdown has it, those within a line after their line."""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page):
        yield token
        yield from token.children or ()


def skeleton(page: str) -> list[tuple[str, str, int]]:
    """Returns the elements of a page without their texts. Code that is written as HTML counts as code."""
    found: list[tuple[str, str, int]] = []
    in_code = False
    for token in tokens(page):
        if token.type == "html_inline" and token.content in ("<code>", "</code>"):
            in_code = token.content == "<code>"
            if not in_code:
                found.append(("code_inline", "code", 0))
        elif not in_code and not (token.type == "text" and found[-1:] == [("text", "", 0)]):
            found.append((token.type, token.tag, token.nesting))
    return found


def far_link(folder: Path, target: Path) -> str:
    """Plants a link to `target` whose path is longer than the system allows.

    Returns a name in `folder` that leads to it all the same, over another link.
    """
    part, parent = "d" * 250, os.open(folder, os.O_RDONLY)
    for _ in range(17):
        os.mkdir(part, dir_fd=parent)
        below = os.open(part, os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = below
    os.symlink(target, "far", dir_fd=parent)
    os.close(parent)
    (folder / "near").symlink_to("/".join([part] * 15))
    return f"near/{part}/{part}/far"
