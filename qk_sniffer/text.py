"""Formats numbers, lists and columns for people, and suggests names for mistyped ones.

Texts from files may hold characters that control a terminal, hide or reorder words, or begin a line that looks like one
of ours. `printable` escapes them. Whatever this package prints, logs or raises goes through it: `say`, `aligned`, the
loggers of `logs.py` and the errors of `errors.py` call it. It also leaves out the secrets that `hide` was told.
"""

import difflib
import errno
import json
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TextIO
from urllib.parse import quote, unquote


def printable(text: object) -> str:
    """Returns a text as one line of visible characters. Every other character, a line break included, is escaped.

    Escaped are control characters, marks that reorder or hide text (bidirectional, of zero width), separators of lines,
    spaces other than the usual one, and surrogates, which stand for the bytes of a name that is not UTF-8. Left out are
    the secrets that `hide` was told, and the login and the query of an address of the web.
    """
    shown = str(text)
    for secret, replacement in _hidden:
        shown = shown.replace(secret, replacement)
    if "://" in shown:
        shown = _QUERY.sub(_without_query, _LOGIN.sub(r"\1***@", shown))
    return escaped(shown)


def escaped(text: str) -> str:
    """Returns a text as one line of visible characters, with its secrets: the same in every process."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


_hidden: tuple[tuple[str, str], ...] = ()
"""The secrets of this process, as errors may quote them, and what is shown instead. Threads read it: it is replaced."""


def hide(secret: str, replacement: str = "***") -> None:
    """Has `printable` show `replacement` instead of a secret. Libraries quote one as it is or with escapes."""
    global _hidden
    if (secret, replacement) in _hidden:  # as the jobs of a sweep share their addresses
        return
    quoted = (secret, repr(secret)[1:-1], repr(secret.encode("utf-8", "surrogateescape"))[2:-1])
    known = dict(_hidden) | dict.fromkeys(quoted, replacement)
    _hidden = tuple(sorted(known.items(), key=lambda item: -len(item[0])))  # one may be a part of another


def is_address(name: str) -> bool:
    """Whether a name of a file or repository is an address, such as `https://host/file`."""
    return _PROTOCOL.match(name) is not None


_NAME_AND_PASSWORD = re.compile(r"[^/]*//[^/@]*:[^/@]*@")
"""The start of an address with a name and a password. Of the Hub's own addresses, none has them."""


def hide_in_address(address: str) -> None:
    """Has `printable` hide what may be secret in an address: all but protocol, host, port and the name of a data file.

    Hidden are also the parts of these that are long enough to be a secret, as libraries quote them alone. Of a path,
    these are the parts that look like a token. Others may be the name of a dataset.
    """
    for hop in re.split(rf"::(?={_PROTOCOL.pattern})", address):
        has_login = _NAME_AND_PASSWORD.match(hop) is not None
        if not is_address(hop) or (hop.startswith((*OPEN_PROTOCOLS, "file://")) and not has_login):
            continue
        login, _, place = _PROTOCOL.sub("", hop, count=1).rpartition("@")
        whole, mark, query = re.fullmatch(r"([^?#;]*)([?#;]?)(.*)", place, flags=re.DOTALL).groups()  # type: ignore[union-attr]
        host, _, path = whole.partition("/")
        if DATA_FILE.fullmatch(path.rpartition("/")[2]):
            path = path[: path.rfind("/") + 1]
        if login:
            hide(f"{login}@", "***@")
        if query:
            hide(mark + query, f"{mark}***")
        if path.strip("/"):
            hidden = "/***/" if path.endswith("/") else "/***"
            for name in (host, host.lower()):
                hide(f"{name}/{path}", f"{name}{hidden}")
            if len(path) >= SHORTEST_SECRET and not _PLAIN_WORD.fullmatch(path.strip("/")):
                hide(f"/{path}", hidden)
        tokens = (part for part in path.split("/") if any(map(_TOKEN.fullmatch, re.split("[-_.]", part))))
        for part in (*re.split(r"[:/?#=&;@]", f"{login}@{query}"), *tokens):
            if len(part) >= SHORTEST_SECRET:
                for spelling in (part, quote(part), quote(part, safe=""), unquote(part)):
                    hide(spelling)


def hide_in_addresses(text: str) -> None:
    """Has `printable` hide what may be secret in the addresses in a text, such as an argument of a command line."""
    for form in _ADDRESSES:
        for address in form.findall(text):
            hide_in_address(address.rstrip("]})'"))


_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")

_LOGIN = re.compile(r"(https?://)[^\s/?#<>]+@", re.IGNORECASE)

_QUERY = re.compile(rf"(https?://[^\s?#'\"<>]*)\?((?:(?!,\s*{_PROTOCOL.pattern})[^\s\"<>])+)", flags=re.IGNORECASE)


def _without_query(found: re.Match[str]) -> str:
    # The Hub redirects a download to an address whose query is a signature, with which anybody can fetch the file for
    # a while. Libraries log that address.
    query = found[2]
    end = query[len(query.rstrip("']}),.;:")) :]
    return f"{found[1]}?***{end}"


_ADDRESSES = tuple(
    re.compile(rf"{_PROTOCOL.pattern}(?:(?!,\s*{_PROTOCOL.pattern})[^\s{ends}])*") for ends in ("'\"", "'\"\\]}", '"')
)
"""Find addresses in a text. A bracket may be a part of an address, or end the list that it is in. So may a quote."""

OPEN_PROTOCOLS = ("hf://", "zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://", "lz4://")
"""The protocols of files on the Hub, and of those within an archive."""

DATA_FILE = re.compile(
    r"[^@?=&;:%#]+\.(parquet|jsonl?|ndjson|csv|tsv|txt|arrow|xml|zip|tar|tgz)(\.(gz|bz2|xz|zst|lz4))?", re.IGNORECASE
)
"""The names of files with a suffix of data, and without the characters of logins, queries and parameters."""

_PLAIN_WORD = re.compile("[A-Za-z]?[a-z]*")
"""A folder in an address that is hardly a secret alone. It may be a word of any message."""

_TOKEN = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z]).{12,}")
"""A part of a name, between hyphens, that hardly is a word or a version."""

SHORTEST_SECRET = 8
"""A shorter text is no token, and may be a part of any word."""


def printable_lines(text: object) -> str:
    """Returns a text of several lines, each as `printable` makes it."""
    return "\n".join(map(printable, str(text).split("\n")))


def one_line(text: object, most: int) -> str:
    """Returns a text as one printable line of at most `most` characters. Secrets are hidden before it is cut.

    A part of a secret would not be recognized, and a file that keeps the text is shown by other processes.
    """
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def enumerated(words: Sequence[str]) -> str:
    """Returns words as in a sentence: `queries, keys and values`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def python_literal(text: str) -> str:
    """Returns the literal of a string in Python code, on one line and in double quotes."""
    return printable(json.dumps(text, ensure_ascii=False))


def say(*lines: object, to: TextIO | None = None) -> bool:
    """Prints lines on stdout, or on another stream. A line break in one of them is escaped.

    Characters that the stream's encoding lacks are escaped too.

    Returns:
        False if the reader of the stream has gone, as `head` does, or the stream cannot be written. The lines are lost
        then, and no error is raised: what a program writes to files does not depend on who reads its words.
    """
    stream = to or sys.stdout
    text = "\n".join(map(printable, lines))
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    except OSError as error:
        _give_up(stream, error)
        return False
    return True


def say_text(text: object, to: TextIO | None = None) -> bool:
    """Prints a text of several lines, such as a table, on stdout, or on another stream; returns what `say` does."""
    return say(*str(text).split("\n"), to=to)


RED, YELLOW = 31, 33
"""The colours of errors and of warnings, as the numbers of a terminal."""


def painted(text: str, colour: int, stream: TextIO) -> str:
    """Returns a printable text in a colour; as it is where the stream is no terminal, or the user wants no colours.

    https://no-color.org defines NO_COLOR.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return "\n".join(f"\x1b[{colour}m{line}\x1b[0m" for line in text.split("\n"))


def say_error(error: object) -> None:
    """Prints an error on stderr, red on a terminal."""
    start, end = painted("\0", RED, sys.stderr).split("\0")
    sys.stderr.write(start)
    say_text(error, to=sys.stderr)
    sys.stderr.write(end)


unwritten: list[str] = []
"""Why lines were lost that someone may still want to read: the output is a file on a full disk, for example."""


def flush(stream: TextIO) -> bool:
    """Writes what a stream still holds; returns what `say` does, and raises no error either."""
    try:
        stream.flush()
    except OSError as error:
        _give_up(stream, error)
        return False
    return True


def _give_up(stream: TextIO, error: OSError) -> None:
    """Discards what a stream still holds and gets, which Python would report at its end."""
    if not isinstance(error, BrokenPipeError):
        unwritten.append(error.strerror or str(error))
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def compact_ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as people write them: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def leads_out(name: str) -> bool:
    """Whether the name of a file in a folder is one of a file elsewhere: absolute, or with `..`."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def is_possible(name: str) -> bool:
    """Whether a file can have a name, relative to its folder: no disk has longer ones, or one with a zero byte."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        return False
    return b"\0" not in b"".join(parts) and sum(map(len, parts)) < 2048 and max(map(len, parts)) <= 255


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def numbered(noun: str, numbers: Iterable[int]) -> str:
    """Returns a noun with the numbers of what it names: `layer 5`, `layers 0-3, 7`."""
    named = {*numbers}
    return f"{noun}{'' if len(named) == 1 else 's'} {compact_ranges(named)}"


def as_yaml(value: object) -> str:
    """Returns a value of a setting as a command line or a YAML file gives it: `null`, `true`, `['a', 'b']`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_yaml(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return repr(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as lines, the columns aligned. Line breaks in cells are escaped."""
    shown = [[*map(printable, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in shown)


def folded(rows: Sequence[Sequence[str]], width: int | None, of_words: Collection[str]) -> str:
    """Returns rows as `aligned` does, in `width` characters if the words allow it; None is for any width.

    The longest cells are folded, those of the columns `of_words` before others. The first row names the columns.
    """
    shown = [[*map(printable, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _NARROWEST:
        words = [number for number, name in enumerate(rows[0]) if name in of_words and widths[number] > _NARROWEST]
        widest = max(words or range(len(widths)), key=widths.__getitem__)
        widths[widest] -= 1
    lines: list[Sequence[str]] = []
    for row in shown:
        wrapped = (textwrap.wrap(cell, most, break_on_hyphens=False) for cell, most in zip(row, widths, strict=True))
        cells = [lines_of_cell or [""] for lines_of_cell in wrapped]
        lines += zip_longest(*cells, fillvalue="")
    return aligned(lines)


_NARROWEST = 8
"""The fewest characters that a cell is folded to."""


def shortened(names: Sequence[str], most: int) -> str:
    """Returns the first `most` names and the number of the others: `a, b and 3 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def is_branch_name(name: str) -> bool:
    """Whether git accepts `name` as that of a branch, by the rules of `git check-ref-format`."""
    return not (
        re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{", name)
        or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in name.split("/"))
        or name.startswith("-")
        or name == "@"
    )


def in_mb(size: int) -> str:
    """Returns a number of bytes in megabytes (10^6 bytes)."""
    return f"{size / 1e6:,.1f} MB"


def closest(name: str, valid: Sequence[str], cutoff: float = 0.66) -> list[str]:
    """Returns at most three names in `valid` that `name` may be a misspelling of, the most similar first.

    The default for `cutoff` passes one wrong letter in a name of three.
    """
    return difflib.get_close_matches(name, valid, n=3, cutoff=cutoff)


def did_you_mean(names: Sequence[str]) -> str:
    """Returns `, did you mean a or b?`; an empty string for no names."""
    return f", did you mean {' or '.join(names)}?" if names else ""


def not_one_of(key: str, value: object, valid: Sequence[str], other_names: Mapping[str, str] | None = None) -> str:
    """Words the problem of a value that is none of the valid ones; `other_names` are known elsewhere for valid ones."""
    other = (other_names or {}).get(str(value))
    near = closest(str(value), valid) if other is None else [other]
    return f"{key} is {value!r}{did_you_mean(near)}; valid: {', '.join(valid)}"


def is_utf8_path(path: Path | str) -> bool:
    """Whether the bytes of a path are its UTF-8 text. Libraries that are not written in Python open no other path.

    It is false for a name that is not valid UTF-8, and in a locale of another encoding for most names outside ASCII.
    """
    text = str(path)
    try:
        return os.fsencode(text) == text.encode()
    except UnicodeEncodeError:
        return False


def is_surrogate(character: str) -> bool:
    """Whether a character stands for a byte of a name that is not text in the locale's encoding."""
    return "\ud800" <= character <= "\udfff"


def utf8_way_out(path: Path | str) -> str:
    """Returns the way out for a path that is not `is_utf8_path`."""
    try:
        os.fsencode(str(path)).decode()
    except UnicodeError:
        return "rename it to a name in UTF-8, or give a link to it that has an ASCII name"
    return f"the encoding of this locale is {sys.getfilesystemencoding()}: set PYTHONUTF8=1 and rerun the command"


def path_text(path: Path | str) -> str:
    """Returns a path as text for other machines: its bytes as UTF-8, the other characters escaped.

    It does not depend on the locale, as the path itself does.
    """
    try:
        return escaped(os.fsencode(str(path)).decode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # no path of this machine
        return escaped(str(path))


def path_problem(path: Path | str) -> str | None:
    """Returns why no file and no folder can be at a path, in words after it; None if one can.

    A path without this problem can be asked for by the methods of `Path`, which raise it as an error or hide it.
    """
    try:
        Path(expand_home(str(path))).stat()
    except ValueError:
        return "has a zero byte, or a character that no name can have"
    except OSError as error:
        return {
            errno.ENAMETOOLONG: "has a name that is too long for the file system",
            errno.ELOOP: "has a link that leads to itself",
        }.get(error.errno or 0)
    return None


def not_a_folder(path: Path) -> str:
    """Returns the problem of a path that is to be a folder and is none."""
    return f"{path} is not a folder" if path.exists() else f"the folder {path} does not exist"


def expand_home(path: str) -> str:
    """Replaces a leading `~/` of `path` by the home folder. A shell does so only at the start of a word."""
    return str(Path.home() / path[2:]) if (path + "/").startswith("~/") else path
