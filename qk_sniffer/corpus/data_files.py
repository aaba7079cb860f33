"""Opens data files: on this machine or on the Hub, compressed or not.

A file is checked where it is opened: that no link leads out of its folder, and that it is the one of the last reading.
A pointer of Git LFS, an archive and a text in UTF-16 are refused as what they are. Read as data, they would be text.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import yaml

from qk_sniffer.corpus.archives import archive_problem
from qk_sniffer.hub.lfs import HEAD_BYTES, pointer_problem
from qk_sniffer.store.files import open_inside
from qk_sniffer.store.open_folder import OddFileError
from qk_sniffer.text import in_mb

HUB = "hf://"
"""The start of the address of a file on the Hub."""

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""The suffixes of compressed files. They may follow any suffix except `.parquet`, which is compressed inside."""

_MAGIC = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bz2",  # a text may begin with its first four bytes
    rb"\xfd7zXZ\0": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
}
"""The patterns of the first bytes of compressed files."""

MOST_EXPANSION, MOST_UNCHECKED_BYTES = 200, 1 << 29
"""The largest ratio of the content of a compressed file to the file, and the content that may have any ratio.

Measured with gzip, bzip2, xz and zstd: 3 to 5 for English, 5 to 7 for logs of requests, 20 to 40 for JSON lines of the
same keys, 14 (gzip) to 250 (zstd -19) for log lines that differ in their times alone, and 300 (gzip) to 12,000 for
equal lines."""

_ZSTD_CHUNK = 1 << 14
"""The compressed bytes that are decompressed at a time: few, as long repetitions have a thousandfold content."""


_END_BYTES = 1 << 16
"""The bytes at the start and at the end of a file that are compared after lines were appended to it."""


class FormatError(Exception):
    """A file is not of its format. The message names the place in the file."""


class ChangedError(Exception):
    """A file is not the one of an earlier reading."""


@dataclass(frozen=True)
class _State:
    """A file when it was first opened."""

    facts: tuple[int, int, int]
    """Size, and times of the last changes of content and of attributes. Some file systems change the inode's number."""
    ends: tuple[bytes, bytes]

    @classmethod
    def of(cls, raw: BinaryIO) -> "_State":
        found = os.fstat(raw.fileno())
        facts = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        return cls(facts, _ends(raw, found.st_size))

    def has_grown_to(self, now: "_State", raw: BinaryIO) -> bool:
        """Whether whole lines were appended. Between the ends, the content is not compared."""
        size = self.facts[0]
        return now.facts[0] > size and self.ends[1].endswith(b"\n") and _ends(raw, size) == self.ends


@dataclass
class DataFile:
    """A file of a source of texts, on this machine or on the Hub. Remembers its state from one reading to the next."""

    path: str
    """Its path, or its address on the Hub."""
    home: Path | None = None
    """The folder that no link may lead out of; None for a file that the user names, and on the Hub."""
    _first: _State | None = field(default=None, compare=False)

    @property
    def is_remote(self) -> bool:
        """Whether it is on the Hub."""
        return self.path.startswith(HUB)

    def open(self) -> BinaryIO:
        """Opens it. What is checked to be in its folder is what is opened.

        Raises:
            StoreError: a link leads out of its folder.
            FormatError: it is not a regular file, or has become a link.
            OSError: it cannot be opened.
        """
        if self.is_remote:
            from huggingface_hub import HfFileSystem

            return cast(BinaryIO, HfFileSystem().open(self.path.removeprefix(HUB), "rb"))
        if self.home is None:
            return Path(self.path).open("rb")
        try:
            return open_inside(self.home, self.path)
        except OddFileError as error:
            raise FormatError(f"it is {error.strerror}") from error

    def check_unchanged(self, raw: BinaryIO, *, may_grow: bool) -> None:
        """Checks that the open file is the one that was opened first.

        Raises:
            ChangedError: it is not; `may_grow` allows lines that were appended.
        """
        if self.is_remote:
            return
        now = _State.of(raw)
        first = self._first = self._first or now
        if now.facts != first.facts and not (may_grow and first.has_grown_to(now, raw)):
            raise ChangedError


@contextmanager
def open_bytes(file: DataFile, *, compressed: bool = True, may_grow: bool = False) -> Iterator[BinaryIO]:
    """Opens a file for reading; with `compressed`, its content if it is compressed.

    Args:
        file: the file.
        compressed: whether it may be compressed.
        may_grow: whether lines may be appended to it between two readings, if it is not compressed.

    Raises:
        FormatError: it is a pointer of Git LFS or an archive, or the package that decompresses it is missing.
        ChangedError: it changes during the reading, or has changed since an earlier one.
        StoreError: a link leads out of its folder.
        OSError: it cannot be read.
    """
    with file.open() as raw:
        head = raw.read(HEAD_BYTES)
        raw.seek(0)
        if problem := pointer_problem(head) or archive_problem(head):
            raise FormatError(problem)
        method = compression(file.path, head) if compressed else None
        may_grow = may_grow and method is None
        file.check_unchanged(raw, may_grow=may_grow)
        if method is None:
            yield raw
        else:
            with _decompressor(method)(raw, mode="rb") as content:
                buffered = io.BufferedReader(_Bounded(content, raw))
                if problem := archive_problem(buffered.peek(HEAD_BYTES)):
                    raise FormatError(problem)
                yield cast(BinaryIO, buffered)
        file.check_unchanged(raw, may_grow=may_grow)


@contextmanager
def open_text(
    file: DataFile, *, encoding: str | None = None, newline: str = "", may_grow: bool = False
) -> Iterator[TextIO]:
    """Opens a text file without its byte order mark. `encoding` is UTF-8 for None.

    Raises:
        FormatError: as for `open_bytes`; or it is in UTF-16 or UTF-32.
        ChangedError, StoreError, OSError: as for `open_bytes`.
    """
    with open_bytes(file, may_grow=may_grow) as content:
        buffered = io.BufferedReader(cast(Any, content), 1 << 20)
        if encoding is None and (found := _wide_encoding(buffered.peek(HEAD_BYTES)[:HEAD_BYTES])):
            raise FormatError(
                f"it is {found} text, not UTF-8. Convert it, for example with `iconv -f {found.lower()} -t utf-8`"
            )
        if encoding is None or encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
            encoding = "utf-8-sig"
        text = io.TextIOWrapper(buffered, encoding=encoding, newline=newline)
        yield text


def refuse_expansion(packed: int, unpacked: int, way_out: str) -> None:
    """Checks that compressed content is not out of all proportion to its `packed` bytes.

    A few megabytes of someone else may expand to one text that fills the memory.

    Raises:
        FormatError: it is. The message ends with `way_out`.
    """
    if unpacked > max(MOST_UNCHECKED_BYTES, MOST_EXPANSION * packed):
        raise FormatError(
            f"{packed:,} bytes of it expand to more than {in_mb(unpacked)}, which no texts do. If it is right, "
            f"{way_out}"
        )


def reason(error: BaseException) -> str:
    """Returns why a file cannot be read, in a line."""
    while error.__cause__ is not None and not isinstance(
        error, FormatError
    ):  # the parser's message instead of "an error occurred"
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error}). Convert it, for example with `iconv -f latin1 -t utf-8`"
    if isinstance(error, yaml.YAMLError):
        return f"its YAML is wrong: {_yaml_problem(error)}"
    if "BatchSize must be greater than 0" in str(error):
        return "it has no examples. Leave it out"
    if "zstd not supported" in str(error):
        return _NO_ZSTD
    return first_lines(str(error)) or type(error).__name__


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Returns what is wrong, and the place. The library's own message quotes lines, which may hold secrets."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    what = re.sub(r"""\s*['"].*['"]""", "", str(problem or "a character is not allowed"), flags=re.DOTALL)
    return what + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")


def first_lines(message: str, most: int = 4) -> str:
    """Returns the first lines of a message that are not empty, as one line."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return " ".join(lines[:most])


_NO_ZSTD = "a .zst file needs the package zstandard (`pip install zstandard`)"


def _ends(raw: BinaryIO, size: int) -> tuple[bytes, bytes]:
    """Returns the start and the end of the first `size` bytes of an open file, whose place stays."""
    last = min(size, _END_BYTES)
    return os.pread(raw.fileno(), last, 0), os.pread(raw.fileno(), last, size - last)


def compression(file: str, head: bytes) -> str | None:
    """Returns the compression of the file of a name and with the first bytes `head`; None if there is none."""
    for suffix, method in COMPRESSED.items():
        if file.lower().endswith(suffix):
            return method
    return next((method for magic, method in _MAGIC.items() if re.match(magic, head)), None)


class _Bounded(io.RawIOBase):
    """The content of a compressed file, as long as it is not out of all proportion to the file.

    Raises:
        FormatError: it is.
    """

    def __init__(self, content: Any, raw: BinaryIO) -> None:
        self._content = content
        self._raw = raw
        self._size = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the start of a buffer, and returns the number of bytes; 0 at the end."""
        found: bytes = self._content.read(len(buffer))
        buffer[: len(found)] = found
        self._size += len(found)
        refuse_expansion(self._raw.tell(), self._size, "decompress it first")
        return len(found)


class _Frames(io.RawIOBase):
    """The content of a file of compressed frames, one after another.

    Raises:
        FormatError: the file ends within a frame. Readers of the package zstandard take this for the end.
    """

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]) -> None:
        """`new_frame` makes the decompressor of one frame."""
        self._raw = raw
        self._new_frame = new_frame
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the start of a buffer, and returns the number of bytes; 0 at the end."""
        while not self._content:
            self._compressed = self._compressed or self._raw.read(_ZSTD_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise FormatError("it ends in the middle of its compressed data. Copy or download it again")
                return 0
            if self._frame is None:
                self._frame = self._new_frame()
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def _decompressor(method: str) -> Any:
    if method == "zstd":
        try:
            from zstandard import ZstdDecompressor
        except ImportError:
            pass  # newer versions of Python have a decompressor of their own
        else:
            return lambda raw, mode: _Frames(raw, lambda: ZstdDecompressor().decompressobj())
    from fsspec.compression import compr

    if method not in compr:
        raise FormatError(_NO_ZSTD)
    return compr[method]


def _wide_encoding(head: bytes) -> str | None:
    """Returns the name of the encoding of a text that begins with `head` and has 2 or 4 bytes for each character."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):  # without a mark: every other byte of ASCII text is zero
        every_other = head[first::2]
        if len(head) >= 4 and every_other.count(0) > 0.8 * len(every_other):
            return name
    return None
