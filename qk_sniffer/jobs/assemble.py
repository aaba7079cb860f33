"""From the journals of all shards to the dataset: heads, examples, card, and at last the manifest.

Everything needed stands in the job's record and its journals, so that any shard can do it, or anybody else later.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import ShardConfig, from_dict
from qk_sniffer.corpus.tokenizer import load_tokenizer
from qk_sniffer.dataset.card import write_card
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.dataset.heads import head_specs
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.jobs.start import base_of
from qk_sniffer.machine import num_threads
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.compact import HeadSpec, compact
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.layout import KINDS, Layout
from qk_sniffer.store.locks import InUseError, hold
from qk_sniffer.store.promote import finish_promotion, promote
from qk_sniffer.store.record import read_record
from qk_sniffer.timing import Stages

log = logging.getLogger(__name__)


PATIENCE_S = 5.0
"""Another shard that only looks who is missing is done long before; one that holds on is making the dataset."""

Prove = Callable[[Layout, Sequence[HeadSpec], Sequence[ExampleRecord]], dict[str, Any]]
"""Given the staged files, their heads and the examples: the manifest's `proof`."""


def assemble(layout: Layout, stages: Stages, prove: Prove) -> bool:
    """Makes the dataset from the journals of a job; False where shards are not done yet, or another one makes it.

    Raises:
        StoreError: a journal is damaged, or the disk failed; may be called again.
        InUseError: another process makes the dataset of a job that has no shards.
    """
    with ExitStack() as finalizing:
        try:
            finalizing.enter_context(hold(layout.finalize_lock, "making the dataset", wait_s=PATIENCE_S))
        except InUseError:
            record = read_record(layout)
            if record is not None and record["config"]["shard"]["count"] == 1:
                raise
            log.info("another process is making the dataset; if it fails, run any of the shards again")
            return False
        record = read_record(layout)
        if record is None:
            log.info("another shard has made the dataset")
            return False
        count = record["config"]["shard"]["count"]
        missing = [index for index in range(count) if not layout.shard_done(index, count).exists()]
        if missing:
            log.info("shard done; the dataset is made when shards %s of %d are done too", missing, count)
            return False
        log.info("writing the Parquet files")
        with stages("compact"):
            manifest, card = _stage(layout, record, stages, prove)
            promote(layout, manifest, card=card)
    return True


def mark_done(layout: Layout, shard: ShardConfig, *, examples: int, skipped: int) -> None:
    """Says durably that a shard is whole: so many examples are in its journal, `skipped` of its rows had no text."""
    facts = {"examples": examples, "skipped": skipped}
    write_atomic(layout.shard_done(shard.index, shard.count), json.dumps(facts).encode())


def is_still_done(layout: Layout, shard: ShardConfig) -> bool:
    """Whether a shard is marked as done, and whole. The mark goes where its journal has lost something since."""
    done = layout.shard_done(shard.index, shard.count)
    if not done.exists():
        return False
    journal = Journal(layout.journal(shard.index, shard.count))
    if journal.is_whole and len(journal.records) == json.loads(done.read_bytes())["examples"]:
        return True
    done.unlink()
    return False


def finish_publication(layout: Layout) -> bool:
    """Finishes the publication of a dataset that a crash interrupted; False where there is none."""
    if not layout.staging.manifest.exists():
        return False
    with hold(layout.finalize_lock, "publishing the dataset"):
        return finish_promotion(layout)


def _stage(layout: Layout, record: dict[str, Any], stages: Stages, prove: Prove) -> tuple[dict[str, Any], bytes]:
    """Stages the files of the dataset; returns its manifest and card."""
    config = from_dict(record["config"])
    sampler = Sampler(config.sampler)
    heads = list(head_specs(record))
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
                f"when it was whole: parts of it are gone. Run the job of shard.index={index} again, which captures "
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
            f"source had {expected} rows when the job began: it has changed. Restore it and run the same command "
            "again, or start anew with output.overwrite=true"
        )
    with stages("verify"):
        proof = prove(layout.staging, heads, examples)
    kinds = [kind for kind in KINDS if any(head.kind == kind for head in heads)]
    inclusion = {kind: sampler.inclusion(kind, written.longest_example) for kind in kinds}
    facts = record | {"config": _public(record), "inclusion": inclusion, "skipped_rows": skipped, "proof": proof}
    facts["source_rows"] = written.num_examples + skipped
    facts["grown_from"] = _growth(facts.pop("base"))
    manifest = manifests.build(facts, written, timings=stages.seconds)
    return manifest, write_card(CardFacts.of(manifest)).encode()


def _growth(base: dict[str, Any] | None) -> list[dict[str, Any]]:
    """How many rows of the source the dataset was made from before, and with which software, oldest first."""
    if base is None:
        return []
    before: list[dict[str, Any]] = base["grown_from"]
    return [*before, {"source_rows": base["source_rows"], "versions": base["versions"]}]


def _public(record: dict[str, Any]) -> dict[str, Any]:
    """The config for the manifest: nothing of where it ran, so that equal datasets have equal manifests."""
    config: dict[str, Any] = copy.deepcopy(record["config"])
    del config["output"], config["shard"], config["snapshot"]
    config["model"]["name"] = record["fingerprint"]["model.name"]
    config["model"]["tokenizer"]["name"] = record["fingerprint"]["model.tokenizer.name"]
    config["dataset"]["path"] = record["fingerprint"]["dataset.path"]
    return config
