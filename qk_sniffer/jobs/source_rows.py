"""Counts the source rows of a job, and changes the number for an unfinished job that reads a stream."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.corpus.examples import Corpus
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.shards import journals_of
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.store.disk import remove
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import hold
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.record import read_record, write_record
from qk_sniffer.store.rows import index_of

log = logger(__name__)

START_PATIENCE_S = 60.0
"""How long to wait for the start of another shard."""

FINALIZE_PATIENCE_S = 5.0
"""How long to wait for the finalize lock: longer than a shard holds it that only checks which shards are missing."""


def source_rows(config: ResolvedConfig, corpus: Corpus) -> int | None:
    """The number of source rows of the job; None if it is not known before they are read."""
    return config.dataset.max_samples if corpus.num_rows is None else corpus.num_rows


def shard_rows(config: ResolvedConfig, corpus: Corpus, before: int) -> int | None:
    """The number of source rows that a shard captures, after the first `before` ones; None if it is not known."""
    wanted, shard = source_rows(config, corpus), config.shard
    if wanted is None:
        return None
    return len(range(before + (shard.index - before) % shard.count, wanted, shard.count))


def changes_limit(config: ResolvedConfig, rows: int | None, record: Mapping[str, Any]) -> bool:
    """Whether the unfinished job of `record` reads a stream, and has another `dataset.max_samples`."""
    both_stream = config.dataset.streaming and record["config"]["dataset"]["streaming"]
    return both_stream and rows != record["source_rows"]


def limit_problem(layout: Layout, rows: int | None, record: Mapping[str, Any], corpus: Corpus) -> str | None:
    """Returns why the unfinished job of a stream cannot have `rows` as its `dataset.max_samples`; None if it can."""
    way_out = (
        "Raise dataset.max_samples, give this job another folder (output.data_root=...), or replace the work with "
        "output.overwrite=true"
    )
    before = 0 if record["base"] is None else record["base"]["source_rows"]
    if rows is not None and rows < before:
        return f"{layout.root} adds to a dataset of {before} examples, and dataset.max_samples is {rows}. {way_out}"
    last = index_of(max(max(journal.records, default=-1) for journal in journals_of(layout, record)))
    if corpus.uses(last):
        return None
    return (
        f"{layout.root} holds an unfinished job that has captured example {last} of the dataset, which is after those "
        f"of dataset.max_samples={rows}. {way_out}"
    )


def change_limit(config: ResolvedConfig, layout: Layout, corpus: Corpus, *, access: Access = PLAIN) -> None:
    """Gives the unfinished job of a stream another `dataset.max_samples`, if the config has another one.

    All shards read the whole stream, so no shard is captured any more: each counts its examples again. Does nothing if
    another shard has made the change.

    Raises:
        StoreError: the job has captured examples after the new limit, or its dataset is being made.
    """
    rows, record = source_rows(config, corpus), read_record(layout, access)
    if record is None or not changes_limit(config, rows, record):
        return
    access.check()
    change = "changing dataset.max_samples"
    with (
        hold(layout.start_lock, change, wait_s=START_PATIENCE_S, access=access),
        hold(layout.finalize_lock, change, wait_s=FINALIZE_PATIENCE_S, access=access),
    ):
        record = read_record(layout, access)
        if record is None or not changes_limit(config, rows, record):
            return
        if problem := limit_problem(layout, rows, record, corpus):
            raise StoreError(problem)
        log.info("dataset.max_samples of the unfinished job changes from %s to %s", record["source_rows"], rows)
        count = record["config"]["shard"]["count"]
        for index in range(count):
            remove(layout.shard_done(index, count), access)
        settings = record["config"] | {"dataset": record["config"]["dataset"] | {"max_samples": rows}}
        write_record(layout, record | {"config": settings, "source_rows": rows}, access=access)


def check_limit(layout: Layout, rows: int | None, access: Access) -> None:
    """Checks that the job's `dataset.max_samples` is still `rows`. Hold the start lock.

    Raises:
        StoreError: another start of the job has changed it.
    """
    record = read_record(layout, access)
    if record is not None and record["source_rows"] != rows:
        wanted = "null" if record["source_rows"] is None else record["source_rows"]
        raise StoreError(
            f"another start of the job in {layout.root} has changed dataset.max_samples while this shard ran. Its "
            f"examples are kept: rerun the command with dataset.max_samples={wanted}"
        )
