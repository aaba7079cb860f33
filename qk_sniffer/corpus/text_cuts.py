"""Finds places where a text can be cut so that the tokens before the cut are those of the whole text.

A cut is made between a letter and a separator, such as a space, that another letter follows. It is safe if no step of
the tokenizer takes a character on each side together, or looks at what follows:

1. No added token has such a separator after a letter.
2. The normalizer changes characters one by one, or in groups that end before the separator.
3. The pre-tokenizer splits there. Or it does not, and no token of a BPE or Unigram model has a letter before the
   separator.

The tokens behind a cut are those of the whole text too, if the text before it has another cut: what the tokenizer does
at the start of a text changes no token behind the next cut. A Unigram model without a pre-tokenizer is the exception:
it compares sums of scores from the start of the text, whose rounding may decide.

Other tokenizers have no cuts: those in Python, and those with a step that is not known here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from qk_sniffer.corpus.panics import panics_as_errors
from qk_sniffer.corpus.split_patterns import SplitPattern, UnknownPatternError, is_letter

_SEPARATORS = " \n\u3001\u3002\uff0c"
"""Space, line break, and the comma and the full stop of texts without spaces."""

_WINDOW = 4096
"""The characters that are searched at once."""

_CONTEXT = 16
"""The characters on both sides of a cut that are normalized: more than any character that is a group of them has."""

_PLACE = re.compile(rf"[{_SEPARATORS}](?<=[^\W\d_].)(?=[^\W\d_])", re.DOTALL)

_ONE_BY_ONE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "BertNormalizer", "Precompiled"}
_AT_THE_ENDS = {"Prepend", "Strip"}

_AT_WHITE_SPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_ELSEWHERE = {"Digits", "Punctuation"}

_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern by which the ByteLevel pre-tokenizer splits texts."""


class TextCuts:
    """The cuts of texts for one tokenizer."""

    def __init__(self, tokenizer: Any, *, both_sides: bool = False) -> None:
        """Reads the parts of a tokenizer of transformers.

        `both_sides` leaves out cuts behind which the tokens may be others than those of the whole text.
        """
        self._backend: Any = None
        self._joinless = ("BPE",) if both_sides else ("BPE", "Unigram")
        self._normalized: dict[str, str] = {}
        """The separators that are safe, and what the normalizer makes of each."""
        if not _is_its_backend(tokenizer):
            return
        self._backend = tokenizer.backend_tokenizer
        try:
            normalizer, pre_tokenizer = (
                list(_steps(part)) for part in (self._backend.normalizer, self._backend.pre_tokenizer)
            )
            for separator in _SEPARATORS:
                after = self._normalize(f"a{separator}a")[-2]
                if (
                    not after.isalnum()
                    and self._added_tokens_keep(separator, after)
                    and all(_normalizes_apart(step) for step in normalizer)
                    and self._is_split(pre_tokenizer, after)
                ):
                    self._normalized[separator] = after
        except Exception:  # a part in Python cannot be described, or a pattern is not known
            self._normalized = {}

    def __bool__(self) -> bool:
        """Whether texts can have cuts."""
        return bool(self._normalized)

    def last(self, text: str, stop: int, after: int = 0) -> int | None:
        """Returns the last cut before character `stop` and behind character `after`; None if there is none."""
        for start in range(stop - _WINDOW, after - _WINDOW, -_WINDOW) if self else ():
            places = _PLACE.finditer(text, max(after + 1, start), min(stop, start + _WINDOW + 2))
            for place in reversed([match.start() for match in places]):
                if self._is_cut(text, place):
                    return place
        return None

    def _is_cut(self, text: str, place: int) -> bool:
        after = self._normalized.get(text[place])
        if after is None or not (is_letter(text[place - 1]) and is_letter(text[place + 1])):
            return False
        start = max(0, place - _CONTEXT)
        left = self._normalize(text[start:place])
        both = self._normalize(text[start : place + _CONTEXT])
        return bool(left) and is_letter(left[-1]) and both.startswith(left + after)

    def _normalize(self, text: str) -> str:
        normalizer = self._backend.normalizer
        with panics_as_errors():
            return text if normalizer is None else str(normalizer.normalize_str(text))

    def _added_tokens_keep(self, separator: str, after: str) -> bool:
        return not any(
            _joins(form, one)
            for token in self._backend.get_added_tokens_decoder().values()
            for form in (token.content, self._normalize(token.content))
            for one in {separator, after}
        )

    def _is_split(self, steps: list[Mapping[str, Any]], separator: str) -> bool:
        """Whether a token of the model never has a letter and the separator behind it, nor depends on both.

        Raises:
            UnknownPatternError: a pattern has syntax that is not analysed.
        """
        for step in steps:
            kind = step["type"]
            if kind in _AT_WHITE_SPACE:
                if separator.isspace():
                    return self._is_steady()
            elif kind == "ByteLevel":
                found = SplitPattern.of(_BYTE_LEVEL, separator)
                return bool(step["use_regex"]) and found.stops and not found.crosses and self._is_steady()
            elif kind == "Metaspace":
                separator = step["replacement"] if separator == " " else separator
                if step["split"] and separator == step["replacement"]:
                    return self._is_steady()
            elif kind == "Split":
                splits = _splits(step, separator)
                if splits is None:
                    return False
                if splits:
                    return self._is_steady()
            elif kind not in _ELSEWHERE:
                return False
        return self._is_steady() and self._model_never_joins(separator)

    def _is_steady(self) -> bool:
        """Whether the model always gives a word the same tokens."""
        model = self._backend.model
        return not any(getattr(model, name, None) for name in ("dropout", "alpha", "nbest_size"))

    def _model_never_joins(self, separator: str) -> bool:
        model = self._backend.model
        kind = type(model).__name__
        if kind not in self._joinless:
            return False
        if any(
            getattr(model, name, None) for name in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        ):
            return False
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        return separator in vocabulary and not any(_joins(token, separator) for token in vocabulary)


def _is_its_backend(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers hands texts to the tokenizers library as they are."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the description of each step of a normalizer or pre-tokenizer.

    Raises:
        Exception: a step is not one of the library.
    """
    if part is None:
        return
    waiting = [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = [*(step.get("normalizers") or step.get("pretokenizers") or ()), *waiting]
        else:
            yield step


def _normalizes_apart(step: Mapping[str, Any]) -> bool:
    """Whether a step of a normalizer changes a separator between two letters, and what precedes, apart from the rest.

    Raises:
        UnknownPatternError: its pattern has syntax that is not analysed.
    """
    if step["type"] != "Replace":
        return step["type"] in _ONE_BY_ONE or step["type"] in _AT_THE_ENDS
    kind, pattern = _pattern(step)
    if kind == "String":
        return not any(map(str.isalpha, pattern))
    return "(?!" not in pattern and not SplitPattern.of(pattern, " ").has_letters


def _splits(step: Mapping[str, Any], separator: str) -> bool | None:
    """Returns whether a pattern always splits before a separator; None if it may look beyond it.

    Raises:
        UnknownPatternError: the pattern has syntax that is not analysed.
    """
    kind, pattern = _pattern(step)
    if kind == "String":
        if step["invert"] or any(map(str.isalpha, pattern)):
            return None
        return pattern == separator and step["behavior"] in ("Isolated", "Removed", "MergedWithNext")
    found = SplitPattern.of(pattern, separator)
    if found.crosses:
        return None
    return found.stops and step["behavior"] in ("Isolated", "Removed")


def _pattern(step: Mapping[str, Any]) -> tuple[str, str]:
    ((kind, pattern),) = step["pattern"].items()
    if kind not in ("String", "Regex"):
        raise UnknownPatternError(kind)
    return kind, pattern


def _joins(token: str, separator: str) -> bool:
    return any(one.isalpha() and other == separator for one, other in pairwise(token))
