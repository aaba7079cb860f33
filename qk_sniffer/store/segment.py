"""Reads and writes journal segments: immutable safetensors files with a checksum in their names.

`00000012-9f2b61c4d8e07a35.safetensors` is segment 12, and the rest of the name is the XXH3-64 of the whole file. A
segment is written under a temporary name, made durable and renamed. An existing segment is therefore complete unless
the disk damaged it. The format is that of safetensors: 8 bytes of header length, a JSON header, the tensors. It is
written here because the library's writer takes whole tensors and has neither checksums nor fsync, and because its
numpy reader has no bfloat16.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import Meta

from qk_sniffer.store import stored
from qk_sniffer.store.disk import open_file, sync_file
from qk_sniffer.store.open_folder import PLAIN, Access, OddFileError
from qk_sniffer.store.stored import LARGE, Count, UnreadableError

SUFFIX = ".safetensors"

ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8}
"""The bytes of a number, by the name of its type in safetensors, for the types that segments contain."""

_CHUNK = 1 << 20


class DamageError(Exception):
    """A segment differs from the bytes that were written. The text names the difference."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to write. `chunks` yields its numbers in order, in parts, which together have the size of `shape`."""

    name: str
    dtype: str
    shape: Sequence[int]
    chunks: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Place:
    """The place of a tensor in its segment. `offset` is in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """The header of a segment: its metadata, the places of its tensors by name, and the checksum of its bytes."""

    metadata: dict[str, str]
    tensors: dict[str, Place]
    checksum: str


def segment_number(path: Path) -> int | None:
    """Returns the number in a segment's name, None for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


@contextmanager
def whole_segment(
    folder: Path, number: int, tensors: Sequence[Tensor], metadata: Mapping[str, str], access: Access = PLAIN
) -> Iterator[tuple[Path, int, Callable[[], None]]]:
    """Writes a segment durably under a temporary name, for a block that publishes it.

    Yields its path, its size in bytes and the function that gives it its name, durably. An error in the block removes
    the file if it has no name yet.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    start = len(header).to_bytes(8, "little") + header
    temporary = f"{number:08d}.tmp"
    access.check()
    with access.open(folder) as opened, opened.temporary(temporary) as file:
        file.write(start)
        checksum = xxhash.xxh3_64(start)
        for tensor in tensors:
            for chunk in tensor.chunks():
                data = np.ascontiguousarray(chunk).data.cast("B")
                for at in range(0, len(data), _CHUNK):
                    part = data[at : at + _CHUNK]
                    file.write(part)
                    checksum.update(part)
        assert file.tell() == len(start) + end, "the chunks of a tensor do not make its shape"
        file.flush()
        sync_file(file.fileno())
        name = f"{number:08d}-{checksum.hexdigest()}{SUFFIX}"

        def publish() -> None:
            access.check()
            opened.rename(temporary, opened, name)
            opened.sync()

        yield folder / name, len(start) + end, publish


@contextmanager
def open_segment(path: Path, access: Access = PLAIN) -> Iterator[BufferedReader]:
    """Opens a segment for reading within the block.

    Raises:
        DamageError: it is not a regular file.
    """
    try:
        file = open_file(path, access)
    except OddFileError as error:
        if error.filename != str(path):  # not the segment, but its folder
            raise
        raise DamageError(f"it is {error.strerror}") from error
    with file:
        yield file


def read_array(file: BufferedReader, place: Place, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Returns the numbers at a place of an open segment.

    Raises:
        DamageError: the file is too short.
    """
    values = np.empty(place.shape, dtype)
    file.seek(place.offset)
    if values.size and file.readinto(values.data.cast("B")) != values.nbytes:
        raise DamageError("it is shorter than it was")
    return values


class _Entry(TypedDict):
    dtype: str
    shape: Annotated[list[Count], Meta(max_length=3)]
    data_offsets: tuple[Count, Count]


def read_header(path: Path, access: Access = PLAIN) -> Header:
    """Returns the header of a segment.

    Raises:
        DamageError: the header cannot be read, or the tensors in it do not fill the file one after another.
    """
    with open_segment(path, access) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGE):
            raise DamageError("cut off within the header")
        raw = file.read(length)
    try:
        entries = stored.decode(raw, dict[str, dict[str, Any]], path, "")
        metadata = stored.check(entries.pop("__metadata__", None), dict[str, str], path, "")
        stored.check(entries, dict[str, _Entry], path, "")
    except UnreadableError as error:
        raise DamageError("the header is not readable") from error
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry["data_offsets"]):
        begin, stop = entry["data_offsets"]
        if begin != end or stop - begin != prod(entry["shape"]) * ITEM_SIZES.get(entry["dtype"], 0):
            raise DamageError("the header contradicts itself")
        end = stop
    if size != 8 + length + end:
        raise DamageError(f"it has {size:,} bytes instead of {8 + length + end:,}")
    tensors = {
        name: Place(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    return Header(metadata, tensors, xxhash.xxh3_64_hexdigest(raw))


def verify_segment(path: Path, access: Access = PLAIN) -> None:
    """Reads the whole segment and compares it with the checksum in its name.

    Raises:
        DamageError: the checksums differ.
    """
    match = _NAME.fullmatch(path.name)
    assert match is not None, "not the name of a segment"
    checksum = xxhash.xxh3_64()
    with open_segment(path, access) as file:
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    if checksum.hexdigest() != match[2]:
        raise DamageError("its checksum is wrong")


_NAME = re.compile(r"([0-9]{8,18})-([0-9a-f]{16})" + re.escape(SUFFIX))
