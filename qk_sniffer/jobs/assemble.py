"""Makes a dataset from the journals of all shards, up to the staging folder; `finish.py` proves and promotes it.

The job's record and its journals hold everything needed. Any shard can therefore make it, and so can `finalize` later.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import ShardConfig, from_dict
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.dataset.heads import captured_heads
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.jobs.start import START_PATIENCE_S, base_of, check_limit
from qk_sniffer.logs import logger
from qk_sniffer.machine import num_threads
from qk_sniffer.resolved import batching_of, public_values
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.compact import compact
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.journal import Batching, ExampleRecord, Journal
from qk_sniffer.store.layout import KINDS, Head, Layout
from qk_sniffer.store.locks import InUseError, hold
from qk_sniffer.store.manifest import Written
from qk_sniffer.store.promote import finish_promotion
from qk_sniffer.store.record import read_record

log = logger(__name__)

PATIENCE_S = 5.0
"""How long to wait for the lock: longer than a shard holds it that only checks which shards are missing."""


@dataclass(frozen=True)
class Staged:
    """A dataset in the staging folder, complete except for proof, card and manifest."""

    layout: Layout
    """The staging folder's."""
    heads: Sequence[Head]
    examples: Sequence[ExampleRecord]
    facts: Mapping[str, Any]
    """The manifest's, from the job."""
    written: Written

    def manifest(self, proof: Mapping[str, Any], *, timings: Mapping[str, float]) -> dict[str, Any]:
        """The manifest of the dataset, with its `proof`. `timings` are seconds by stage."""
        return manifests.build({**self.facts, "proof": proof}, self.written, timings=timings)


@contextmanager
def captured_job(layout: Layout) -> Iterator[dict[str, Any] | None]:
    """Holds the finalize lock, and yields the record of the job if all of its shards are captured.

    Yields None if a shard is missing, if another process holds the lock, or if the dataset exists already; the log
    says which.

    Raises:
        InUseError: another process makes the dataset of a job that has no shards.
    """
    with ExitStack() as finalizing:
        yield _record_of_captured_job(layout, finalizing)


def _record_of_captured_job(layout: Layout, finalizing: ExitStack) -> dict[str, Any] | None:
    try:
        finalizing.enter_context(hold(layout.finalize_lock, "making the dataset", wait_s=PATIENCE_S))
    except InUseError:
        record = read_record(layout)
        if record is not None and record["config"]["shard"]["count"] == 1:
            raise
        log.info("another process is making the dataset; if it fails, rerun any of the shards")
        return None
    record = read_record(layout)
    if record is None:
        log.info("another shard has made the dataset")
        return None
    count = record["config"]["shard"]["count"]
    missing = [index for index in range(count) if not layout.shard_done(index, count).exists()]
    if missing:
        log.info("shard done; the dataset is made when shards %s of %d are done too", missing, count)
        return None
    return record


def stage(layout: Layout, record: Mapping[str, Any]) -> Staged:
    """Writes the Parquet files of the dataset of a captured job to the staging folder. Hold the finalize lock.

    Raises:
        StoreError: a journal is damaged, the source has changed, or the disk failed; may be called again.
        SourceError: no text of the dataset has a token.
    """
    log.info("writing the Parquet files")
    config = from_dict(record["config"])
    sampler = Sampler(config.sampler)
    heads = captured_heads(record)
    commits = record["commits"]
    token_string = None
    if config.capture.capture_token_strings:
        token_string = load_tokenizer(config.model, hub_commit_of(commits["tokenizer"])).token_strings
    count = config.shard.count
    journals = [Journal(layout.journal(index, count), verify=False) for index in range(count)]
    done = [json.loads(layout.shard_done(index, count).read_bytes()) for index in range(count)]
    for index, (journal, facts) in enumerate(zip(journals, done, strict=True)):
        if len(journal.records) != facts["examples"]:
            raise StoreError(
                f"the journal {journal.folder} holds {len(journal.records)} examples, and held {facts['examples']} "
                f"when it was complete: parts of it are missing. Rerun the job of shard.index={index}, which captures "
                "them again"
            )
    base = base_of(layout, record)
    written = compact(
        layout,
        journals,
        heads,
        sampler,
        token_ids=config.capture.capture_token_ids,
        token_string=token_string,
        previous=base,
        threads=num_threads(),
    )
    skipped = sum(shard["skipped"] for shard in done)
    examples = [example for journal in journals for example in journal.records.values()]
    if base is not None:
        skipped += base.record["skipped_rows"]
        examples = base.examples() + examples
    if not written.num_examples:
        raise SourceError(f"dataset {config.dataset.path} has no text that gives a token: nothing was captured")
    expected = None if config.dataset.streaming else record["source_rows"]
    if expected is not None and written.num_examples + skipped != expected:
        raise StoreError(
            f"{layout.root}: {written.num_examples} examples were captured and {skipped} rows had no text, but the "
            f"source had {expected} rows when the job started: it has changed. Restore it and rerun the same command, "
            "or start over with output.overwrite=true"
        )
    kinds = [kind for kind in KINDS if any(head.kind == kind for head in heads)]
    facts = {key: value for key, value in record.items() if key != "base"} | {
        "config": _public(record),
        "inclusion": {kind: sampler.inclusion(kind, written.longest_example) for kind in kinds},
        "skipped_rows": skipped,
        "source_rows": written.num_examples + skipped,
        "batching": _changes(journals, batching_of(record["fingerprint"])),
        "grown_from": _growth(record["base"]),
    }
    return Staged(layout.staging, heads, examples, facts, written)


def mark_done(layout: Layout, shard: ShardConfig, *, rows: int | None, examples: int, skipped: int) -> None:
    """Marks a shard as captured, durably.

    Args:
        rows: the number of source rows of the job, as the shard knew it from its start.
        examples: the number of examples in the shard's journal.
        skipped: the number of the shard's source rows without text.

    Raises:
        StoreError: the job has got another number of rows since.
    """
    facts = {"examples": examples, "skipped": skipped}
    with hold(layout.start_lock, "ending the capture of a shard", wait_s=START_PATIENCE_S):
        check_limit(layout, rows)
        write_atomic(layout.shard_done(shard.index, shard.count), json.dumps(facts).encode())


def is_still_done(layout: Layout, shard: ShardConfig) -> bool:
    """Whether a shard is marked as captured and its journal is whole. Removes the mark if the journal is not."""
    done = layout.shard_done(shard.index, shard.count)
    if not done.exists():
        return False
    journal = Journal(layout.journal(shard.index, shard.count))
    if journal.is_whole and len(journal.records) == json.loads(done.read_bytes())["examples"]:
        return True
    done.unlink()
    return False


def finish_interrupted_promotion(layout: Layout) -> bool:
    """Finishes the promotion of a dataset that a crash interrupted; returns False if there is none."""
    if not layout.staging.manifest.exists():
        return False
    with hold(layout.finalize_lock, "promoting the dataset"):
        return finish_promotion(layout)


def _changes(journals: Sequence[Journal], first: Batching) -> list[dict[str, Any]]:
    """The changes of the batch settings from `first`, by shard, in the order of the batches. `from_index` is the first
    example of the source that was captured after the change."""
    changes = []
    for shard, journal in enumerate(journals):
        current = first
        batches = [journal.batching[batch] for batch in sorted(journal.batching)]
        for batching, same in groupby(batches, key=lambda batch: batch[1]):
            if batching != current:
                changes.append({"shard": shard, "from_index": min(index for index, _ in same), **batching})
            current = batching
    return changes


def _growth(base: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The source rows, software and changed batch settings of the earlier versions of the dataset, oldest first."""
    if base is None:
        return []
    before: list[dict[str, Any]] = base["grown_from"]
    return [*before, {key: base[key] for key in ("source_rows", "versions", "batching")}]


def _public(record: Mapping[str, Any]) -> dict[str, Any]:
    """The config for the manifest, without where the job ran: equal datasets have equal manifests."""
    config: dict[str, Any] = copy.deepcopy(record["config"])
    del config["output"], config["shard"], config["snapshot"]
    config["model"]["name"] = record["fingerprint"]["model.name"]
    config["model"]["tokenizer"]["name"] = record["fingerprint"]["model.tokenizer.name"]
    config["dataset"]["path"] = record["fingerprint"]["dataset.path"]
    public: dict[str, Any] = public_values(config)
    return public
