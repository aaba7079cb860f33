"""One job, from its configuration to a finished dataset. Reads as the story of the tool.

A job is a plain function of its config: it runs the same here, in a sweep, on SLURM and in a test.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from qk_sniffer.capture.capture import BatchPlan, Capture
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import Config
from qk_sniffer.corpus.batches import open_windows
from qk_sniffer.errors import SourceError
from qk_sniffer.hub.client import require_access
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.jobs.assemble import finish_publication, is_still_done, mark_done
from qk_sniffer.jobs.components import Components, LazyComponents
from qk_sniffer.jobs.finish import Outcome, finish, report_and_publish
from qk_sniffer.jobs.licenses import stated_terms
from qk_sniffer.jobs.prefetch import ahead
from qk_sniffer.jobs.progress import Progress
from qk_sniffer.jobs.signals import Stopped, Stopping
from qk_sniffer.jobs.start import Start, find_existing_work, register_job, source_rows
from qk_sniffer.machine import return_memory, trim_memory
from qk_sniffer.resolved import ResolvedConfig, resolve
from qk_sniffer.store.disk import ensure_space, required_bytes
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import KINDS, Layout, prepare_data_root, remove_leftovers
from qk_sniffer.store.locks import hold, restart_patience_s
from qk_sniffer.timing import Stages
from qk_sniffer.validation import check

log = logging.getLogger(__name__)


def run_job(config: Config) -> Outcome:
    """Runs the job that `config` describes, or the part of it that is not done yet; says what it left.

    Raises:
        QkSnifferError: with what is wrong and the way out; nothing that was written before is lost.
        Stopped: by a signal (see `stopping.py`); what was complete is kept.
    """
    check(config)
    job = resolve(config)
    if job.output.hf_repo_id:
        require_access(job.output.hf_repo_id, private=job.output.private)  # now, not after hours of capture
    existed = job.data_root.exists()
    layout = prepare_data_root(job.data_root)
    return_memory()
    try:
        with Stopping() as stopping:
            return _run(job, layout, Stages(), stopping)
    finally:
        if not existed:
            with suppress(OSError):
                layout.root.rmdir()  # a job that failed before it wrote anything leaves nothing


def _run(config: ResolvedConfig, layout: Layout, stages: Stages, stopping: Stopping) -> Outcome:
    shard = config.shard
    own_lock = layout.shard_lock(shard.index, shard.count)
    with hold(own_lock, f"capturing shard {shard.index} of {shard.count}", wait_s=restart_patience_s()):
        published = finish_publication(layout)
        with stages("open dataset"):
            start = find_existing_work(config, layout, is_mine=published)
        if start.found == "finished":
            remove_leftovers(layout, own_lock)
            return report_and_publish(config, layout, "Nothing to do: the dataset is finished.", start.files)
        if start.base is not None:
            start.base.fetch()  # now, not after hours of capture
        parts = LazyComponents(config, start.job.commits, stages)
        if start.found == "nothing" or not is_still_done(layout, config.shard):
            record = _record(config, start, parts())
            register_job(layout, start.job, record, own_lock=own_lock, overwrite=config.output.overwrite)
            _capture_examples(config, layout, start, parts(), stages, stopping)
        trim_memory()  # of what the forward leaves behind, before the threads of the compaction come
        return finish(config, layout, lambda: start.corpus, parts, stages) or Outcome()


def _record(config: ResolvedConfig, start: Start, parts: Components) -> dict[str, Any]:
    """All that is needed to make the dataset from the journals, and what the manifest tells of the model."""
    layers = []
    for layer in parts.layers:
        chosen = {kind: list(heads) for number, kind, heads in parts.selection if number == layer.heads.layer}
        layers.append(layer.to_dict() | {"captured": chosen})
    return start.job.to_dict() | {
        "config": config.to_dict(),
        "source_rows": source_rows(config, start.corpus),
        "base": None if start.base is None else dict(start.base.record),
        "stated": {
            "model": stated_terms("model", config.model.name or "", hub_commit_of(start.job.commits["model"])),
            "dataset": stated_terms("dataset", config.dataset.path or "", start.job.commits["dataset"]),
        },
        "model": {
            "model_type": parts.backbone.config.model_type,
            "dtype": str(parts.backbone.dtype).removeprefix("torch."),
            "attn_implementation": parts.backbone.config._attn_implementation,
            "rope_stage": "pre" if config.capture.capture_pre_rope else "post",
            "layers": layers,
            "rotary": parts.backbone.rotary_parameters(),
        },
        "tokenizer": {"class": parts.tokenizer.class_name},
    }


def _capture_examples(
    config: ResolvedConfig, layout: Layout, start: Start, parts: Components, stages: Stages, stopping: Stopping
) -> None:
    """Brings every example of this shard that is not in the finished dataset into its journal."""
    shard, inference, corpus = config.shard, config.inference, start.corpus
    journal = Journal(layout.journal(shard.index, shard.count))
    first = start.rows_before + (shard.index - start.rows_before) % shard.count
    total = None if corpus.num_rows is None else len(range(first, corpus.num_rows, shard.count))
    if start.base is not None:
        log.info("adding to a finished dataset of %d rows of the source", start.rows_before)
    if journal.records:
        log.info("resuming: %d of %s examples are done", len(journal.records), "?" if total is None else total)
    sampler = Sampler(config.sampler)
    progress = Progress(total, len(journal.records), file=layout.progress(shard.index, shard.count))
    tokens_wanted = config.capture.capture_token_ids or config.capture.capture_token_strings
    try:
        with JournalWriter(
            journal,
            queue_bytes=inference.queue_mb * 2**20,
            segment_bytes=inference.segment_mb * 2**20,
            pinned=parts.backbone.device.type == "cuda",
        ) as writer:
            capture = Capture(parts.backbone, parts.selection, sampler, writer, token_ids=tokens_wanted, stages=stages)
            spent: dict[str, float] = {}
            beside = Stages()
            todo = open_windows(
                corpus.examples(shard_index=shard.index, shard_count=shard.count, after=start.rows_before),
                parts.tokenizer,
                journal.records,
                inference,
                boundary=parts.backbone.length_boundary,
                stages=beside,
            )

            def planned() -> Iterator[BatchPlan]:
                for number, window in enumerate(todo):
                    if number == 0:
                        _check_space(config, layout, start, parts, sampler, window.lengths, journal)
                    for batch in window.batches:
                        with beside("plan"):
                            plan = capture.plan(batch)
                        yield plan

            with ahead(planned()) as plans:
                for plan in plans:
                    with stopping.deferred():
                        _capture_batch(capture, plan, writer, progress)
                    if inference.debug_logging:
                        now = stages.seconds | beside.seconds
                        now |= {"transfer": writer.transfer_s, "write": writer.write_s - writer.transfer_s}
                        log.info("batch of %d x %d tokens: %s", *plan.ids.shape, _by_stage(now, spent))
                        spent = now
            stages.seconds |= beside.seconds
            with stages("write"):
                writer.close()
    except Stopped:
        log.warning("%d of %s examples are done", len(journal.records), "?" if total is None else total)
        raise
    finally:
        progress.close()
    if not journal.records and shard.count == 1 and start.base is None:
        raise SourceError(f"dataset {config.dataset.path} has no text that gives a token: nothing was captured")
    mark_done(layout, shard, examples=len(journal.records), skipped=corpus.skipped + parts.tokenizer.skipped)


def _capture_batch(capture: Capture, plan: BatchPlan, writer: JournalWriter, progress: Progress) -> None:
    """Brings one batch into the journal."""
    capture.run(plan)
    writer.complete(
        [
            ExampleRecord(
                index=example.index,
                example_id=example.example_id,
                source_id=example.source_id,
                num_tokens=example.num_tokens,
                truncated=example.truncated,
                text_hash=example.text_hash,
            )
            for example in plan.examples
        ]
    )
    progress.add(len(plan.examples), sum(example.num_tokens for example in plan.examples), capture.num_rows(plan))


def _by_stage(now: dict[str, float], before: dict[str, float]) -> str:
    # Tokenizing and planning go on beside the forward, for batches to come; transfer (of what a GPU has gathered) and
    # writing do for those before. The forward of a GPU is the time that it takes to ask for it.
    stages = ("tokenize", "plan", "forward", "gather", "transfer", "queue", "write")
    return ", ".join(f"{name} {now.get(name, 0.0) - before.get(name, 0.0):.4f} s" for name in stages)


def _check_space(
    config: ResolvedConfig,
    layout: Layout,
    start: Start,
    parts: Components,
    sampler: Sampler,
    lengths: Sequence[int],
    journal: Journal,
) -> None:
    """Checks the disk for the whole job, as if all examples were as long as those of the first window."""
    wanted = source_rows(config, start.corpus)
    if wanted is None or not lengths:
        return
    num_rows = wanted - start.rows_before
    heads: Counter[str] = Counter()
    for _, kind, chosen in parts.selection:
        heads[kind] += len(chosen)
    per_example = {
        kind: sum(sampler.expected_rows(kind, length) for length in lengths) / len(lengths) for kind in KINDS
    }
    rows = sum(heads[kind] * per_example[kind] for kind in KINDS)
    head_dim = max(layer.heads.head_dim for layer in parts.layers)
    required = required_bytes(int(rows * num_rows), head_dim, parts.backbone.dtype.itemsize)
    there = sum(path.stat().st_size for path in journal.segments)
    copied = 0 if start.base is None else sum(file["bytes"] for file in start.base.manifest["files"].values())
    ensure_space(layout.root, required + copied - there)
