"""Fits the text of `--help` into a terminal: refills its paragraphs, folds its tables, and breaks its long commands.

The texts have lines of up to 120 characters in the code. The form of a line tells what it is:

- `name: word, word` is a list of choices.
- `  term  meaning`, with two spaces or more in the middle, is a row of a table.
- Another line that begins with two spaces stands alone. `  python ...` is a command.
- Any other line belongs to a paragraph, which an empty line ends.
"""

import re
import shutil
import textwrap
from collections.abc import Iterator

WIDEST = 120
"""The most characters of a line: longer ones are hard to read on a wide terminal."""

_CHOICES = re.compile(r"[a-z_/]+: ")
_ROW = re.compile(r"(?P<term>  \S+(?: \S+)*)(?P<gap> {2,})(?P<meaning>\S.*)")
_DEEPER = " " * 6
"""What stands before the lines that continue a command, or a meaning that has no room next to its term."""


def fitted(text: str, width: int | None = None) -> str:
    """Returns a text of `--help` in lines of at most `width` characters, if its words are no longer.

    Without `width`, it is that of the terminal, or 80 where there is none.
    """
    most = min(shutil.get_terminal_size().columns, WIDEST) if width is None else width
    return "\n".join(line for part in _parts(text) for line in _lines(part, most))


def _parts(text: str) -> Iterator[str]:
    """Yields the paragraphs, each as one line, and the other lines."""
    paragraph: list[str] = []
    for line in text.split("\n"):
        if line and not line.startswith(" ") and not _CHOICES.match(line):
            paragraph.append(line)
            continue
        if paragraph:
            yield " ".join(paragraph)
            paragraph = []
        yield line
    if paragraph:
        yield " ".join(paragraph)


def _lines(part: str, width: int) -> list[str]:
    row = _ROW.fullmatch(part)
    if len(part) <= width:
        return [part]
    if row is None and part.startswith("  python "):
        return _command(part, width)
    if row is None:
        indent = "  " if part.startswith("  ") or _CHOICES.match(part) else ""
        return _wrapped(part.strip(), "  " if part.startswith("  ") else "", indent, width)
    term, meaning = row["term"], row["meaning"]
    column = " " * row.start("meaning")
    if term.startswith("  python "):
        return [*_command(term, width), *_wrapped(meaning, f"{_DEEPER}# ", f"{_DEEPER}# ", width)]
    if len(column) + max(map(len, meaning.split())) > width:
        return [term, *_wrapped(meaning, _DEEPER, _DEEPER, width)]
    return _wrapped(meaning, term + row["gap"], column, width)


def _command(line: str, width: int) -> list[str]:
    """Returns a command as a shell takes it on several lines."""
    lines = _wrapped(line.strip(), "  ", _DEEPER, width - 2)
    return [f"{each} \\" for each in lines[:-1]] + lines[-1:]


def _wrapped(text: str, first: str, others: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
