"""Collects the examples of a compaction, from the journals and the previous version, and writes their list."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from qk_sniffer.errors import StoreError
from qk_sniffer.store.compaction_plan import WAY_OUT
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.parquet_writer import ParquetWriter
from qk_sniffer.store.previous import PreviousVersion
from qk_sniffer.store.rows import index_of

EXAMPLES_PER_GROUP = 1 << 16


def added_examples(journals: Sequence[Journal], old: Sequence[ExampleRecord]) -> list[ExampleRecord]:
    """Returns the examples of all journals, in the order of the source, with their numbers in the dataset.

    `old` are those of the previous version.

    Raises:
        StoreError: two journals have the same example, or an example is among the old ones or comes before them.
    """
    new = numbered(_merged(journals), sum(record.part > 0 for record in old))
    _check_apart(old, new)
    return new


def numbered(records: Sequence[ExampleRecord], before: int) -> list[ExampleRecord]:
    """Returns `records`, which are in the order of the source, with an `example_id` for each part of a text.

    The first part keeps the number of the text. The others get -1, -2, and so on, in the order of the source; `before`
    of them are used already. No text has a negative number. The numbers follow from the texts and their order alone,
    and stay when texts are added at the end.
    """
    found = []
    for record in records:
        before += record.part > 0
        found.append(replace(record, example_id=-before) if record.part else record)
    return found


def _merged(journals: Sequence[Journal]) -> list[ExampleRecord]:
    found: dict[int, ExampleRecord] = {}
    for journal in journals:
        if twice := found.keys() & journal.records.keys():
            some = sorted({*map(index_of, twice)})[:5]
            raise StoreError(f"examples {some} are in {journal.folder} and in another shard's journal; {WAY_OUT}")
        found |= journal.records
    return [found[key] for key in sorted(found)]


def truncated_tokens(previous: PreviousVersion | None, added: Sequence[ExampleRecord]) -> int | None:
    """Returns the tokens that were cut off, of all examples; None if those of some are not counted."""
    before: int | None = 0
    if previous is not None and previous.manifest["truncated_examples"]:
        before = previous.manifest.get("truncated_tokens", None)
    if before is None or any(record.truncated and not record.left_out for record in added):
        return None
    return before + sum(record.left_out for record in added)


def own_special_tokens(previous: PreviousVersion | None, added: Sequence[ExampleRecord]) -> dict[str, int]:
    """Returns the examples whose text has special tokens of its own "before" and "after"."""
    before = {} if previous is None else previous.manifest.get("own_special_tokens", {})
    return {
        "before": before.get("before", 0) + sum(record.begins_special for record in added),
        "after": before.get("after", 0) + sum(record.ends_special for record in added),
    }


def _check_apart(old: Sequence[ExampleRecord], new: Sequence[ExampleRecord]) -> None:
    """Checks that the new examples come after the old ones and have other ids."""
    ids = {record.example_id for record in old}
    last = max((record.index for record in old), default=-1)
    for record in new:
        if record.index <= last or record.example_id in ids:
            raise StoreError(
                f"example {record.index} (example_id {record.example_id}) is in the finished dataset already, or comes "
                f"before the dataset's last example: it cannot be added; {WAY_OUT}"
            )


def write_examples(
    staging: Layout, records: Sequence[ExampleRecord], access: Access, described: pa.Schema
) -> FileEntry:
    """Stages the list of examples with the columns of `described`, an `examples_schema`."""
    with ParquetWriter(staging.examples, described, access) as output:
        for start in range(0, len(records), EXAMPLES_PER_GROUP):
            part = records[start : start + EXAMPLES_PER_GROUP]
            columns = [[getattr(record, name) for record in part] for name in described.names]
            output.write(pa.table(columns, schema=described))
    assert output.entry is not None
    return output.entry
