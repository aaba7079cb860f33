"""Reads the headers of a Parquet column's pages, which tell the size of each page before it is decompressed.

The footer of a file claims how many values a column has, and each page's header claims its own values and size. pyarrow
believes both. A few bytes may claim billions of values, so both are added up and compared before pyarrow reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_USUAL_HEADER_BYTES = 1 << 8
"""The bytes that are read for a page's header at first. Ours have 30; statistics of strings make others longer."""


@dataclass(frozen=True)
class Limits:
    """The most pages of a column in a row group, and the most bytes of a page's header."""

    pages: int
    header_bytes: int


_OURS = Limits(pages=10_000, header_bytes=1 << 16)
"""Those of our files, which have a few pages."""

_MOST_DEPTH = 8

_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)
"""Types of a field in Thrift's compact protocol."""

_DICTIONARY_PAGE, _DATA_HEADERS = 2, (5, 8)
"""The type of a dictionary's page, and the fields of the headers of data pages. See parquet.thrift."""


class PageError(Exception):
    """The pages of a column are not as its file claims. The text tells the difference."""


@dataclass(frozen=True)
class Pages:
    """The pages of a column in a row group: their values, and the bytes of all and of the largest, decompressed."""

    values: int
    size: int
    largest: int


def read_pages(file: BinaryIO, start: int, compressed_size: int, limits: Limits = _OURS) -> Pages:
    """Reads the page headers of the column that begins at byte `start` and has `compressed_size` bytes.

    Raises:
        PageError: a header is damaged, the pages do not fill these bytes, or they are too many.
    """
    values = size = largest = number = 0
    at, end = start, start + compressed_size
    while at < end:
        number += 1
        if number > limits.pages:
            raise PageError(f"a column has more than {limits.pages:,} pages in a row group")
        try:
            header, length = _header(file, at, min(end, at + limits.header_bytes))
            kind, unpacked, packed = (header[field] for field in (1, 2, 3))
            if not (isinstance(kind, int) and isinstance(unpacked, int) and isinstance(packed, int)):
                raise PageError("a page has no size")
            if kind != _DICTIONARY_PAGE:
                values += next(_counts(header))
        except (IndexError, KeyError, StopIteration) as error:
            raise PageError("the header of a page is damaged") from error
        if packed < 0 or unpacked < 0 or values < 0:
            raise PageError("a page has a negative size")
        size += unpacked
        largest = max(largest, unpacked)
        at += length + packed
    if at != end:
        raise PageError("the pages do not end where the file claims")
    return Pages(values, size, largest)


def _header(file: BinaryIO, at: int, end: int) -> "tuple[_Struct, int]":
    """Returns the header at byte `at`, which ends before byte `end`, and its length. Few are longer than usual."""
    most = _USUAL_HEADER_BYTES
    while True:
        file.seek(at)
        reader = _Reader(file.read(min(most, end - at)))
        try:
            return reader.struct(0), reader.at
        except (IndexError, PageError):
            if end - at <= most:
                raise
            most <<= 8


_Struct = dict[int, "int | _Struct | None"]


def _counts(header: _Struct) -> Iterator[int]:
    """Yields the number of values in a data page's header."""
    for field in _DATA_HEADERS:
        if isinstance(inner := header.get(field), dict) and isinstance(count := inner.get(1), int):
            yield count


class _Reader:
    """Reads a struct of Thrift's compact protocol: its integers and inner structs by the number of their field."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int) -> _Struct:
        """Returns the struct at `at`, and moves `at` behind it."""
        found: _Struct = {}
        field = 0
        while (byte := self._byte()) != _STOP:
            field = field + (byte >> 4) if byte >> 4 else self._integer()
            found[field] = self._value(byte & 15, depth + 1, in_list=False)
        return found

    def _value(self, kind: int, depth: int, *, in_list: bool) -> int | _Struct | None:
        if depth > _MOST_DEPTH:
            raise PageError("the header of a page is nested too deeply")
        if kind in (_TRUE, _FALSE):
            return self._byte() if in_list else None
        if kind == _BYTE:
            return self._byte()
        if kind in _INTEGERS:
            return self._integer()
        if kind == _STRUCT:
            return self.struct(depth)
        if kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._unsigned())
        elif kind in (_LIST, _SET):
            byte = self._byte()
            for _ in range(self._checked(byte >> 4 if byte >> 4 != 15 else self._unsigned())):
                self._value(byte & 15, depth + 1, in_list=True)
        elif kind == _MAP:
            count = self._checked(self._unsigned())
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._value(kinds >> 4, depth + 1, in_list=True)
                self._value(kinds & 15, depth + 1, in_list=True)
        else:
            raise PageError("the header of a page is damaged")
        return None

    def _byte(self) -> int:
        byte = self._data[self.at]
        self.at += 1
        return byte

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise PageError("the header of a page is damaged")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _checked(self, count: int) -> int:
        if count > len(self._data):  # every entry has at least a byte
            raise PageError("the header of a page is damaged")
        return count

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self.at:
            raise PageError("the header of a page is too long")
        self.at += count
