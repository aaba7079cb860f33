"""Verifies the attention summaries of a dataset: their rows are those of the queries, and their numbers are possible.

The attention itself is not computed again: that takes every key.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.dataset.attention_summary import AttentionSummary
from qk_sniffer.dataset.verify_manifest import ManifestFacts
from qk_sniffer.dataset.verify_report import Problem, Report, named
from qk_sniffer.dataset.verify_rows import batches, metadata_problems, schema_problems, unreadable
from qk_sniffer.store.attention_table import NO_KEY, AttentionTable
from qk_sniffer.store.layout import KEY_COLUMNS, Head, head_file
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.parquet_files import open_parquet
from qk_sniffer.store.parquet_tables import UNREADABLE, excess
from qk_sniffer.text import counted

TOLERANCE = 1e-3
"""The rounding of sums of float32, relative to numbers of about 1."""

BATCH_BYTES = 1 << 22
"""The size of a batch of rows, as records of the journal."""

Bools = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Each = Callable[[Callable[[Head], "_Result"], Sequence[Head]], Iterator["_Result"]]


@dataclass
class _Result:
    """The result of checking a file of attention summaries."""

    problems: list[Problem] = field(default_factory=list)
    nonfinite: int = 0


def check_attention(
    facts: ManifestFacts, intact: Collection[str], whole: Collection[str], report: Report, each: Each
) -> None:
    """Checks the attention summaries of a dataset that has any, and adds the result to `report`.

    Args:
        facts: of the manifest.
        intact: the names of the files with the listed size and sha256.
        whole: the names of the heads' files that have exactly the rows that the sampler chooses.
        report: the report.
        each: runs a check of each of several heads in threads.
    """
    table = AttentionTable.of(facts.config)
    if table is None:
        return
    heads = [
        head
        for name, head in facts.attention.items()
        if name in intact and head_file(head.layer, head.head, "q") in whole
    ]
    checks = list(each(lambda head: _check_file(facts.root, head, table, facts.files[head.file]), heads))
    for head, result in zip(heads, checks, strict=True):
        report.add(result.problems)
        listed = (facts.nonfinite_rows or {}).get(head.file, 0)
        if not result.problems and result.nonfinite != listed:
            what = "the number of rows with NaN or Inf differs from manifest.json"
            report.add([Problem.of(head, "attention", what, f"{result.nonfinite:,} instead of {listed:,}")])
    if len(heads) < len(facts.attention):
        left_out = counted(len(facts.attention) - len(heads), "file")
        report.skipped("attention", f"{left_out} not checked: damaged, or the rows of the queries are")
    nonfinite = [head.key for head, result in zip(heads, checks, strict=True) if result.nonfinite]
    if nonfinite:
        rows = counted(sum(result.nonfinite for result in checks), "row")
        report.note("attention", f"{rows} with NaN or Inf in {named(nonfinite, ())}")
    what = "the rows are those of the queries, and their numbers are possible"
    report.passed("attention", f"{counted(len(heads), 'file')}: {what}")


def _check_file(root: Path, head: Head, table: AttentionTable, entry: FileEntry) -> _Result:
    result = _Result()
    try:
        with (
            open_parquet(root / head.file) as file,
            open_parquet(root / head_file(head.layer, head.head, "q")) as queries,
        ):
            result.problems += schema_problems(head, table.schema, file.schema_arrow)
            result.problems += metadata_problems(head, file.schema_arrow)
            if not result.problems and (problem := excess(root / head.file, file, table.schema, at_once=False)):
                result.problems.append(Problem.of(head, "parquet", "cannot be read as Parquet", problem))
            if result.problems:
                return result
            if file.metadata.num_rows != entry.rows or file.metadata.num_rows != queries.metadata.num_rows:
                numbers = f"{file.metadata.num_rows:,}, and the queries have {queries.metadata.num_rows:,}"
                result.problems.append(Problem.of(head, "attention", "has another number of rows", numbers))
                return result
            batch_rows = max(1, BATCH_BYTES // (4 * table.width))
            keys = _Rows(batches(queries, batch_rows, list(KEY_COLUMNS)))
            rules = _Rules(head)
            row = 0
            for batch in batches(file, batch_rows, table.schema.names):
                rules.check(row, batch, keys.take(batch.num_rows))
                row += batch.num_rows
            result.problems += rules.problems()
            result.nonfinite = rules.nonfinite
    except UNREADABLE as error:
        result.problems.append(unreadable(head, error))
    return result


class _Rows:
    """The rows of a file, which other files with other row groups are compared with."""

    def __init__(self, found: Iterator[pa.RecordBatch]) -> None:
        self._batches = found
        self._pending: list[pa.RecordBatch] = []

    def take(self, count: int) -> pa.Table:
        """Returns the next `count` rows."""
        while sum(batch.num_rows for batch in self._pending) < count:
            self._pending.append(next(self._batches))
        rows = pa.Table.from_batches(self._pending)
        self._pending = rows.slice(count).to_batches()
        return rows.slice(0, count)


class _Rules:
    """The rules that the rows of a head keep, and the rows that break them."""

    def __init__(self, head: Head) -> None:
        self.nonfinite = 0
        self._head = head
        self._wrong: dict[str, tuple[int, str]] = {}

    def problems(self) -> Iterator[Problem]:
        for what, (rows, instance) in self._wrong.items():
            yield Problem.of(self._head, "attention", what, instance, rows)

    def check(self, start: int, batch: pa.RecordBatch, keys: pa.Table) -> None:
        """Checks a batch of rows from row `start` on. `keys` are the columns that name the rows of the queries."""
        summary = AttentionSummary.of(pa.table(batch))
        other = [np.asarray(batch[name]) != keys[name].to_numpy() for name in KEY_COLUMNS]
        self._note(start, "its rows are not those of the queries", np.any(other, axis=0))
        floats = [values for values in vars(summary).values() if values.dtype == np.float32]
        is_finite = np.all([np.isfinite(values.reshape(len(values), -1)).all(axis=1) for values in floats], axis=0)
        self.nonfinite += int((~is_finite).sum())
        for what, wrong in _impossible(self._head, summary):
            self._note(start, what, wrong & is_finite)

    def _note(self, start: int, what: str, wrong: Bools) -> None:
        if wrong.any():
            rows, first = self._wrong.get(what, (0, f"row {start + int(np.argmax(wrong))}"))
            self._wrong[what] = rows + int(wrong.sum()), first


def _impossible(head: Head, summary: AttentionSummary) -> Iterator[tuple[str, Bools]]:
    """Yields what is impossible, with the rows (rows,) in which it is so."""
    position, found = summary.positions.astype(np.int64), summary.num_keys.astype(np.int64)
    first = _first_keys(head, position)
    most = position - first + 1
    is_wrong = (found < 1) | (found > most) if head.sparse_attention else found != most
    yield "num_keys is not the number of keys that a query at this position sees", is_wrong
    mass = summary.distance_mass.sum(axis=1, dtype=np.float64)
    sinks = summary.sink_weight
    masses = np.column_stack([summary.distance_mass, sinks, summary.first_mass, summary.top_weight])
    is_wrong = (np.abs(mass + sinks - 1) > TOLERANCE) | (masses < 0).any(axis=1)
    is_wrong |= (summary.first_mass > mass + TOLERANCE) | (summary.top_weight.sum(axis=1) > mass + TOLERANCE)
    yield "the weights do not sum to 1 with that of the learned sink", is_wrong
    beyond = summary.bin_edges[:-1] >= most[:, None]
    is_wrong = np.asarray(((summary.distance_mass > 0) & beyond).any(axis=1))
    yield "keys have a weight at distances that the query does not see", is_wrong
    count = np.maximum(found, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mass = np.where(mass > 0, np.log(mass), 0.0)
        effective = summary.effective_keys * mass**2  # 1 to the number of keys
    entropy = summary.entropy
    is_wrong = (entropy < -TOLERANCE) | (entropy > mass * (np.log(count) - log_mass) + TOLERANCE)
    yield "the entropy is not possible for this number of keys", is_wrong
    is_wrong = (effective < 1 - TOLERANCE) | (effective > count * (1 + TOLERANCE))
    yield "effective_keys is not possible for this number of keys", is_wrong & (mass > TOLERANCE)
    largest = np.exp(np.minimum(summary.max_logit - summary.logsumexp, 1.0), dtype=np.float64)
    is_wrong = (largest > 1 + TOLERANCE) | (np.abs(largest - summary.top_weight[:, 0]) > TOLERANCE)
    yield "max_logit, logsumexp and the largest weight do not belong together", is_wrong
    is_wrong = _wrong_list(summary, first, position, found)
    yield "top_position and top_weight are not those of the largest weights", is_wrong


def _first_keys(head: Head, position: Int64) -> Int64:
    """Returns the first position that each query sees, before any selection by content."""
    first = np.zeros_like(position)
    if head.sliding_window is not None:
        first = np.maximum(first, position - head.sliding_window + 1)
    if head.attention_chunk is not None:
        first = np.maximum(first, position - position % head.attention_chunk)
    return first


def _wrong_list(summary: AttentionSummary, first: Int64, position: Int64, num_keys: Int64) -> Bools:
    """Returns the rows (rows,) whose list of keys is not one of distinct visible keys, by descending weight."""
    places, weights = summary.top_position.astype(np.int64), summary.top_weight
    listed = np.arange(places.shape[1]) < num_keys[:, None]
    is_inside = (places >= first[:, None]) & (places <= position[:, None])
    wrong = (listed & ~is_inside) | (~listed & ((places != NO_KEY) | (weights != 0)))
    ordered = np.sort(np.where(listed, places, -1 - np.arange(places.shape[1])), axis=1)
    repeated = (np.diff(ordered, axis=1) == 0).any(axis=1)
    descends = (np.diff(weights, axis=1) <= 0).all(axis=1)
    return np.asarray(wrong.any(axis=1) | repeated | ~descends)
