"""Analyses the regular expressions that split texts, to find which cuts of a text change no match before them.

A match that takes a letter and then a separator crosses the boundary between the two. Without such a match, and without
a condition on what follows, the matches before the boundary are the same if the text ends there.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

_AT_WHITE_SPACE = r"(?!\S)"
"""The condition that holds before white space and at the end of a text alike."""

_GROUPS = ("(?:", "(?i:", "(?>")
_CLASSES = "sSdDwWhHrntfv"
_PIECE = 1024
_LAST = "\uffff"


class UnknownPatternError(Exception):
    """A regular expression has syntax that is not analysed."""


class _Item(NamedTuple):
    letter: bool
    """Whether it can match a letter."""
    separator: bool
    nullable: bool
    """Whether it can match nothing."""
    stops: bool = False
    """Whether it always matches at a separator."""


@dataclass(frozen=True)
class SplitPattern:
    """What a regular expression does at a separator that follows a letter."""

    crosses: bool
    """Whether a match may take the letter and the separator, or matches may depend on what follows the letter."""
    has_letters: bool
    """Whether a match may have a letter."""
    stops: bool
    """Whether a match begins at every separator that no match has taken."""

    @classmethod
    def of(cls, pattern: str, separator: str) -> "SplitPattern":
        """Analyses a pattern of the tokenizers library. It may say `crosses` where no match does, never the reverse.

        Raises:
            UnknownPatternError: the pattern has syntax that is not analysed.
        """
        parser = _Parser(pattern, separator)
        item = parser.alternatives()
        if parser.at != len(parser.pattern):
            raise UnknownPatternError(pattern)
        return cls(parser.crosses or item.nullable, item.letter, item.stops)


class _Parser:
    """Reads a pattern once. Sets `crosses` if anything that can match a letter may precede what matches a separator."""

    def __init__(self, pattern: str, separator: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.crosses = False
        self._separator = separator
        self._ignores_case = "(?i" in pattern

    def alternatives(self) -> _Item:
        items = [self._sequence()]
        while self._next() == "|":
            self.at += 1
            items.append(self._sequence())
        return _Item(*(any(facts) for facts in zip(*items, strict=True)))

    def _sequence(self) -> _Item:
        items: list[_Item] = []
        letter = False
        while self._next() not in ("", "|", ")"):
            if self.pattern.startswith(_AT_WHITE_SPACE, self.at):
                self.at += len(_AT_WHITE_SPACE)
                # It is asked behind a letter only if what precedes it can end with one.
                behind_letter = not items or items[-1].letter or items[-1].nullable
                self.crosses |= behind_letter and not self._separator.isspace()
                items.append(_Item(letter=False, separator=False, nullable=False))
                continue
            item = self._item()
            self.crosses |= item.separator and letter
            letter |= item.letter
            items.append(item)
        needed = [item for item in items if not item.nullable]
        # What may be missing is, unless it takes the separator itself.
        stops = len(needed) == 1 and needed[0].stops and sum(item.separator for item in items) == 1
        return _Item(letter, any(item.separator for item in items), not needed, stops)

    def _item(self) -> _Item:
        start = self.at
        if self._next() == "(":
            self.at += self._group_mark()
            item = self.alternatives()
            self._take(")")
        else:
            self._atom()
            atom = self.pattern[start : self.at]
            separator = _matches(atom, self._separator, ignore_case=self._ignores_case)
            item = _Item(_matches_a_letter(atom, ignore_case=self._ignores_case), separator, False, separator)
            self.crosses |= item.letter and separator
        repeated, optional, exact = self._quantifier()
        self.crosses |= repeated and item.letter and item.separator
        return item._replace(nullable=item.nullable or optional, stops=item.stops and not exact)

    def _group_mark(self) -> int:
        for mark in _GROUPS:
            if self.pattern.startswith(mark, self.at):
                return len(mark)
        if self.pattern.startswith(("(?", "(*"), self.at):
            raise UnknownPatternError(self.pattern)
        return 1

    def _atom(self) -> None:
        char = self._next()
        self.at += 1
        if char == "[":
            self._class()
        elif char == "\\":
            self._escape()
        elif char in "^$?*+{)":
            raise UnknownPatternError(self.pattern)

    def _escape(self) -> None:
        char = self._next()
        self.at += 1
        if char in ("p", "P"):
            self._take("{")
            self.at = self.pattern.find("}", self.at) + 1
            if not self.at:
                raise UnknownPatternError(self.pattern)
        elif not char or (char.isalnum() and char not in _CLASSES):
            raise UnknownPatternError(self.pattern)

    def _class(self) -> None:
        if self._next() == "^":
            self.at += 1
        if self._next() == "]":
            raise UnknownPatternError(self.pattern)
        while (char := self._next()) != "]":
            self.at += 1
            if char == "[":
                self._class()
            elif char == "\\":
                self.at += 1
            elif not char:
                raise UnknownPatternError(self.pattern)
        self.at += 1

    def _quantifier(self) -> tuple[bool, bool, bool]:
        """Returns whether what precedes may be repeated, may be missing, or has a number of repetitions."""
        repeated = optional = exact = False
        while (char := self._next()) and char in "?*+{":
            if char == "{":
                stop = self.pattern.find("}", self.at)
                bounds = self.pattern[self.at + 1 : stop].split(",")
                if stop < 0 or not all(bound.isdigit() or not bound for bound in bounds):
                    raise UnknownPatternError(self.pattern)
                self.at = stop
                exact = True
            self.at += 1
            repeated |= char != "?"
            optional |= char in "?*" or (char == "{" and bounds[0] in ("", "0"))
        return repeated, optional, exact

    def _next(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _take(self, char: str) -> None:
        if self._next() != char:
            raise UnknownPatternError(self.pattern)
        self.at += 1


def is_letter(char: str) -> bool:
    """Whether a character is a letter of 16 bits, now and in Unicode 3.2: a library with older tables agrees."""
    return char <= _LAST and char.isalpha() and unicodedata.ucd_3_2_0.category(char)[0] == "L"


@cache
def _letters() -> tuple[str, ...]:
    letters = "".join(char for char in map(chr, range(ord(_LAST) + 1)) if is_letter(char))
    return tuple(letters[at : at + _PIECE] for at in range(0, len(letters), _PIECE))


@cache
def _matches_a_letter(atom: str, *, ignore_case: bool) -> bool:
    if len(atom) == 1 and atom != ".":
        return atom.isalpha()
    return any(_matches(atom, piece, ignore_case=ignore_case) for piece in _letters())


def _matches(atom: str, text: str, *, ignore_case: bool) -> bool:
    """Whether an expression matches anything in a text, as the library that splits texts sees it."""
    from tokenizers import Regex, pre_tokenizers

    for form in (atom, f"(?i:{atom})") if ignore_case else (atom,):
        try:
            split = pre_tokenizers.Split(Regex(form), "removed")
        except Exception as error:
            raise UnknownPatternError(atom) from error
        if split.pre_tokenize_str(text) != [(text, (0, len(text)))]:
            return True
    return False
