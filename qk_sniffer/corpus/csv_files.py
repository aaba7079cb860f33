"""Reads CSV files. Each cell is the text that the file holds, and every row has the fields of the header.

A comma that is not quoted would otherwise move the rest of its row by a column.
"""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from qk_sniffer.corpus.data_files import DataFile, FormatError, open_text


class CsvReader:
    """Reads CSV files of the same options."""

    options = frozenset(
        {"sep", "header", "names", "quotechar", "escapechar", "doublequote", "skipinitialspace", "quoting", "encoding"}
    )
    typed = False
    has_schema = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        names = options.get("names")
        self._names = None if names is None else [str(name) for name in names]
        self._has_header = options.get("header", "infer") == 0 or (
            options.get("header", "infer") == "infer" and names is None
        )
        self._encoding = options.get("encoding")
        self._dialect: dict[str, Any] = {
            "delimiter": options.get("sep", ","),
            **{key: options[key] for key in self.options & set(options) - {"sep", "header", "names", "encoding"}},
        }
        if self._dialect.get("quoting") != csv.QUOTE_NONE:  # the others tell how to write, or make floats of cells
            self._dialect["quoting"] = csv.QUOTE_MINIMAL

    def kinds(self, file: DataFile, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the columns, all of text."""
        header, _ = next(self._records(file), ([], 0))
        return dict.fromkeys(header, "string")

    def count(self, file: DataFile) -> int | None:
        """Returns None: only reading tells the number of rows."""
        return None

    def read(self, file: DataFile, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on. An empty cell is None.

        Raises:
            FormatError: a row has more or fewer fields than the header, a quote is not closed, or a column is missing.
        """
        records = self._records(file)
        header, _ = next(records, (None, 0))
        if header is None:
            return
        places = {column: _place(header, column) for column in columns}
        for index, (record, line) in enumerate(records):
            if len(record) != len(header):
                raise FormatError(
                    f"Expected {len(header)} fields in line {line}, saw {len(record)}. Quote a field that holds "
                    f"{self._dialect['delimiter']!r}"
                )
            if index >= start:
                yield {column: record[place] or None for column, place in places.items()}

    def lines(self, file: DataFile) -> Iterator[int]:
        """Yields the number of the first line of each row, from 1."""
        return (line for _, line in islice(self._records(file), 1, None))

    def _records(self, file: DataFile) -> Iterator[tuple[list[str], int]]:
        """Yields the header, then every record that is not an empty line, each with the number of its first line."""
        csv.field_size_limit(sys.maxsize)  # the default is shorter than many texts
        with open_text(file, encoding=self._encoding, may_grow=True) as text:
            last = ""

            def lines() -> Iterator[str]:
                nonlocal last
                for line in text:
                    last = line
                    yield line

            reader = csv.reader(lines(), strict=True, **self._dialect)
            header = None
            while True:
                line = reader.line_num + 1
                try:
                    record = next(reader, None)
                except csv.Error as error:
                    raise FormatError(f"the record in line {line} is not CSV: {error}") from error
                if record is None:
                    return
                if not record or (reader.line_num == line and not last.strip()):
                    continue
                if header is None:
                    header = self._header(record)
                    yield header, line
                    if self._has_header:
                        continue
                yield record, line

    def _header(self, first: list[str]) -> list[str]:
        if self._names is not None:
            return self._names
        if not self._has_header:
            return [str(place) for place in range(len(first))]
        return [name or f"Unnamed: {place}" for place, name in enumerate(first)]


def _place(header: list[str], column: str) -> int:
    if header.count(column) != 1:
        many = "has no column" if column not in header else "has several columns"
        raise FormatError(f"its header {many} {column!r}; it has: {', '.join(header)}")
    return header.index(column)
