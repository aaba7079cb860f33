"""Refuses vocabularies with tokens that are longer than any model's.

transformers makes the merges of a vocabulary from its tokens: it splits each one in all ways, in time that grows with
the square of its length. A file of two megabytes with a single token takes minutes, and one of ten megabytes hours.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qk_sniffer.corpus.tokenizer_files import LARGEST_ID
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.gguf_header import LONGEST_TOKEN
from qk_sniffer.hub.json_files import DamagedFileError, json_object
from qk_sniffer.text import in_mb

_OTHERS = (".json", ".jinja", ".txt", ".gguf")
"""The endings of files of a tokenizer that are no vocabulary of sentencepiece or tiktoken."""

_MOST_BYTES = 64_000_000
"""The largest vocabulary. Those of Mistral have some 20 MB, and others some 5 MB."""

_LONG_LINE = re.compile(rb"[^\r\n]{%d,}" % LONGEST_TOKEN)

_OF_TIKTOKEN = re.compile(rb"\s*(\S+)\s+[-+]?[0-9_]+\s*")
"""A line of tiktoken: a token in Base64, and its rank."""

_PIECE = 1
"""The number of the field of a piece in a model of sentencepiece."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_GROUPS = (3, 4)
"""The types of fields in a message of protobuf."""

_LONGEST_VARINT = 10


def refuse_long_tokens(path: Path) -> None:
    """Checks a file of a tokenizer, if it is a vocabulary of sentencepiece, of tiktoken, or of Mistral (tekken).

    One that is damaged is left to its reader.

    Raises:
        SourceError: a token is longer than any model's, the file is larger, or it asks for more special tokens.
        OSError: the file cannot be read.
    """
    is_tekken = "tekken" in path.name and path.suffix == ".json"
    if not is_tekken and path.suffix in _OTHERS:
        return
    if (size := path.stat().st_size) > _MOST_BYTES:
        problems = iter([f"has {in_mb(size)}"])
    elif is_tekken:
        problems = _of_tekken(path.read_bytes())
    else:
        content = path.read_bytes()
        problems = _of_length(max(_longest_piece(content), _longest_of_tiktoken(content)))
    if (problem := next(problems, None)) is not None:
        raise SourceError(
            f"{path} is refused: it {problem}, which would take hours or fill the memory. Restore the file, or set "
            "model.tokenizer.name to another tokenizer"
        )


def _of_length(longest: int) -> Iterator[str]:
    if longest > LONGEST_TOKEN:
        yield f"has a token of {longest:,} bytes"


def _of_tekken(content: bytes) -> Iterator[str]:
    try:
        described = json_object(content)
    except DamagedFileError:
        return
    vocabulary, config = described.get("vocab"), described.get("config")
    entries: list[Any] = vocabulary if isinstance(vocabulary, list) else []
    tokens = (entry.get("token_bytes") for entry in entries if isinstance(entry, dict))
    yield from _of_length(max((_decoded(token) for token in tokens if isinstance(token, str)), default=0))
    number = config.get("default_num_special_tokens") if isinstance(config, dict) else None
    if isinstance(number, int) and number > LARGEST_ID:
        yield f"asks for {number:,} special tokens"


def _decoded(text: str | bytes) -> int:
    """Returns the most bytes that a text in Base64 stands for."""
    return len(text) * 3 // 4


def _longest_of_tiktoken(content: bytes) -> int:
    """Returns the most bytes of a token; 0 if no line with a long one is of the form."""
    found = (_OF_TIKTOKEN.fullmatch(line[0]) for line in _LONG_LINE.finditer(content))
    return max((_decoded(match[1]) for match in found if match), default=0)


def _longest_piece(content: bytes) -> int:
    """Returns the bytes of the longest piece of a model of sentencepiece, with its score; 0 if the content is none.

    A reader of protobuf reads a message as a whole, or refuses it.
    """
    at = longest = 0
    try:
        while at < len(content):
            tag, at = _varint(content, at)
            number, kind = divmod(tag, 8)
            if kind == _LENGTH:
                length, at = _varint(content, at)
                at += length
                if number == _PIECE:
                    longest = max(longest, length)
            elif kind == _VARINT:
                _, at = _varint(content, at)
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                at += 8 if kind == _EIGHT_BYTES else 4
            elif kind not in _GROUPS:
                return 0
    except IndexError:
        return 0
    return longest if at == len(content) else 0


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns the number at a place of a message, and the place after it.

    Raises:
        IndexError: the content ends within the number, or the number is too long.
    """
    if (byte := content[at]) < 0x80:
        return byte, at + 1
    number = byte & 0x7F
    for place in range(1, _LONGEST_VARINT):
        byte = content[at + place]
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    raise IndexError
