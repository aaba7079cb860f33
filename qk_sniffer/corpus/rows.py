"""Reads the rows of a source in their order, from number n on, as often as needed and with only some of their columns.

Local files are read directly, each time. No copy of them can be out of date, and the check of captured texts reads the
files themselves. Files of other formats than ours are read by the library `datasets`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

from qk_sniffer.corpus.csv_files import CsvReader
from qk_sniffer.corpus.data_files import ChangedError, DataFile, FormatError, reason
from qk_sniffer.corpus.json_files import JsonReader
from qk_sniffer.corpus.parquet_files import ParquetReader
from qk_sniffer.corpus.text_files import TextReader
from qk_sniffer.errors import SourceError


class Rows(Protocol):
    """The rows of a source. Each method raises a SourceError if a row cannot be read."""

    @property
    def typed(self) -> bool:
        """Whether values have types. False if all are text, as in CSV files."""

    @property
    def has_schema(self) -> bool:
        """Whether the types of `kinds` are those of all rows. False for JSON, where each value has its own type."""

    def kinds(self, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the names of the columns and of their types, at least of the `wanted` columns that exist.

        Without a schema, the type is that of the first values, and `unknown` for a column that is null there.
        """

    def all_kinds(self) -> Iterator[dict[str, str]]:
        """Yields the columns and types of each file."""

    def count(self, most: int | None = None) -> int:
        """Returns the number of rows, or `most` if there are more."""

    def read(self, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields these columns of the rows from number `start` on."""


@runtime_checkable
class LineReader(Protocol):
    """A reader of a format in which rows begin at lines."""

    def lines(self, file: DataFile) -> Iterator[int]:
        """Yields the number of the first line of each row, from 1."""


class Reader(Protocol):
    """Reads files of one format. Raises any error for a file that cannot be read."""

    options: frozenset[str]
    """The options of `datasets` for files of this format that the reader knows. A dataset card may set them."""
    typed: bool
    has_schema: bool

    def kinds(self, file: DataFile, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the columns of a file and their types; empty for a file without rows or header.

        Without a schema, it looks for the `wanted` columns in the whole file.
        """

    def count(self, file: DataFile) -> int | None:
        """Returns the number of rows; None if only reading tells it."""

    def read(self, file: DataFile, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields these columns of the rows from number `start` on."""


FORMATS: dict[str, type[ParquetReader | JsonReader | CsvReader | TextReader]] = {
    "parquet": ParquetReader,
    "json": JsonReader,
    "csv": CsvReader,
    "text": TextReader,
}
"""The formats that are read directly, by the names that `datasets` has for them."""


@dataclass(frozen=True)
class Part:
    """The rows `start` to `stop` of some files; all rows of them if `stop` is None."""

    files: Sequence[DataFile]
    start: int = 0
    stop: int | None = None


@dataclass
class FileRows:
    """The rows of files of one format, on this machine or on the Hub. Each iteration reads the files again."""

    where: str
    """The name of the source in errors."""
    parts: Sequence[Part]
    """One part of all rows, or parts that state their numbers of rows."""
    reader: Reader
    may_scan: bool = True
    """Whether to look for a column in all rows of all files."""
    _counts: dict[str, int] = field(default_factory=dict)

    @property
    def typed(self) -> bool:
        """Whether values have types."""
        return self.reader.typed

    @property
    def has_schema(self) -> bool:
        """Whether columns have types."""
        return self.reader.has_schema

    def kinds(self, wanted: Sequence[str]) -> dict[str, str]:
        """Returns the columns of the first file that has any.

        Looks in later files for wanted columns: for those that files without a schema lack, and for the types of those
        that are null throughout a file.
        """
        kinds: dict[str, str] = {}
        for file in (file for part in self.parts for file in part.files):
            missing = [column for column in wanted if column not in kinds] if self.may_scan else []
            with self._explaining(file):
                found = self.reader.kinds(file, missing)
            for column, kind in found.items():
                if kinds.get(column, "unknown") == "unknown":
                    kinds[column] = kind
            if kinds and not self.has_schema and set(missing) <= set(kinds):
                break
            if kinds and self.has_schema and all(kinds.get(column) != "unknown" for column in wanted):
                break
        if not kinds:
            raise no_rows(self.where)
        return kinds

    def all_kinds(self) -> Iterator[dict[str, str]]:
        """Yields the columns and types of each file that has any."""
        for file in (file for part in self.parts for file in part.files):
            with self._explaining(file):
                kinds = self.reader.kinds(file, [])
            if kinds:
                yield kinds

    def count(self, most: int | None = None) -> int:
        """Returns the number of rows. Reads files that do not state it."""
        if all(part.stop is not None for part in self.parts):
            total = sum((part.stop or 0) - part.start for part in self.parts)
        else:
            total = 0
            for file in (file for part in self.parts for file in part.files):
                if most is not None and total >= most:
                    break
                known = self._count(file)
                left = None if most is None else most - total
                total += sum(1 for _ in islice(self._read(file, [], 0), left)) if known is None else known
        return total if most is None else min(total, most)

    def read(self, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on. Skips whole files of which the number of rows is known."""
        skip = start
        for part in self.parts:
            length = None if part.stop is None else part.stop - part.start
            if length is not None and skip >= length:
                skip -= length
                continue
            rows = self._of_files(part.files, columns, part.start + skip)
            yield from islice(rows, None if length is None else length - skip)
            skip = 0

    def place(self, number: int) -> str:
        """Returns the line at which a row begins, for a message: `, line 3 of texts.jsonl`.

        Reads up to the row again. Empty for files without lines and for those on the Hub.
        """
        if not isinstance(self.reader, LineReader):
            return ""
        for part in self.parts:
            length = None if part.stop is None else part.stop - part.start
            if length is not None and number >= length:
                number -= length
                continue
            number += part.start
            for file in part.files:
                if file.is_remote:
                    return ""
                for line in self.reader.lines(file):
                    if not number:
                        of = "" if self.where == f"file {file.path}" else f" of {PurePath(file.path).name}"
                        return f", line {line}{of}"
                    number -= 1
        return ""

    def _of_files(self, files: Sequence[DataFile], columns: Sequence[str], skip: int) -> Iterator[dict[str, Any]]:
        for file in files:
            known = self._count(file) if skip else None
            if known is None:
                for row in self._read(file, columns, 0):
                    if skip:
                        skip -= 1
                    else:
                        yield row
            elif known <= skip:
                skip -= known
            else:
                yield from self._read(file, columns, skip)
                skip = 0

    def _count(self, file: DataFile) -> int | None:
        if file.path not in self._counts:
            with self._explaining(file):
                count = self.reader.count(file)
            if count is None:
                return None
            self._counts[file.path] = count
        return self._counts[file.path]

    def _read(self, file: DataFile, columns: Sequence[str], start: int) -> Iterator[dict[str, Any]]:
        number = start
        with self._explaining(file):
            for number, row in enumerate(self.reader.read(file, columns, start), start + 1):  # noqa: B007
                yield row
        self._counts[file.path] = number

    @contextmanager
    def _explaining(self, file: DataFile) -> Iterator[None]:
        """Turns an error into one that names the file. Refuses a file that changes between or during two readings."""
        try:
            yield
        except ChangedError:
            raise SourceError(
                f"{self.where}: file {file.path} was changed while the job read it: rerun the command, which keeps "
                "what was captured before"
            ) from None
        except (FormatError, UnicodeDecodeError) as error:
            raise self._failed(file, error) from None
        except Exception as error:
            raise self._failed(file, error) from error

    def _failed(self, file: DataFile, error: Exception) -> SourceError:
        name = self.where if self.where == f"file {file.path}" else f"{self.where}: file {file.path}"
        return SourceError(f"{name} cannot be read: {reason(error)}")


class LibraryRows:
    """The rows of a `datasets.Dataset`, or of an `IterableDataset`."""

    typed = True
    has_schema = True

    def __init__(self, where: str, rows: Any, failed: Callable[[Exception], SourceError] | None = None) -> None:
        """`failed` makes the error for one of the library."""
        self._where = where
        self._rows = rows
        self._failed = failed or (lambda error: SourceError(f"{where} cannot be read: {reason(error)}"))

    def kinds(self, wanted: Sequence[str]) -> dict[str, str]:
        """Returns all columns; those of the first row of a stream without types."""
        if self._rows.features is not None:
            features = self._rows.features.items()
            return {column: getattr(feature, "dtype", None) or type(feature).__name__ for column, feature in features}
        first = next(self._iterated(self._rows), None)
        if first is None:
            raise no_rows(self._where)
        names = {str: "string", type(None): "unknown"}
        return {column: names.get(type(value), type(value).__name__) for column, value in first.items()}

    def all_kinds(self) -> Iterator[dict[str, str]]:
        """Yields the columns and types of all rows."""
        yield self.kinds([])

    def count(self, most: int | None = None) -> int:
        """Returns the number of rows of a `Dataset`."""
        return len(self._rows) if most is None else min(len(self._rows), most)

    def read(self, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on.

        Raises:
            SourceError: a column has images or the like, which the library would open, from any path or address.
        """
        for column in columns:
            if (kind := _opened_kind((self._rows.features or {}).get(column))) is not None:
                raise SourceError(
                    f"{self._where}: column {column!r} holds values of the type {kind}, which are read from files. "
                    "Only texts, numbers, lists and mappings of them can be captured: choose a column without them"
                )
        rows = self._rows.select_columns(list(columns))
        if hasattr(rows, "select"):
            rows = rows.select(range(start, len(rows)))
            start = 0
        return islice(self._iterated(rows), start, None)

    def _iterated(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except Exception as error:
            raise self._failed(error) from error


def _opened_kind(feature: Any) -> str | None:
    """Returns the type of values in a column of the library `datasets` that it opens as files; None without any.

    These are features that are decoded, such as images and sounds, except JSON.
    """
    if isinstance(feature, dict | list):
        inner = [*(feature.values() if isinstance(feature, dict) else feature)]
    else:
        if hasattr(feature, "decode_example") and type(feature).__name__ != "Json":
            return type(feature).__name__
        inner = [getattr(feature, "feature", None)] if hasattr(feature, "feature") else []
    return next((kind for each in inner if (kind := _opened_kind(each)) is not None), None)


class ListRows:
    """Rows in memory."""

    typed = True
    has_schema = True

    def __init__(self, rows: Sequence[dict[str, str]]) -> None:
        self._rows = rows

    def kinds(self, wanted: Sequence[str]) -> dict[str, str]:
        """Returns all columns, which are of text."""
        return dict.fromkeys(self._rows[0], "string")

    def all_kinds(self) -> Iterator[dict[str, str]]:
        """Yields the columns and types of all rows."""
        yield self.kinds([])

    def count(self, most: int | None = None) -> int:
        """Returns the number of rows."""
        return len(self._rows[:most])

    def read(self, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the rows from number `start` on."""
        return ({column: row[column] for column in columns} for row in self._rows[start:])


def no_rows(where: str) -> SourceError:
    """Returns the error for a source without rows."""
    return SourceError(f"{where} cannot be read: it has no examples")
