"""Reads the content of an example from the columns of its row."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.contents import Content, ContentError, Conversation, TokenIds, is_unicode
from qk_sniffer.corpus.json_sizes import refuse_many_values
from qk_sniffer.corpus.segments import Segments

_LARGEST_ID = 2**31 - 1

_MOST_MESSAGES = 10_000
"""The most messages of a conversation. The time that some templates take grows with the square of the number."""

_MOST_LEVELS = 100
"""The deepest nesting of values in a message. Functions that follow it call themselves at each level."""

_MOST_SEGMENTS, _MOST_NAME = 1_000, 100
"""The most different segments of an example, and the most characters of a segment's name."""

_SHOWN_CHARACTERS = 50
_STRINGS = ("string", "large_string")
_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view", "List", "LargeList", "Sequence")
"""The names that sources have for types of lists."""


class ContentColumns(Protocol):
    """The columns that hold the contents of examples."""

    setting: str
    """The setting that names the main column."""
    column: str
    """The main column."""
    columns: tuple[str, ...]
    """All columns that are read."""
    noun: str
    """The word for a content in messages."""
    expected: str
    """The word for what the main column holds."""

    def accepts(self, kind: str) -> bool:
        """Whether the main column may be of this type."""

    def read(self, row: Mapping[str, Any]) -> Content | None:
        """Returns the content of a row; None if it is null or empty.

        Raises:
            ContentError: the row has a value of another kind.
        """


def content_columns(config: DatasetConfig, *, has_schema: bool) -> ContentColumns:
    """Returns the columns that `config` names.

    Args:
        has_schema: whether columns have types. A struct then has all fields that any row has, with null for those
            that a row lacks.
    """
    if config.messages_column is not None:
        return MessagesColumn(config.messages_column, drops_nulls=has_schema)
    if config.tokens_column is not None:
        return TokensColumns(config.tokens_column, config.segments_column)
    return TextColumn(config.text_column)


class TextColumn:
    """A column of texts."""

    setting = "dataset.text_column"
    noun = "text"
    expected = "strings"

    def __init__(self, column: str) -> None:
        self.column = column
        self.columns: tuple[str, ...] = (column,)

    def accepts(self, kind: str) -> bool:
        """Whether the column may be of this type."""
        return kind in (*_STRINGS, "unknown")

    def read(self, row: Mapping[str, Any]) -> str | None:
        """Returns the text of a row; None if it is null, empty or only white space."""
        text = row[self.column]
        if text is not None and not isinstance(text, str):  # a stream may have no column types
            _refuse_type(text, self)
        return None if text is None or text == "" or text.isspace() else text


class MessagesColumn:
    """A column of lists of messages, or of their JSON. Null fields of messages count as missing.

    With `drops_nulls`, so do null fields in fields, such as in the arguments of a tool call.
    """

    setting = "dataset.messages_column"
    noun = "messages"
    expected = "lists of messages, each with a role and a content"

    def __init__(self, column: str, *, drops_nulls: bool) -> None:
        self.column = column
        self.columns: tuple[str, ...] = (column,)
        self._drops_nulls = drops_nulls

    def accepts(self, kind: str) -> bool:
        """Whether the column may be of this type."""
        return kind in (*_STRINGS, *_LISTS, "unknown")

    def read(self, row: Mapping[str, Any]) -> Conversation | None:
        """Returns the conversation of a row; None if it has no message."""
        value = row[self.column]
        messages = _list_of(value, self)
        if len(messages) > _MOST_MESSAGES:
            raise ContentError(
                f"has {len(messages):,} messages in column {self.column!r}, more than {_MOST_MESSAGES:,}: split the "
                "conversation"
            )
        drops_nulls = self._drops_nulls and not isinstance(value, str)
        messages = [_plain(message, self.column, drops_nulls=drops_nulls) for message in messages]
        if not len(messages):
            return None
        return Conversation([self._message(number, message) for number, message in enumerate(messages)])

    def _message(self, number: int, message: Any) -> Mapping[str, Any]:
        where = f"in message {number} (from 0) of column {self.column!r}"
        if not isinstance(message, dict):
            raise ContentError(f"has {_shown(message)} {where}: a message is a mapping with the keys role and content")
        if not isinstance(message.get("role"), str):
            keys = ", ".join(_shown(key) for key in [*message][:10])
            raise ContentError(f"has no text as role {where}, which has the keys {keys}: the keys are role and content")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise ContentError(f"has {_shown(content)} as content {where}: only text can be captured")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ContentError(f"has content of the type {_shown(kind)} {where}: only text can be captured")
        # transformers does the same from some version on: most templates would print null as None.
        return {key: each for key, each in message.items() if each is not None}


class TokensColumns:
    """A column of lists of token ids, and a column with the segments of the tokens if there is one.

    A list of segments has a name for each token, or pairs of a name and the place of the segment's first token.
    """

    setting = "dataset.tokens_column"
    noun = "token ids"
    expected = "lists of integers"

    def __init__(self, column: str, segments_column: str | None) -> None:
        self.column = column
        self.columns: tuple[str, ...] = (column,) if segments_column is None else (column, segments_column)
        self._segments_column = segments_column

    def accepts(self, kind: str) -> bool:
        """Whether the column of ids may be of this type."""
        return kind in (*_STRINGS, *_LISTS, "unknown")

    def read(self, row: Mapping[str, Any]) -> TokenIds | None:
        """Returns the token ids of a row; None if it has none."""
        ids = self._ids(_list_of(row[self.column], self))
        if not len(ids):
            return None
        if self._segments_column is None:
            return TokenIds(ids)
        return TokenIds(ids, _segments(row[self._segments_column], self._segments_column, len(ids)))

    def _ids(self, values: Sequence[Any] | NDArray[Any]) -> NDArray[np.int32]:
        if not isinstance(values, np.ndarray):
            for place, value in enumerate(values):
                if type(value) is not int or not 0 <= value <= _LARGEST_ID:
                    self._refuse_id(place, value)
            return np.array(values, np.int32)
        wrong = np.flatnonzero((values < 0) | (values > _LARGEST_ID)) if values.dtype.kind in "iu" else [0]
        if len(wrong):
            self._refuse_id(int(wrong[0]), values[wrong[0]].item())
        return values.astype(np.int32)

    def _refuse_id(self, place: int, value: Any) -> NoReturn:
        raise ContentError(
            f"has {_shown(value)} at place {place} (from 0) of column {self.column!r}: a token id is an integer from 0 "
            f"to {_LARGEST_ID:,}"
        )


def _segments(value: Any, column: str, num_tokens: int) -> Segments:
    """Returns the segments of `num_tokens` tokens in a value of the column.

    Raises:
        ContentError: the value does not give each token a segment.
    """
    values = _parsed(value, column)
    if not isinstance(values, list | tuple) or not values:
        raise ContentError(
            f"has {_shown(value)} in column {column!r}, and token ids: a name for each token is needed, or pairs of a "
            "name and the place of its first token"
        )
    is_pairs = not isinstance(values[0], str)
    pairs = list(_pairs(values, column) if is_pairs else ((name, at) for at, name in enumerate(values)))
    codes: dict[str, int] = {}
    for name, _ in pairs:
        if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME or not is_unicode(name):
            raise ContentError(
                f"has {_shown(name)} as a segment in column {column!r}: a name is a text of 1 to {_MOST_NAME} "
                "characters"
            )
        codes.setdefault(name, len(codes))
    if len(codes) > _MOST_SEGMENTS:
        raise ContentError(f"has {len(codes):,} different segments in column {column!r}, more than {_MOST_SEGMENTS:,}")
    numbers = np.array([codes[name] for name, _ in pairs], np.int32)
    if not is_pairs:
        if len(values) != num_tokens:
            raise ContentError(f"has {len(values):,} names of segments in column {column!r}, and {num_tokens:,} tokens")
        return Segments(tuple(codes), numbers)
    starts = [start for _, start in pairs]
    if starts[0] != 0 or any(one >= other for one, other in zip(starts, [*starts[1:], num_tokens], strict=True)):
        raise ContentError(
            f"has segments in column {column!r} that begin at {_shown(starts)}, and {num_tokens:,} tokens: the first "
            "begins at 0, each other one after the one before, and none after the last token"
        )
    return Segments(tuple(codes), np.repeat(numbers, np.diff([*starts, num_tokens])))


def _pairs(values: Sequence[Any], column: str) -> Iterator[tuple[Any, int]]:
    """Yields names and starts of pairs, which are lists of two or mappings with the keys name and start."""
    for value in values:
        pair = [value.get("name"), value.get("start")] if isinstance(value, dict) else value
        if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[1]) is not int:
            raise ContentError(f"has {_shown(value)} as a segment in column {column!r}: a pair is [name, start]")
        yield pair[0], pair[1]


def _list_of(value: Any, columns: ContentColumns) -> Sequence[Any] | NDArray[Any]:
    """Returns the list that a value is, or whose JSON it is; an empty one for null and for an empty text."""
    values = _parsed(value, columns.column)
    if values is None:
        return []
    if not isinstance(values, list | tuple | np.ndarray):
        _refuse_type(values, columns)
    return values


def _parsed(value: Any, column: str) -> Any:
    """Returns a value, or what its JSON says if it is a text."""
    if not isinstance(value, str):
        return value
    if not value or value.isspace():
        return None
    try:
        refuse_many_values(value)
        return json.loads(value, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"has a text in column {column!r} that cannot be read as JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {_shown(repeated)} twice")
    return found


def _plain(value: Any, column: str, *, drops_nulls: bool, level: int = 0) -> Any:
    """Returns a copy of a message, or of a value in it, that has nothing but data for a chat template.

    A template may call what a value has: an image or an array of numpy has functions that write files, and a date has
    the clock. Dates, times and decimal numbers become text. With `drops_nulls`, null fields are left out.

    Raises:
        ContentError: there is another value, or values are nested too deep for functions that follow them.
    """
    if level > _MOST_LEVELS:
        raise ContentError(f"has values nested deeper than {_MOST_LEVELS} levels in column {column!r}")
    options: Any = {"drops_nulls": drops_nulls, "level": level + 1}
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if not (drops_nulls and each is None)}
        return {str(key): _plain(each, column, **options) for key, each in kept.items()}
    if isinstance(value, list):
        return [_plain(each, column, **options) for each in value]
    if type(value) in (str, int, float, bool, type(None)):
        return value
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    raise ContentError(
        f"has a value of the type {type(value).__name__} in column {column!r}: messages hold texts, numbers, dates, "
        "lists and mappings"
    )


def _refuse_type(value: Any, columns: ContentColumns) -> NoReturn:
    raise ContentError(
        f"holds {type(value).__name__}, not {columns.noun}, in column {columns.column!r}. Set {columns.setting} to a "
        f"column of {columns.expected}"
    )


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
