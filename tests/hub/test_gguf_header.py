"""Tests that the header of a GGUF file is bounded before transformers reads it."""

import re
import struct
from pathlib import Path
from typing import Any

import pytest

from qk_sniffer.backbone.loading import check_model
from qk_sniffer.config import ModelConfig
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.gguf_header import LONGEST_TOKEN, refuse_large_header

pytestmark = pytest.mark.floor

ARCHITECTURE = b"general.architecture"


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def array(kind: int, number: int, content: bytes = b"", name: bytes = b"x.y") -> bytes:
    return text(name) + struct.pack("<IIQ", 9, kind, number) + content


def key(name: bytes, value: bytes = b"llama") -> bytes:
    return text(name) + struct.pack("<I", 8) + text(value)


def write(folder: Path, *keys: bytes, tensors: bytes = b"", zeros: int = 0, counts: Any = None) -> Path:
    path = folder / "x.gguf"
    number, further = counts or (0, len(keys))
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, number, further) + b"".join(keys) + tensors)
        file.truncate(file.tell() + zeros)  # which take no place on the disk
    return path


@pytest.mark.parametrize(
    ("keys", "counts", "message"),
    [
        pytest.param([array(0, 1 << 36)], None, r"arrays of 68,719,476,736 elements", id="numbers"),
        pytest.param([array(8, 1 << 36)], None, r"arrays of 68,719,476,736 elements", id="texts"),
        pytest.param([], (1 << 36, 0), r"68,719,476,736 tensors", id="tensors"),
        pytest.param([], (0, 1 << 36), r"68,719,476,736 keys", id="keys"),
        pytest.param([key(b"a"), key(b"a")], None, r"two keys of the name 'a'", id="two keys"),
        pytest.param([array(8, 1, text(b"a" * (LONGEST_TOKEN + 1)))], None, r"a token of 10,001 bytes", id="a token"),
        pytest.param([key(b"a", b" " * (1 << 24) + b" ")], None, r"a text of 16,777,217 bytes", id="a text"),
        pytest.param([text(b"a" * 20_000)], (0, 1), r"a name of 20,000 bytes", id="a name"),
    ],
)
def test_a_header_that_would_fill_the_memory_is_refused(
    keys: list[bytes], counts: tuple[int, int] | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path, *keys, zeros=1 << 40, counts=counts)
    model = ModelConfig(name=str(tmp_path), gguf_file="x.gguf")
    with pytest.raises(SourceError, match=message):
        check_model(model)
    with pytest.raises(SourceError, match=message):
        load_tokenizer(model)


def test_the_elements_of_all_arrays_count(tmp_path: Path) -> None:
    half = 2_100_000
    keys = [array(0, half, bytes(half), name) for name in (b"a", b"b")]
    refuse_large_header(write(tmp_path, keys[0]))
    with pytest.raises(SourceError, match=r"arrays of 4,200,000 elements"):
        refuse_large_header(write(tmp_path, *keys))


def test_tensors_of_one_name_or_of_many_dimensions_are_refused(tmp_path: Path) -> None:
    tensor = text(b"a") + struct.pack("<IQIQ", 1, 4, 0, 0)
    with pytest.raises(SourceError, match="two tensors of the name 'a'"):
        refuse_large_header(write(tmp_path, tensors=2 * tensor, counts=(2, 0)))
    with pytest.raises(SourceError, match=r"a tensor of 4,294,967,295 dimensions"):
        refuse_large_header(write(tmp_path, tensors=text(b"a") + b"\xff" * 4, counts=(1, 0), zeros=64))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x00" * 100], ids=["empty", "cut", "another"])
def test_other_files_are_left_to_their_reader(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    refuse_large_header(tmp_path / "x.gguf")
    whole = write(tmp_path, key(ARCHITECTURE), array(8, 2, text(b"a") + text(b"b"))).read_bytes()
    for end in range(0, len(whole), 9):
        (tmp_path / "x.gguf").write_bytes(whole[:end])
        refuse_large_header(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(re.sub(rb"\x09\x00\x00\x00", b"\x0d\x00\x00\x00", whole))  # an unknown type
    refuse_large_header(tmp_path / "x.gguf")
