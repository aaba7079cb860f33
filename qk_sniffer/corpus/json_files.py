"""Reads JSON files: an object a line, or a whole document. Values keep the types that they have in the file.

A document is a list of objects or of texts, or one object after another. It is read piece by piece.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TextIO

from qk_sniffer.corpus.data_files import FormatError, open_text

OPTIONS = {"encoding"}
"""The options of `datasets` for JSON files that this reader knows. A dataset card may set them."""

_CHUNK = 1 << 20
_NAMES = {str: "string", bool: "bool", int: "int64", float: "float64", dict: "struct", list: "list"}
_SAMPLE_ROWS = 1_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonReader:
    """Reads JSON files. A key that an object lacks is null there."""

    typed = True
    has_schema = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._encoding = options.get("encoding")

    def kinds(self, file: str, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the types of the first values in each column; `unknown` for a column that is null there.

        Reads on while a wanted column is missing.
        """
        kinds: dict[str, str] = {}
        for rows, row in enumerate(self._objects(file), 1):
            for column, value in row.items():
                if kinds.get(column, "unknown") == "unknown":
                    kinds[column] = "unknown" if value is None else _NAMES[type(value)]
            if rows >= _SAMPLE_ROWS and set(wanted) <= set(kinds):
                break
        return kinds

    def count(self, file: str) -> int | None:
        """Returns None: only reading tells the number of rows."""
        return None

    def read(self, file: str, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on.

        Raises:
            FormatError: the file is not JSON, or holds something else than objects.
        """
        for index, row in enumerate(self._objects(file)):
            if index >= start:
                yield {column: row.get(column) for column in columns}

    def _objects(self, file: str) -> Iterator[dict[str, Any]]:
        with open_text(file, encoding=self._encoding, newline="\n") as text:
            read, before = "", -1  # a line, and the number of lines before it
            for line in text:
                read, before = line, before + 1
                if not line.isspace():
                    break
            if not read.strip():
                return
            is_document = read.lstrip().startswith("[") or not _is_whole(read)
            values = _of_document(text, read, before) if is_document else _of_lines(text, read, before)
            for value, number in values:
                yield value if isinstance(value, dict) else _row_of(value, number)


def _is_whole(line: str) -> bool:
    """Whether a line is a JSON value, or is wrong. Otherwise its value has more lines, or the line has more values."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos < len(line.rstrip()) and not error.msg.startswith("Extra data")
    return True


def _row_of(value: Any, line: int) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    raise FormatError(f"JSON parse error: line {line} holds {type(value).__name__}, not an object with columns")


def _of_lines(text: TextIO, first: str, before: int) -> Iterator[tuple[Any, int]]:
    for number, line in enumerate(chain([first], text), before + 1):
        if not line.isspace():
            yield _value(line, number), number


def _value(line: str, number: int) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise FormatError(f"JSON parse error in line {number}: {message}") from error
    _check_escapes(line, value, number)
    return value


def _check_escapes(source: str, value: Any, number: int) -> None:
    """Refuses half a surrogate pair, which is no character: no text in UTF-8 can hold it."""
    if _SURROGATE.search(source):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FormatError(f"JSON parse error in line {number}: it escapes half a surrogate pair") from None


def _of_document(text: TextIO, buffer: str, before: int) -> Iterator[tuple[Any, int]]:
    """Yields the values of a document that begins with `buffer`, each with the number of its first line."""
    decode = json.JSONDecoder().raw_decode
    place, lines, in_list, ended = 0, before + 1, False, False
    needs_value = True
    while True:
        place = _next(buffer, place)
        if place == len(buffer) and not ended:
            lines += buffer.count("\n")
            buffer, place = text.read(_CHUNK), 0
            ended = not buffer
            continue
        line = lines + buffer.count("\n", 0, place)
        if place == len(buffer):
            if in_list:
                raise FormatError(f"JSON parse error in line {line}: the list has no end")
            return
        sign = buffer[place]
        if not in_list and sign == "[":
            in_list, needs_value, first = True, True, place
        elif in_list and sign == "]" and (not needs_value or first is not None):
            in_list, needs_value = False, True
        elif in_list and not needs_value:
            if sign != ",":
                raise FormatError(f"JSON parse error in line {line}: Expecting ',' delimiter")
            needs_value, first = True, None
        else:
            try:
                value, end = decode(buffer, place)
            except (json.JSONDecodeError, RecursionError) as error:
                pos, message = getattr(error, "pos", 0), getattr(error, "msg", str(error))
                # The value may continue beyond the buffer.
                if not ended and (message.startswith("Unterminated") or pos > len(buffer) - 16):
                    lines += buffer.count("\n", 0, place)
                    more = text.read(max(_CHUNK, len(buffer)))
                    buffer, place, ended = buffer[place:] + more, 0, not more
                    continue
                line = lines + buffer.count("\n", 0, pos)
                raise FormatError(f"JSON parse error in line {line}: {message}") from error
            _check_escapes(buffer[place:end], value, line)
            yield value, line
            place, needs_value, first = end, not in_list, None
            continue
        place += 1


def _next(buffer: str, place: int) -> int:
    """Returns the place of the next character that is not white space."""
    while place < len(buffer) and buffer[place] in " \t\r\n":
        place += 1
    return place
