"""Reads text files. Each file is one row with the column `text`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qk_sniffer.corpus.data_files import DataFile, FormatError, open_text


class TextReader:
    """Reads text files, as they are but for a byte order mark."""

    typed = True
    options = frozenset({"encoding", "sample_by"})
    has_schema = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._encoding = options.get("encoding")

    def kinds(self, file: DataFile, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the one column."""
        return {"text": "string"}

    def count(self, file: DataFile) -> int | None:
        """Returns None: only reading tells whether the file is text."""
        return None

    def read(self, file: DataFile, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the row, if `start` is 0.

        Raises:
            FormatError: the file is not in UTF-8 but in UTF-16.
        """
        if others := set(columns) - {"text"}:
            raise FormatError(f"it has the column 'text' alone, not {min(others)!r}")
        if start == 0:
            with open_text(file, encoding=self._encoding) as text:
                yield dict.fromkeys(columns, text.read())
