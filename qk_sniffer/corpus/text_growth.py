"""Finds tokenizers whose steps before the model make a text many times longer.

Such a step replaces a character by a text of any length, and several of them multiply: a file of a few kilobytes would
fill the memory with its first text.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

MOST_GROWTH = 1_000
"""The largest growth of a text. In published tokenizers it is at most that of NFKC's longest ligature, 33 bytes."""

_MAY_BE_EMPTY = re.compile(r"\(\?<?[=!]|\\[bBGKyY]")
"""Conditions on the place of a match, in a pattern that may have nothing else."""


def growth(described: Mapping[str, Any]) -> int:
    """Returns how many times longer a text may be after the steps of a tokenizer before its model, at most.

    Args:
        described: the content of a `tokenizer.json`. What is not of its form counts as nothing: the library refuses it.
    """
    total = 1
    for step in _steps([described.get("normalizer"), described.get("pre_tokenizer")]):
        total *= max(1, _growth_of(step))
        if total > MOST_GROWTH:
            break
    return total


def _steps(waiting: list[Any]) -> Iterator[Mapping[str, Any]]:
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            yield step
            for key in ("normalizers", "pretokenizers"):
                waiting += step[key] if isinstance(step.get(key), list) else []


def _growth_of(step: Mapping[str, Any]) -> int:
    kind = step.get("type")
    if kind == "ByteLevel":  # a character for each byte of UTF-8, of two bytes itself
        return 2
    if kind == "Prepend":
        return len(str(step.get("prepend", "")))
    if kind == "Precompiled":
        return _longest_entry(step.get("precompiled_charsmap"))
    if kind != "Replace":
        return 1
    pattern, content = step.get("pattern"), len(str(step.get("content", "")))
    pattern = pattern if isinstance(pattern, dict) else {}
    if literal := str(pattern.get("String", "")):
        return -(-content // len(literal))
    return content + bool(content and _matches_nothing(str(pattern.get("Regex", ""))))


def _matches_nothing(pattern: str) -> bool:
    """Whether a pattern may match between two characters, so that nothing is replaced."""
    try:
        return _MAY_BE_EMPTY.search(pattern) is not None or re.fullmatch(pattern, "") is not None
    except (re.error, RecursionError, OverflowError):  # syntax of another library
        return True


def _longest_entry(charsmap: Any) -> int:
    """Returns the bytes of the longest text in a map of characters of the sentencepiece library, in base64.

    It is the size of a trie in 4 bytes, the trie, and the texts, each of which ends with a zero.
    """
    try:
        data = base64.b64decode(str(charsmap or ""), validate=True)
    except binascii.Error:
        return 1
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.split(b"\0")))
