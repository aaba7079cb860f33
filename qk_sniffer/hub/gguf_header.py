"""Refuses GGUF files whose header is larger than any model's.

transformers reads the header several times, into lists of Python objects, and splits long tokens in all ways. A header
of zeros, which takes no place on the disk, would fill the memory.
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qk_sniffer.errors import SourceError

_MOST_ENTRIES = 100_000
"""The most keys, and the most tensors. Published files have some hundreds of keys and some thousands of tensors."""

_MOST_ELEMENTS = 4_000_000
"""The most elements of all arrays: a vocabulary of 262,144 tokens with scores, types and merges has 1.3 million."""

_MOST_BYTES = 1 << 24
"""The longest text, such as a chat template."""

LONGEST_TOKEN = 10_000
"""The most bytes of a token or a merge. Libraries take time that grows with the square of it."""

_MOST_DIMENSIONS = 8

_STRING, _ARRAY = 8, 9

_WIDTHS = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
"""The bytes of a number, by its type."""


def refuse_large_header(path: Path) -> None:
    """Checks the sizes that the header of a GGUF file claims. One that is damaged or of no known form is left to its
    reader.

    Raises:
        SourceError: a size is too large, or two keys or tensors have one name, of which readers choose different ones.
        OSError: the file cannot be read.
    """
    if path.stat().st_size == 0:  # which cannot be mapped
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        problem = next(_Header(content).problems(), None)
    if problem is not None:
        raise SourceError(
            f"{path} is refused: its header has {problem}. Restore the file, or download the model again (hf download)"
        )


class _Header:
    """Walks over the header in `content`, and keeps only the names in it."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0
        self._elements = 0

    def problems(self) -> Iterator[str]:
        """Yields what is too large. Ends at the end of the file."""
        with suppress(struct.error, _UnknownTypeError):
            yield from self._problems()

    def _problems(self) -> Iterator[str]:
        if self._content[:4] != b"GGUF":
            return
        self._at = 8
        tensors, keys = self._read("<QQ")
        for number, what in ((keys, "keys"), (tensors, "tensors")):
            if number > _MOST_ENTRIES:
                yield f"{number:,} {what}, and none has more than {_MOST_ENTRIES:,}"
        for what, number, rest in (("keys", keys, self._value), ("tensors", tensors, self._tensor)):
            found: set[bytes] = set()
            for _ in range(number):
                start, length = self._text()
                if length > LONGEST_TOKEN:
                    yield f"a name of {length:,} bytes"
                name = self._content[start : start + length]
                if name in found:
                    yield f"two {what} of the name {name.decode(errors='replace')[:100]!r}"
                found.add(name)
                yield from rest()

    def _value(self) -> Iterator[str]:
        (kind,) = self._read("<I")
        if kind == _STRING:
            if (length := self._text()[1]) > _MOST_BYTES:
                yield f"a text of {length:,} bytes"
        elif kind == _ARRAY:
            element, number = self._read("<IQ")
            self._elements += number
            if self._elements > _MOST_ELEMENTS:
                yield f"arrays of {self._elements:,} elements, and no model has more than {_MOST_ELEMENTS:,}"
            if element == _STRING:
                for _ in range(number):
                    if (length := self._text()[1]) > LONGEST_TOKEN:
                        yield f"a token of {length:,} bytes, and no tokenizer has one longer than {LONGEST_TOKEN:,}"
            else:
                self._at += number * _width(element)
        else:
            self._at += _width(kind)

    def _tensor(self) -> Iterator[str]:
        (dimensions,) = self._read("<I")
        if dimensions > _MOST_DIMENSIONS:
            yield f"a tensor of {dimensions:,} dimensions"
        self._at += 8 * dimensions + 12

    def _text(self) -> tuple[int, int]:
        """Passes over a text; returns where it starts, and its length."""
        (length,) = self._read("<Q")
        start = self._at
        self._at += length
        return start, length

    def _read(self, form: str) -> tuple[int, ...]:
        if self._at > len(self._content):
            raise struct.error("the file has ended")
        values = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return values


class _UnknownTypeError(Exception):
    """Readers do not know the type of a value."""


def _width(kind: int) -> int:
    if kind not in _WIDTHS:
        raise _UnknownTypeError
    return _WIDTHS[kind]
