"""Makes a dataset from the journals of all shards, up to the staging folder; `finish.py` proves and promotes it.

The job's record and its journals hold everything needed. Any shard can therefore make it, and so can `finalize` later.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import ModelConfig, ShardConfig, from_dict, settings
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.corpus.tokens import Tokenizer
from qk_sniffer.dataset.heads import attention_files, captured_heads
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.jobs.identity import Job, unchanged_files
from qk_sniffer.jobs.shards import journals_of, uncaptured
from qk_sniffer.jobs.source_rows import FINALIZE_PATIENCE_S, START_PATIENCE_S, check_limit
from qk_sniffer.jobs.start import base_of
from qk_sniffer.logs import logger
from qk_sniffer.machine import num_threads
from qk_sniffer.resolved import batching_of, public_values
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.compact import compact
from qk_sniffer.store.compact_examples import added_examples
from qk_sniffer.store.compact_statistics import compact_statistics
from qk_sniffer.store.disk import remove, type_of
from qk_sniffer.store.forms import Mark
from qk_sniffer.store.journal import AttentionFacts, Batching, ExampleRecord, Journal
from qk_sniffer.store.layout import KINDS, Head, Layout
from qk_sniffer.store.locks import InUseError, hold
from qk_sniffer.store.manifest import Written
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.previous import PreviousVersion
from qk_sniffer.store.promote import abandon_promotion, finish_promotion, finish_removal, staged_manifest
from qk_sniffer.store.record import read_mark, read_record, write_mark
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.store.text_segments import num_tokens_in

log = logger(__name__)


@dataclass(frozen=True)
class Staged:
    """A dataset in the staging folder, complete except for proof, card and manifest."""

    layout: Layout
    """The staging folder's."""
    heads: Sequence[Head]
    parts: Sequence[Sequence[ExampleRecord]]
    """All examples, in parts that were captured apart: the earlier version, then each shard."""
    facts: Mapping[str, Any]
    """The manifest's, from the job."""
    checks: Sequence[AttentionFacts]
    """The check of each kind of attention, by layer."""
    written: Written

    @property
    def examples(self) -> Iterator[ExampleRecord]:
        """The examples of all parts."""
        return chain(*self.parts)

    def manifest(self, proof: Mapping[str, Any], *, timings: Mapping[str, float]) -> dict[str, Any]:
        """The manifest of the dataset, with its `proof`. `timings` are seconds by stage."""
        return manifests.build({**self.facts, "proof": proof}, self.written, timings=timings)


@dataclass(frozen=True)
class CapturedJob:
    """The job whose dataset this process makes: its record, and its claim to the data root."""

    record: dict[str, Any]
    claim: Claim


@contextmanager
def captured_job(layout: Layout, job_id: str, access: Access = PLAIN) -> Iterator[CapturedJob | None]:
    """Holds the finalize lock, and yields the job `job_id` if all of its shards are captured.

    `access` is the lock of the process's shard, if it has one.

    Yields None if a shard is missing, if another process holds the lock, or if the dataset exists already; the log
    says which.

    Raises:
        InUseError: another process makes the dataset of a job that has no shards.
        TakenAwayError: the data root has another job, now or at the end of a step of the block.
    """
    while True:
        with ExitStack() as finalizing:
            job = _locked_job(layout, job_id, finalizing, access)
            if job is None or not uncaptured(layout, job.record, job.claim):
                yield job
                return
        # A shard that has ended since may have found the lock held, and has left the dataset to this process.
        if missing := uncaptured(layout, job.record):
            count = job.record["config"]["shard"]["count"]
            log.info("shard done; the dataset is made when shards %s of %d are done too", missing, count)
            yield None
            return


def _locked_job(layout: Layout, job_id: str, finalizing: ExitStack, access: Access) -> CapturedJob | None:
    """Takes the finalize lock, and returns the job, captured or not; None if another process has the lock or is done.

    `finalizing` holds the lock.
    """
    try:
        lock = finalizing.enter_context(
            hold(layout.finalize_lock, "making the dataset", wait_s=FINALIZE_PATIENCE_S, access=access)
        )
    except InUseError:
        record = read_record(layout, access)
        if record is not None and record["config"]["shard"]["count"] == 1:
            raise
        log.info("another process is making the dataset; if it fails, rerun any of the shards")
        return None
    record = read_record(layout, lock)
    if record is None:
        log.info("another shard has made the dataset")
        return None
    finalizing.enter_context(lock.explaining())
    claim = Claim(lock, layout, job_id)
    claim.check()
    return CapturedJob(record, claim)


def stage(layout: Layout, job: CapturedJob, model: ModelConfig, tokenizer: Tokenizer | None = None) -> Staged:
    """Writes the Parquet files of the dataset of a captured job to the staging folder. Hold the finalize lock.

    `model` is the caller's, who decides which code its tokenizer may run. `tokenizer` is the one of the capture; None
    loads it if it is needed. Removes a staged version of another job.

    Raises:
        StoreError: a journal is damaged, the source has changed, or the disk failed; may be called again.
        SourceError: no text of the dataset has a token, or the tokenizer has changed.
    """
    log.info("writing the Parquet files")
    record, claim = job.record, job.claim
    config = from_dict(record["config"])
    sampler = Sampler(config.sampler)
    heads = captured_heads(record)
    commits = record["commits"]
    token_string = None
    if config.capture.capture_token_strings:
        if tokenizer is None:
            with unchanged_files(model, commits, ["tokenizer"]):
                tokenizer = load_tokenizer(model, hub_commit_of(commits["tokenizer"]))
        token_string = tokenizer.token_strings
    count = config.shard.count
    journals = journals_of(layout, record, claim)
    marks = [read_mark(layout, index, count, claim.job_id, claim) for index in range(count)]
    for index, (journal, mark) in enumerate(zip(journals, marks, strict=True)):
        held = 0 if mark is None else mark["examples"]
        if mark is None or len(journal.records) != held:
            raise StoreError(
                f"the journal {journal.folder} holds {len(journal.records)} examples, and held {held} "
                f"when it was complete: parts of it are missing. Rerun the job of shard.index={index}, which captures "
                "them again"
            )
    base, split = base_of(layout, record), config.model.tokenizer.overlong == "split"
    _remove_staged(layout, claim)
    written = compact(
        layout,
        journals,
        [*heads, *attention_files(record)],
        sampler,
        capture=config.capture,
        has_segments=config.has_segments,
        token_string=token_string,
        attention=AttentionTable.of(config),
        previous=base,
        split=split,
        from_python="source" in record,
        threads=num_threads(),
        access=claim,
    )
    if not written.num_examples:
        raise SourceError(f"dataset {config.dataset.path} has no example that gives a token: nothing was captured")
    skipped = sum(mark["skipped"] for mark in marks if mark is not None)
    old = [] if base is None else base.examples()
    added = {record.key: record for record in added_examples(journals, old)}
    parts = [[added[key] for key in journal.records] for journal in journals]
    if base is not None:
        skipped += base.record["skipped_rows"]
        parts.insert(0, old)
    if (statistics := config.capture.statistics).enabled:
        tokens = sum(
            num_tokens_in(
                example.segments,
                example.num_tokens,
                config.sampler.segments,
                max(statistics.skip_tokens, example.first_position),
            )
            for example in chain(*parts)
        )
        files, found = compact_statistics(
            layout.staging,
            journals,
            heads,
            statistics,
            {layer["layer"]: layer.get("rotation") for layer in record["model"]["layers"]},
            num_tokens=tokens,
            previous=base,
            access=claim,
        )
        written = replace(written, files=dict(sorted((written.files | files).items())), statistics=found)
    expected = None if config.dataset.streaming else record["source_rows"]
    if expected is not None and written.num_texts + skipped != expected:
        raise StoreError(
            f"{layout.root}: {written.num_texts} texts were captured and {skipped} examples had no text, but the "
            f"source had {expected} examples when the job started: it has changed. Restore it and rerun the same "
            "command, or start over with output.overwrite=true"
        )
    limit = record["model"].get("max_positions")
    kinds = [kind for kind in KINDS if any(head.kind == kind for head in heads)]
    facts = {key: value for key, value in record.items() if key != "base"} | {
        "config": _public(record),
        "fingerprint": Job.from_record(record).fingerprint,
        "inclusion": {kind: sampler.inclusion(kind, written.longest_example) for kind in kinds},
        "skipped_rows": skipped,
        "source_rows": written.num_texts + skipped,
        "batching": _changes(journals, batching_of(record["fingerprint"])),
        "grown_from": _growth(record["base"]),
    }
    if split:
        facts["texts"] = written.num_texts
    if limit is not None:
        facts["examples_beyond_max_positions"] = sum(example.num_tokens > limit for example in chain(*parts))
    return Staged(layout.staging, heads, parts, facts, _checks(journals, base), written)


def _checks(journals: Sequence[Journal], base: PreviousVersion | None) -> list[AttentionFacts]:
    """The checks of attention kernels in all shards and in the earlier version: one of each kind of attention.

    It is one that failed, or else the one with the longest text.
    """
    made = [] if base is None else [*base.manifest["proof"].get("attention", ())]
    made += [check for journal in journals for batch in sorted(journal.checks) for check in journal.checks[batch]]
    by_kind: dict[str, AttentionFacts] = {}
    for check in sorted(made, key=lambda each: (each["passed"] is not False, each["passed"] is None, -each["tokens"])):
        by_kind.setdefault(check["kind"], check)
    return sorted(by_kind.values(), key=lambda check: check["layer"])


def _remove_staged(layout: Layout, claim: Claim) -> None:
    """Removes a staged version of another job. The job's own is promoted before a job stages another one."""
    staged = staged_manifest(layout, claim)
    if staged is not None and staged.get("job_id") != claim.job_id:
        remove(layout.staging.root, claim)


def mark_done(
    layout: Layout, shard: ShardConfig, *, claim: Claim, rows: int | None, examples: int, skipped: int
) -> None:
    """Marks a shard as captured, durably.

    Args:
        layout: of the data root.
        shard: the captured shard.
        claim: that of the job, with the shard's lock.
        rows: the number of source rows of the job, as the shard knew it from its start.
        examples: the number of examples in the shard's journal.
        skipped: the number of the shard's source rows without text.

    Raises:
        StoreError: the job has got another number of rows since.
        TakenAwayError: the data root is no longer the job's.
    """
    mark = Mark(job=claim.job_id, examples=examples, skipped=skipped)
    claim.check()
    with hold(layout.start_lock, "ending the capture of a shard", wait_s=START_PATIENCE_S, access=claim):
        check_limit(layout, rows, claim)
        write_mark(layout, shard.index, shard.count, mark, access=claim)


def is_still_done(layout: Layout, shard: ShardConfig, claim: Claim) -> bool:
    """Whether a shard is marked as captured and its journal is whole. Removes the mark if the journal is not."""
    mark = read_mark(layout, shard.index, shard.count, claim.job_id, claim)
    if mark is not None:
        journal = Journal(layout.journal(shard.index, shard.count), claim.job_id, access=claim)
        if journal.is_whole and len(journal.records) == mark["examples"]:
            return True
    remove(layout.shard_done(shard.index, shard.count), claim)
    return False


def remove_unreadable_marks(layout: Layout, shard_count: int, claim: Claim) -> None:
    """Removes the marks that cannot be read: their shards count as not captured, and keep their journals."""
    for index in range(shard_count):
        try:
            read_mark(layout, index, shard_count, claim.job_id, claim)
        except UnreadableError as error:
            log.warning("%s is removed: it %s", layout.shard_done(index, shard_count), error.problem)
            remove(layout.shard_done(index, shard_count), claim)


def finish_interrupted_promotion(layout: Layout, access: Access = PLAIN, *, overwrite: bool = False) -> bool:
    """Finishes the promotion of a dataset that a crash interrupted; returns False if there is none.

    `access` is the lock of the process's shard, if it has one. With `overwrite`, a staged version that cannot be
    promoted is removed.

    Raises:
        UnreadableError: the record or the staged manifest cannot be read, or a file that it lists is missing.
    """
    if type_of(layout.staging.manifest) is None:
        return False
    with (
        hold(layout.finalize_lock, "promoting the dataset", replace=overwrite, access=access) as lock,
        lock.explaining(),
    ):
        try:
            record = read_record(layout, lock)
            if record is None:
                return finish_removal(layout, lock)
            return finish_promotion(layout, Claim(lock, layout, record["job_id"]))
        except UnreadableError as error:
            if not overwrite:
                raise
            log.warning("the staged version of the dataset is not promoted, and removed: %s", error)
            abandon_promotion(layout, lock)
            return False


def _changes(journals: Sequence[Journal], first: Batching) -> list[dict[str, Any]]:
    """The changes of the batch settings from `first`, by shard, in the order of the batches. `from_index` is the first
    example of the source that was captured after the change."""
    changes = []
    for shard, journal in enumerate(journals):
        current = first
        # Earlier versions list no `lookahead`, which could not change then.
        batches = [(index, {**first, **of}) for _, (index, of) in sorted(journal.batching.items())]
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
    own = {"source_rows": base["source_rows"], "versions": base["versions"], "batching": base.get("batching", [])}
    return [*before, own]


def _public(record: Mapping[str, Any]) -> dict[str, Any]:
    """The config for the manifest, without where the job ran: equal datasets have equal manifests."""
    config: dict[str, Any] = copy.deepcopy(record["config"])
    del config["output"], config["shard"], config["snapshot"]
    published = Job.from_record(record).fingerprint
    for setting in settings():
        if setting.names_source or setting.names_files:
            *sections, name = setting.key.split(".")
            section = config
            for each in sections:
                section = section[each]
            section[name] = published[setting.key]
    public: dict[str, Any] = public_values(config)
    return public
