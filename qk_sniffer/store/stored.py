"""Reads files that a job, a sweep or another person has left, and accepts only data of the declared form.

Such a file may be damaged, come from another version, or be made to do harm. A reader gets data of the declared types
and ranges, or one error that names the file and the way out. The form is a TypedDict or a dataclass whose annotations
msgspec checks. Links are not followed unless the reader says so, and only regular files are opened.
"""

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from qk_sniffer.config import MOST_COUNT
from qk_sniffer.errors import RIGHTS, StoreError
from qk_sniffer.store.disk import open_file, open_regular
from qk_sniffer.store.open_folder import PLAIN, Access, OddFileError

_T = TypeVar("_T")

SMALL, LARGE = 1 << 20, 1 << 26
"""The most bytes of a file: of one with a few facts, and of one that lists heads, files or jobs."""

MOST_DEPTH = 40
"""The deepest nesting of lists and objects. A manifest has 6 levels and those of the model's own config."""

MOST_INTEGER = 2**64
"""The largest absolute value of an integer. Others are not numbers of libraries, and may not even fit a float."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_COUNT)]
"""A number of rows, tokens, bytes or examples."""

Text = Annotated[str, msgspec.Meta(max_length=10_000)]

PathText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern=r"\A[^\0]+\Z")]
"""A path of a file or folder."""

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""A duration, or a time since 1970."""


class UnreadableError(StoreError):
    """A stored file cannot be read, or is not of the expected form. The message names the file and the way out."""

    def __init__(self, path: Path | str, problem: str, way_out: str) -> None:
        super().__init__(f"{path} {problem}; {way_out}")
        self.problem = problem


def read(
    path: Path,
    form: type[_T],
    *,
    way_out: str,
    most_bytes: int = SMALL,
    follow_links: bool = False,
    access: Access = PLAIN,
) -> _T:
    """Returns the content of a JSON file of the given form; keys that the form does not name are kept.

    Args:
        path: the file.
        form: a TypedDict; or a dataclass, for which the result is the plain dict that describes it.
        way_out: the end of the error message: how a person gets past the file.
        most_bytes: the largest size that is read.
        follow_links: whether the file may be a link. False in the work folder.
        access: the way to the file, if it may not be a link.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UnreadableError: the file cannot be read, is too large or too deep, or is not of the form.
    """
    data = read_bytes(path, way_out=way_out, most_bytes=most_bytes, follow_links=follow_links, access=access)
    return decode(data, form, path, way_out)


def read_bytes(
    path: Path, *, way_out: str, most_bytes: int = SMALL, follow_links: bool = False, access: Access = PLAIN
) -> bytes:
    """Returns the bytes of a regular file. `access` is the way to a file that may not be a link.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UnreadableError: it cannot be read, is not a regular file, is a link that is not followed, or is too large.
    """
    try:
        with open_regular(path) if follow_links else open_file(path, access) as file:
            data = file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OddFileError as error:
        raise UnreadableError(error.filename, f"is {error.strerror}", way_out) from error
    except PermissionError as error:
        raise UnreadableError(path, f"cannot be read: {error.strerror}", RIGHTS) from error
    except OSError as error:
        raise UnreadableError(path, f"cannot be read: {error.strerror}", way_out) from error
    if len(data) > most_bytes:
        raise UnreadableError(path, f"is larger than {most_bytes >> 20:,} MB", way_out)
    return data


def decode(data: bytes | str, form: type[_T], name: Path | str, way_out: str) -> _T:
    """Returns JSON `data` of the given form. `name` is its name in errors.

    Raises:
        UnreadableError: the data is not JSON, too deep, or not of the form.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(name, f"is not JSON ({_in_a_line(error)})", way_out) from error
    return check(values, form, name, way_out)


def check(values: Any, form: type[_T], name: Path | str, way_out: str) -> _T:
    """Returns `values`, as JSON gives them, unchanged if they are of the given form.

    Raises:
        UnreadableError: they are not.
    """
    if (problem := _limits_problem(values)) is not None:
        raise UnreadableError(name, f"is not understood ({problem})", way_out)
    try:
        msgspec.convert(values, form)
    except (ValueError, OverflowError) as error:
        raise UnreadableError(name, f"is not understood ({_in_a_line(error)})", way_out) from error
    return values  # type: ignore[no-any-return]


def encode(values: Mapping[str, Any], *, indent: int | None = None, sort_keys: bool = False) -> bytes:
    """Returns the JSON of `values`, from which `json.loads` gives the same values back.

    A path may hold bytes that are not UTF-8. Python reads them as lone surrogates, which UTF-8 cannot encode. They
    become the escapes that JSON has for them.
    """
    text = json.dumps(values, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def is_unicode(values: Any) -> bool:
    """Whether each text in `values`, as JSON gives them, can be encoded in UTF-8."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def digest(values: Mapping[str, Any]) -> str:
    """Returns the sha256 of `values`, in hex. Values that were written and read back have the same digest."""
    plain: Any = json.loads(encode(values))  # all keys are strings
    return hashlib.sha256(encode(plain, sort_keys=True)).hexdigest()


def _limits_problem(values: Any) -> str | None:
    """Returns how `values` exceed the limits of all files, those of keys without a form included."""
    level: list[Any] = [[values]]
    for _ in range(MOST_DEPTH + 2):
        inner = [*chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)]
        kinds = {*map(type, inner)}  # a journal lists a million values, most of them of a few types
        if int in kinds:
            integers = [value for value in inner if type(value) is int]
            if min(integers) < -MOST_INTEGER or max(integers) > MOST_INTEGER:
                return "an integer has more than 64 bits"
        if kinds.isdisjoint({dict, list}):
            return None
        level = [value for value in inner if isinstance(value, dict | list)]
    return f"nested deeper than {MOST_DEPTH} levels"


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
