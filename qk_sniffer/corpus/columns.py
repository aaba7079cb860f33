"""Reads the content of an example from the columns of its row."""

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.contents import Content, ContentError

_STRINGS = ("string", "large_string")


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


def content_columns(config: DatasetConfig) -> ContentColumns:
    """Returns the columns that `config` names."""
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


def _refuse_type(value: Any, columns: ContentColumns) -> NoReturn:
    raise ContentError(
        f"holds {type(value).__name__}, not {columns.noun}, in column {columns.column!r}. Set {columns.setting} to a "
        f"column of {columns.expected}"
    )
