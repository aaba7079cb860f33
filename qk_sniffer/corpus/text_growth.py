"""Finds tokenizers that make a text many times longer: in steps before the model, or in their post-processor.

Such a step replaces a character by a text of any length, or repeats the tokens of a text, and several of them multiply:
a file of a few kilobytes would fill the memory with its first text.

The length of a text counts here in characters of its NFKD form. So measured, no Unicode normal form, lower case or
removal makes a text longer, in any order of steps, and every other step has a factor of its own.
"""

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

MOST_GROWTH = 1_000
"""The largest growth of a text. In published tokenizers it is about 100: 18 times by the longest ligature in a map of
characters, twice by a space before each word, and three times by special tokens around a text of one."""

PARTS = ("normalizer", "pre_tokenizer", "post_processor")
"""The parts of a tokenizer that may make a text longer."""

_OF_BYTES = 13
"""The growth by ByteLevel: of the letters that stand for the four bytes of a character, NFKD makes up to 11, and of a
space before each word 2."""

_ONE_CHARACTER = r"(?:[^\\\[\](){}|.*+?^$]|\.|\\[sSdDwWnrt]|\\[pP]\{\^?\w+\}|\[\^?(?:[^\[\]\\&^]|\\[sSdDwWnrt])+\])"

_NEVER_EMPTY = re.compile(rf"(?:{_ONE_CHARACTER}(?:\+|\{{[1-9][0-9]*,?\}})?(?![*+?{{])){{1,50}}", re.ASCII)
"""Some patterns that match at least one character in Onigmo, which the tokenizers library uses. Python does not tell:
Onigmo reads `b{2}?` as `(?:b{2})?`, which matches nothing too."""


def growth(described: Mapping[str, Any]) -> int:
    """Returns the most characters and tokens that a tokenizer makes of one character. It makes n times as many of n.

    A result above `MOST_GROWTH` only says that there are more.

    Args:
        described: the content of a `tokenizer.json`. What is not of its form counts as nothing: the library refuses it.
    """
    length = 1
    for part in PARTS:
        after = _after_tokens if part == "post_processor" else _after_text
        for step in _steps(described.get(part)):
            length = max(length, after(step, length))
            if length > MOST_GROWTH:
                return length
    return length


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a part, in their order."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            yield step
            for key in ("normalizers", "pretokenizers", "processors"):
                waiting += reversed(step[key]) if isinstance(step.get(key), list) else []


def _after_text(step: Mapping[str, Any], length: int) -> int:
    """Returns the most characters that a step of the normalizer or the pre-tokenizer makes of `length`.

    The library takes a step of no type, or of an unknown one, for that which has its fields. So the fields decide here.
    """
    kind = step.get("type")
    if "content" in step:
        length = _replaced(step, length)
    if "prepend" in step:
        length += _length(step["prepend"])
    if "precompiled_charsmap" in step:
        length *= max(1, _longest_entry(step["precompiled_charsmap"]))
    if "replacement" in step:  # in the place of each space, and before each piece of the text
        length *= 1 + _length(step["replacement"])
    if kind == "BertNormalizer" or "handle_chinese_chars" in step:  # spaces on both sides of a character
        length *= 3
    if kind == "ByteLevel" or "trim_offsets" in step:
        length *= _OF_BYTES
    return length


def _replaced(step: Mapping[str, Any], length: int) -> int:
    pattern, content = step.get("pattern"), _length(step["content"])
    pattern = pattern if isinstance(pattern, dict) else {}
    if literal := _length(pattern.get("String", "")):
        return max(1, -(-content // literal)) * length
    if content and not _NEVER_EMPTY.fullmatch(str(pattern.get("Regex", ""))):
        return length + content * (length + 1)  # before each character and at the end
    return max(1, content) * length


def _after_tokens(step: Mapping[str, Any], length: int) -> int:
    """Returns the most tokens that a step of the post-processor makes of `length`, in parts of one token each."""
    if "cls" in step and "sep" in step:
        return 3 * length
    special = step.get("special_tokens")
    special = special if isinstance(special, dict) else {}
    return length * max(_of_template(step.get(key), special) for key in ("single", "pair"))


def _of_template(template: Any, special: Mapping[str, Any]) -> int:
    """Returns the number of tokens around and of a text of one token."""
    sequences, added = [], 0
    for piece in template if isinstance(template, list) else ():
        for kind, value in piece.items() if isinstance(piece, dict) else ():
            name = str(value.get("id")) if isinstance(value, dict) else ""
            if kind == "Sequence":
                sequences.append(name)
            elif isinstance(token := special.get(name), dict) and isinstance(token.get("ids"), list):
                added += len(token["ids"])
    if len(sequences) > len(set(sequences)):
        # The library combines each part that truncation cuts off with each of the same text: no factor is a bound.
        return MOST_GROWTH + 1
    return 1 + added


def _length(text: Any) -> int:
    return len(unicodedata.normalize("NFKD", str(text)))


def _longest_entry(charsmap: Any) -> int:
    """Returns the length of the longest text in a map of characters of the sentencepiece library, in base64.

    It is the size of a trie in 4 bytes, the trie, and the texts, each of which ends with a zero.
    """
    try:
        data = base64.b64decode(str(charsmap or ""), validate=True)
    except binascii.Error:
        return 1
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(_length(text.decode(errors="replace")) for text in texts.split(b"\0"))
