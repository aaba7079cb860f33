"""Turns the rows of a source into examples: selects the rows, keeps their order and assigns their ids.

The `index` of an example is the index of its source row. It defines the order of all later steps. The `example_id`
of an example is in all of its rows, and the sampler hashes it. Two examples therefore never share an `example_id`:
see `ids.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.columns import content_columns
from qk_sniffer.corpus.contents import Content, ContentError
from qk_sniffer.corpus.ids import (
    RepeatedIdError,
    StreamedIds,
    identity,
    moved_numbers,
    preferred_number,
    repeated_places,
)
from qk_sniffer.corpus.rows import FileRows, no_rows
from qk_sniffer.corpus.sources import Source, open_source
from qk_sniffer.corpus.values import Filter, id_of
from qk_sniffer.errors import ColumnError, SourceError
from qk_sniffer.logs import logger

log = logger(__name__)

_SHOWN_ROWS = 1_000
"""The rows of which an error shows values."""


MOST_ID = 10_000
"""The most characters of an id. Every example of the dataset lists its id."""


@dataclass(frozen=True)
class Example:
    """One content, before it is tokens."""

    index: int
    """The index of the source row, from 0. Unused rows count."""
    example_id: int
    """Fits int32."""
    source_id: str
    """The id of the source row as text; the index if `dataset.id_column` is null."""
    content: Content


def open_corpus(config: DatasetConfig, commit: str | None = None) -> "Corpus":
    """Opens the source, and checks everything that can be checked before the first text is read.

    Args:
        commit: the commit of a Hub dataset that an earlier start of the job pinned; None pins `config.revision` now.

    Raises:
        SourceError: the source is not found or cannot be read, a column is missing or of the wrong type, no row is
            left, or an id is null or belongs to two rows. When streaming, the iteration finds the last two.
    """
    return Corpus(config, open_source(config, commit))


class Corpus:
    """The examples of one source, in the order of its rows.

    The used rows are the first `dataset.max_samples` rows that pass `dataset.filter`. A used row gives no example if
    its content is null or empty, or a text of only white space.
    """

    def __init__(self, config: DatasetConfig, source: Source) -> None:
        self._config = config
        self._source = source
        self._skipped = 0
        self._last_index = -1
        id_column = [config.id_column] if config.id_column is not None else []
        self._content = content_columns(config, has_schema=source.rows.has_schema)
        self._columns = sorted({*self._content.columns, *id_column, *config.filter})
        self._kinds = source.rows.kinds(self._columns)
        self._check_columns()
        self._used: Sequence[int] | None = None
        self._moved: dict[int, int] = {}
        """The example_ids of the rows whose preferred number another example has, by index."""
        if not config.streaming:
            self._used = self._rows_used()
            if config.id_column is not None:
                self._moved = self._moved_ids(self._used, config.id_column)

    @property
    def commit(self) -> str | None:
        """The commit of a Hub dataset; None for other sources."""
        return self._source.commit

    @property
    def num_rows(self) -> int | None:
        """The number of used rows of all shards, with and without content; None when streaming."""
        return None if self._used is None else len(self._used)

    @property
    def last_index(self) -> int:
        """The index of the last used row that the latest iteration has passed so far; -1 before the first."""
        return self._last_index

    @property
    def skipped(self) -> int:
        """The number of the shard's rows without content that the latest iteration has passed so far."""
        return self._skipped

    def examples(self, *, shard_index: int = 0, shard_count: int = 1, after: int = 0) -> Iterator[Example]:
        """Yields the examples with `index % shard_count == shard_index`, in source order.

        Every iteration yields the same examples. A restarted job therefore cuts the same windows and batches.

        Args:
            after: the number of used rows, of all shards, to skip at the start.

        Raises:
            SourceError: a row cannot be read; no row of any shard has content; an id is wrong, as for `open_corpus`.
                When streaming, the error names the setting that keeps the examples before that row.
        """
        self._skipped = 0
        self._last_index = -1
        streamed = StreamedIds()
        any_content = False
        sound = 0
        try:
            for place, index, row in self._read(shard_index, shard_count, after):
                sound = place
                mine = index % shard_count == shard_index and place >= after
                content = self._content_of(index, row)
                if content is not None:
                    any_content = True
                    example_id, source_id = self._ids(index, row, streamed)
                    if len(str(source_id)) > MOST_ID:
                        raise SourceError(
                            f"{self._source.name}: the id of example {index} has {len(str(source_id)):,} characters, "
                            f"more than {MOST_ID:,}: is dataset.id_column={self._config.id_column} its text? "
                            "dataset.id_column=null numbers the examples"
                        )
                    if mine:
                        yield Example(index, example_id, str(source_id), content)
                else:
                    self._skipped += mine
                sound = place + 1
                self._last_index = index
        except SourceError as error:
            if self._used is None and sound:
                # An error of the library that reads the source has a cause, unlike those of this module.
                lost = self.commit is not None and error.__cause__ is not None
                again = "If the connection was lost, rerun the same command. " if lost else ""
                raise SourceError(f"{str(error).rstrip('.')}. {again}{_way_out(sound)}") from error
            raise
        if not any_content and not after and not self._any_content():
            raise SourceError(
                f"{self._source.name}: no example has {self._content.noun} in column {self._content.column!r}"
            )

    def uses(self, index: int) -> bool:
        """Whether row `index` of a stream is not after its used rows. With a filter, this reads the rows up to it.

        Raises:
            SourceError: a row cannot be read.
        """
        most = self._config.max_samples
        if most is None or not self._config.filter:
            return most is None or index < most
        return any(each >= index for _, each, _ in self._read(0, 1, 0))

    def _read(self, shard_index: int, shard_count: int, after: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yields used rows with their number among the used rows and their index: those of the shard and `after`, or
        all of them when streaming."""
        if self._used is not None:
            for place, (index, row) in enumerate(self._rows_at(self._used, self._columns, after), after):
                if index % shard_count == shard_index:
                    yield place, index, row
            return
        used = 0
        filter = self._filter()
        for index, row in enumerate(self._source.rows.read(self._columns)):
            if filter.accepts(row):
                yield used, index, row
                used += 1
                if used == self._config.max_samples:
                    return
        if not used:
            raise self._no_rows(filter)

    def _rows_at(
        self, indices: Sequence[int], columns: Sequence[str], after: int = 0
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the rows of `indices`, which ascend, without the first `after` of them. Reads the source once.

        Raises:
            SourceError: the source has lost rows since it was opened.
        """
        wanted = iter(indices[after:])
        index = next(wanted, None)
        if index is None:
            return
        for number, row in enumerate(self._source.rows.read(columns, index), index):
            if number == index:
                yield index, row
                index = next(wanted, None)
                if index is None:
                    return
        raise SourceError(
            f"{self._source.name} has no example {index} any more: it was changed while the job read it. Rerun the "
            "command, which keeps what was captured before"
        )

    def _rows_used(self) -> Sequence[int]:
        rows, most, filter = self._source.rows, self._config.max_samples, self._filter()
        if self._config.filter:
            columns: list[str] = [*self._config.filter, *([] if rows.has_schema else self._content.columns)]
            used: Sequence[int] = list(islice(self._checked(columns, filter), most))
        elif rows.has_schema:
            used = range(rows.count(most))
        else:
            used = range(sum(1 for _ in islice(self._checked(self._content.columns, filter), most)))
        if not used:
            raise self._no_rows(filter)
        return used

    def _checked(self, columns: Sequence[str], filter: Filter) -> Iterator[int]:
        """Yields the indices of the rows that pass the filter. Checks contents, of whose type no schema tells."""
        for index, row in enumerate(self._source.rows.read(columns)):
            if filter.accepts(row):
                if row.keys() >= {*self._content.columns}:
                    self._content_of(index, row)
                yield index

    def _filter(self) -> Filter:
        filter = Filter(self._config.filter, self._kinds, typed=self._source.rows.typed)
        rows = self._source.rows
        if rows.has_schema and filter.is_impossible(self._kinds) and all(map(filter.is_impossible, rows.all_kinds())):
            for row in islice(rows.read([*self._config.filter]), _SHOWN_ROWS):
                filter.accepts(row)
            raise self._no_rows(filter)
        return filter

    def _moved_ids(self, used: Sequence[int], id_column: str) -> dict[int, int]:
        """Reads the ids of all rows, and the contents of only the rows whose numbers other rows may claim too.

        Raises:
            SourceError: an example has no id, or the id of another example.
        """
        preferred = np.zeros(len(used), np.int32)
        places = []
        typed = self._source.rows.typed
        for place, (_, row) in enumerate(self._rows_at(used, [id_column])):
            source_id = id_of(row[id_column], typed=typed)
            if source_id is None:
                places.append(place)
            else:
                preferred[place] = preferred_number(source_id)

        def id_of_row(index: int, row: dict[str, Any]) -> tuple[bool, str] | None:
            return None if self._content_of(index, row) is None else identity(self._source_id(index, row))

        # One pass over the source reads nearly all rows that `moved_numbers` asks for.
        known: dict[int, tuple[bool, str] | None] = {}
        likely = sorted({*places, *repeated_places(preferred)})
        for place, (index, row) in zip(
            likely, self._rows_at([used[each] for each in likely], self._columns), strict=True
        ):
            known[place] = id_of_row(index, row)

        def id_at(place: int) -> tuple[bool, str] | None:
            if place not in known:
                known[place] = id_of_row(*next(self._rows_at([used[place]], self._columns)))
            return known[place]

        try:
            moved = moved_numbers(preferred, id_at, places)
        except RepeatedIdError as error:
            _, text = id_at(error.second) or (False, "")
            raise self._repeated(used[error.first], used[error.second], text) from None
        return {used[place]: number for place, number in moved.items()}

    def _ids(self, index: int, row: dict[str, Any], streamed: StreamedIds) -> tuple[int, Any]:
        """Returns the example_id and the id of a row with content. `streamed` has those of earlier rows of a stream."""
        source_id = self._source_id(index, row)
        if self._used is not None or self._config.id_column is None:
            return self._moved.get(index, preferred_number(source_id)), source_id
        try:
            return streamed.add(index, source_id), source_id
        except RepeatedIdError as error:
            raise self._repeated(error.first, index, source_id) from None

    def _source_id(self, index: int, row: dict[str, Any]) -> Any:
        if self._config.id_column is None:
            return index
        source_id = id_of(row[self._config.id_column], typed=self._source.rows.typed)
        if source_id is None:
            raise SourceError(
                f"{self._source.name}{self._place(index)}: example {index} has no id (column "
                f"{self._config.id_column!r} is null there). Use another dataset.id_column, or "
                "the example's number as the id: dataset.id_column=null"
            )
        return source_id

    def _repeated(self, first: int, second: int, source_id: Any) -> SourceError:
        return SourceError(
            f"{self._source.name}, column {self._config.id_column!r}: examples {first} and {second} have the same id "
            f"{str(source_id)!r}. Their sampled rows could not be told apart. Use the example's number as the id: "
            "dataset.id_column=null"
        )

    def _content_of(self, index: int, row: dict[str, Any]) -> Content | None:
        try:
            return self._content.read(row)
        except ContentError as error:
            raise SourceError(f"{self._source.name}{self._place(index)}: example {index} {error}") from None

    def _place(self, index: int) -> str:
        return self._source.rows.place(index) if isinstance(self._source.rows, FileRows) else ""

    def _any_content(self) -> bool:
        rows = self._rows_at(self._used or (), self._content.columns)
        return any(self._content_of(index, row) is not None for index, row in rows)

    def _check_columns(self) -> None:
        config, types = self._config, self._kinds
        has = f"It has: {', '.join(f'{column} ({kind})' for column, kind in types.items())}"
        content = self._content
        wanted = {content.setting: content.column, "dataset.segments_column": config.segments_column}
        wanted |= {"dataset.id_column": config.id_column}
        wanted |= {f"dataset.filter.{column}": column for column in config.filter}
        # A stream without types is not read to its end for a column.
        may_come = config.streaming and not self._source.rows.has_schema
        start = " in its first examples, the only ones that dataset.streaming=true looks at" if may_come else ""
        for key, column in wanted.items():
            if column is None or column in types:
                continue
            if may_come and config.filter.get(column) is not None:
                log.warning(
                    "%s has no column %r in its first examples: those without it do not pass %s=%s. %s",
                    *(self._source.name, column, key, config.filter[column], has),
                )
                types[column] = "unknown"
                continue
            raise ColumnError(
                f"{self._source.name} has no column {column!r}{start}. Set {key} to one that it has. {has}"
            )
        if not content.accepts(kind := types[content.column]):
            raise ColumnError(
                f"{self._source.name}: column {content.column!r} holds {kind}, not {content.noun}. Set "
                f"{content.setting} to a column of {content.expected}. {has}"
            )

    def _no_rows(self, filter: Filter) -> SourceError:
        if not self._config.filter:
            return no_rows(self._source.name)
        return SourceError(
            f"{self._source.name} has no examples that pass dataset.filter={self._config.filter}: {filter.explain()}"
        )


def _way_out(sound: int) -> str:
    examples = "example" if sound == 1 else f"{sound} examples"
    return (
        f"To make the dataset of the {examples} before it, which keeps the captured examples, rerun the command with "
        f"dataset.max_samples={sound}"
    )
