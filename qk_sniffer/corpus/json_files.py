"""Reads JSON files: an object a line, or a whole document. Values keep the types that they have in the file.

A document is one list of texts, or objects one after another, in lists or not. It is read piece by piece.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TextIO

from qk_sniffer.corpus.data_files import DataFile, FormatError, open_text
from qk_sniffer.corpus.json_sizes import may_hold_many, refuse_large_value, refuse_many_values

_CHUNK = 1 << 20
_NAMES = {str: "string", bool: "bool", int: "int64", float: "float64", dict: "struct", list: "list"}
_SAMPLE_ROWS = 1_000
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_WORD = len("-Infinity")
"""A word may be cut this far from the end of a piece, or a number at its end."""


class JsonReader:
    """Reads JSON files. A key that an object lacks is null there."""

    typed = True
    options = frozenset({"encoding"})
    has_schema = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._encoding = options.get("encoding")

    def kinds(self, file: DataFile, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the types of the first values in each column; `unknown` for a column that is null there.

        Reads on while a wanted column is missing.
        """
        kinds: dict[str, str] = {}
        for rows, (row, _) in enumerate(self._objects(file), 1):
            for column, value in row.items():
                if kinds.get(column, "unknown") == "unknown":
                    kinds[column] = "unknown" if value is None else _NAMES.get(type(value), "struct")
            if rows >= _SAMPLE_ROWS and set(wanted) <= set(kinds):
                break
        return kinds

    def count(self, file: DataFile) -> int | None:
        """Returns None: only reading tells the number of rows."""
        return None

    def read(self, file: DataFile, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on.

        Raises:
            FormatError: the file is not JSON, holds something else than objects, or has in these columns a text that
                UTF-8 cannot encode, or two values of a row.
        """
        for index, (row, line) in enumerate(self._objects(file)):
            if index >= start:
                if isinstance(row, _Repeating) and not row.repeated.isdisjoint(columns):
                    key = min(row.repeated.intersection(columns))
                    raise FormatError(f"JSON parse error: the object in line {line} has the key {key!r} twice")
                values = {column: row.get(column) for column in columns}
                for value in values.values():
                    if isinstance(value, str) and not value.isascii():
                        _check_text(value, line)
                yield values

    def lines(self, file: DataFile) -> Iterator[int]:
        """Yields the number of the first line of each row, from 1."""
        return (line for _, line in self._objects(file))

    def _objects(self, file: DataFile) -> Iterator[tuple[dict[str, Any], int]]:
        """Yields each object with the number of its first line."""
        with open_text(file, encoding=self._encoding, newline="\n", may_grow=True) as text:
            read, number = "", 0
            for number, line in enumerate(text, 1):  # noqa: B007
                read = line
                if not line.isspace():
                    break
            is_document = read.lstrip().startswith("[") or not _is_whole(read)
            values = _of_document(_Cursor(text, read, number)) if is_document else _of_lines(text, read, number)
            for value, line_number in values:
                yield value if isinstance(value, dict) else _row_of(value, line_number), line_number


def _is_whole(line: str) -> bool:
    """Whether a line is a JSON value, or is wrong. Otherwise its value has more lines, or the line has more values."""
    try:
        refuse_many_values(line)
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos < len(line.rstrip()) and not error.msg.startswith("Extra data")
    except (ValueError, RecursionError):  # too many values or digits, or lists too deep: the reader names the line
        return True
    return True


def _row_of(value: Any, line: int) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    raise FormatError(f"JSON parse error: line {line} holds {type(value).__name__}, not an object with columns")


def _check_text(value: str, line: int) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError(f"JSON parse error in line {line}: it escapes half a surrogate pair, no character") from None


class _Repeating(dict[str, Any]):
    """An object that has keys twice. Each key has its last value."""

    repeated: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = _Repeating(found)
    repeating.repeated = {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}
    return repeating


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Keeps account of the keys that an object has twice."""


def _of_lines(text: TextIO, first: str, number: int) -> Iterator[tuple[Any, int]]:
    for line_number, line in enumerate(chain([first], text), number):
        if not line.isspace():
            try:
                refuse_many_values(line)
                yield _DECODER.decode(line), line_number
            except (ValueError, RecursionError) as error:
                raise _parse_error(error, line_number) from error


def _of_document(cursor: "_Cursor") -> Iterator[tuple[Any, int]]:
    values, holds_text = 0, False
    while sign := cursor.sign():
        values += 1
        if values > 1 and holds_text:  # a list a line, whose texts are the columns of a row
            raise FormatError(
                f"JSON parse error: line {cursor.line} holds a further value after a list of texts. An example of "
                'several columns is an object, such as {"id": ..., "text": ...}'
            )
        if sign != "[":
            yield cursor.value()
            continue
        cursor.skip()
        sign = cursor.sign()
        while sign != "]":
            value, line = cursor.value()
            holds_text = holds_text or isinstance(value, str)
            yield value, line
            sign = cursor.sign()
            if sign == ",":
                cursor.skip()
            elif sign != "]":
                raise FormatError(f"JSON parse error in line {cursor.line}: Expecting ',' delimiter")
        cursor.skip()


class _Cursor:
    """A place in a document that is read piece by piece. `line` is the number of its line."""

    def __init__(self, text: TextIO, read: str, line: int) -> None:
        """`read` is what was read of the document, and comes before the rest of `text`."""
        self._text = text
        self._read = read
        self._num_taken = 0
        self._buffer, self._place = "", 0
        self._may_hold_many = False
        self._decode = _DECODER.raw_decode
        self.line = line

    def sign(self) -> str:
        """Moves to the next character that is not white space, and returns it; empty at the end."""
        while True:
            self._move(_SPACE.match(self._buffer, self._place).end())  # type: ignore[union-attr]
            if self._place < len(self._buffer):
                return self._buffer[self._place]
            if not self._read_more():
                return ""

    def skip(self) -> None:
        """Moves over a character."""
        self._place += 1

    def value(self) -> tuple[Any, int]:
        """Moves over a value; returns it with the number of its first line."""
        self.sign()
        while True:
            try:
                if self._may_hold_many:
                    refuse_large_value(self._buffer, self._place)
                value, end = self._decode(self._buffer, self._place)
            except (ValueError, RecursionError) as error:
                place = error.pos if isinstance(error, json.JSONDecodeError) else 0
                is_cut = place > len(self._buffer) - _LONGEST_WORD or "Unterminated" in str(error)
                if is_cut and self._read_more():
                    continue
                self._move(max(place, self._place))
                raise _parse_error(error, self.line) from error
            line = self.line
            self._move(end)
            return value, line

    def _move(self, place: int) -> None:
        self.line += self._buffer.count("\n", self._place, place)
        self._place = place

    def _read_more(self) -> bool:
        rest = self._buffer[self._place :]
        size = max(_CHUNK, len(rest))  # so that a long value is not parsed too often
        more = self._read[self._num_taken : self._num_taken + size]
        self._num_taken += len(more)
        more = more or self._text.read(size)
        self._fill(rest + more)
        return bool(more)

    def _fill(self, buffer: str) -> None:
        self._buffer, self._place = buffer, 0
        self._may_hold_many = may_hold_many(buffer)


def _parse_error(error: Exception, line: int) -> FormatError:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return FormatError(f"JSON parse error in line {line}: {message}")
