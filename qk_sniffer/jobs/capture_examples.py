"""Captures the examples of a shard into its journal: tokenize, plan, forward pass, journal, batch by batch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from math import ceil

import numpy as np

from qk_sniffer.backbone.attention_check import AttentionCheck
from qk_sniffer.capture.attention_summary import Summarizer
from qk_sniffer.capture.capture import BatchPlan, Capture
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.corpus.batches import Window, open_windows
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.errors import SourceError
from qk_sniffer.jobs.assemble import mark_done
from qk_sniffer.jobs.batch_groups import group_flops, grouped
from qk_sniffer.jobs.components import Components
from qk_sniffer.jobs.loaded_code import check_code
from qk_sniffer.jobs.plan import describe, make_plan
from qk_sniffer.jobs.plan_lines import three_lines
from qk_sniffer.jobs.prefetch import ahead
from qk_sniffer.jobs.progress import Progress
from qk_sniffer.jobs.signals import Stopped, Stopping
from qk_sniffer.jobs.source_rows import shard_rows, source_rows
from qk_sniffer.jobs.start import Start
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.disk import LESS_SPACE, ensure_space, required_bytes, required_statistics_bytes
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import KINDS, WIDTHS, Layout
from qk_sniffer.store.open_folder import Checked
from qk_sniffer.store.rows import index_of, token_columns
from qk_sniffer.store.statistics import stages_of
from qk_sniffer.timing import Stages

log = logger(__name__)

_MUCH_ATTENTION = 0.1
"""The share of weights from which summaries take about as long as the forward passes: a weight costs ten times as much
as in a kernel that keeps no sums."""


def capture_examples(
    config: ResolvedConfig,
    layout: Layout,
    start: Start,
    claim: Claim,
    components: Components,
    stages: Stages,
    stopping: Stopping,
) -> None:
    """Captures the examples of a shard that are not in its journal or in the previous version.

    `claim` is that of the registered job, with the shard's lock.

    Raises:
        SourceError: no text of the dataset has a token.
        StoreError: the disk is full or fails.
        TakenAwayError: the data root is no longer the job's.
        Stopped: a signal came; complete batches are in the journal.
    """
    shard, inference, corpus = config.shard, config.inference, start.corpus
    journal = Journal(layout.journal(shard.index, shard.count), claim.job_id, access=claim)
    total = shard_rows(config, corpus, start.rows_before)
    unit = "text" if config.model.tokenizer.overlong == "split" else "example"
    skipped_before = components.tokenizer.skipped
    if start.base is not None:
        log.info("adding to a finished dataset of %d examples", start.rows_before)
    if journal.records:
        log.info("resuming: %d of %s %ss are done", _num_texts(journal), "?" if total is None else total, unit)
    sampler = Sampler(config.sampler)
    in_thread = Stages()
    windows = _noting_long_texts(
        components.backbone.max_positions,
        open_windows(
            corpus.examples(shard_index=shard.index, shard_count=shard.count, after=start.rows_before),
            components.tokenizer,
            journal.records.values(),
            inference,
            boundary=components.backbone.length_boundary,
            stages=in_thread,
        ),
    )
    file = layout.progress(shard.index, shard.count)
    progress = Progress(total, _num_texts(journal), unit, file=file, access=claim)
    try:
        first = list(islice(windows, 1))
        if first:
            _tell_plan(config, start, components, first[0], journal)
            _check_space(config, layout, start, components, sampler, first[0], journal)
            _tell_cost(config, components, sampler, first[0].lengths)
        with open_writer(config, components, journal, claim) as writer:
            capture = open_capture(config, components, sampler, writer, stages)
            batches = grouped(chain(first, windows), components.cost, group_flops(config, components.cost))
            logged: dict[str, float] = {}
            with ahead(plans(capture, batches, in_thread)) as planned:
                for plan in planned:
                    with stopping.deferred():
                        _capture_batch(capture, plan, progress)
                    if inference.debug_logging:
                        now = stages.seconds | in_thread.seconds
                        now |= {"transfer": writer.transfer_s, "write": writer.write_s}
                        log.info("batch of %d x %d tokens: %s", *plan.ids.shape, _seconds_since(now, logged))
                        logged = now
            stages.seconds |= in_thread.seconds
            with stages("write"):
                writer.close()
    except Stopped:
        log.warning("%d of %s %ss are done", _num_texts(journal), "?" if total is None else total, unit)
        raise
    finally:
        progress.close()
    if not journal.records and shard.count == 1 and start.base is None:
        raise SourceError(f"dataset {config.dataset.path} has no example that gives a token: nothing was captured")
    if corpus.num_rows is None and (last := index_of(max(journal.records, default=-1))) > corpus.last_index:
        raise SourceError(
            f"dataset {config.dataset.path}: example {last} was captured before, and the used ones end with example "
            f"{corpus.last_index} now: the source has changed, or dataset.max_samples. Restore them, or recreate the "
            "dataset with output.overwrite=true"
        )
    skipped = corpus.skipped + components.tokenizer.skipped - skipped_before
    rows = source_rows(config, corpus)
    check_code(components.code)
    mark_done(layout, shard, claim=claim, rows=rows, examples=len(journal.records), skipped=skipped)


def open_writer(config: ResolvedConfig, components: Components, journal: Journal, claim: Claim) -> JournalWriter:
    """Returns the writer of a job's journal."""
    inference = config.inference
    return JournalWriter(
        journal,
        queue_bytes=inference.queue_mb * 2**20,
        segment_bytes=inference.segment_mb * 2**20,
        batching=inference.batching(),
        pinned=components.backbone.device.type == "cuda",
        access=Checked(claim, components.check),  # no row of other weights becomes durable
    )


def open_capture(
    config: ResolvedConfig, components: Components, sampler: Sampler, writer: JournalWriter, stages: Stages
) -> Capture:
    """Returns the capture of a job, which writes to `writer`."""
    return Capture(
        components.backbone,
        components.selection,
        sampler,
        writer,
        columns=token_columns(config.capture),
        stages=stages,
        attention=None if config.verify.examples == 0 else _attention_check(components),
        moments=components.moments(config.capture.statistics),
        summary=_summary(config, components),
    )


def _noting_long_texts(limit: int | None, windows: Iterator[Window]) -> Iterator[Window]:
    """Yields `windows`. Warns of the first one that has a text of more than `limit` tokens."""
    is_noted = limit is None
    for window in windows:
        if not is_noted and limit is not None and (longest := max(window.lengths, default=0)) > limit:
            is_noted = True
            log.warning(
                "a text has %d tokens, and the model's config provides for %d (max_position_embeddings): longer texts "
                "are captured as the model computes them. model.tokenizer.max_length=%d cuts them",
                longest,
                limit,
                limit,
            )
        yield window


def _num_texts(journal: Journal) -> int:
    """The number of texts whose last part is finished."""
    return sum(record.is_last for record in journal.records.values())


def _attention_check(components: Components) -> AttentionCheck:
    """The check of the kernels that the forward passes run, which end with the last captured layer."""
    last = max(layer for layer, _, _ in components.selection)
    run = [layer for layer in components.layers if layer.heads.layer <= last]
    return AttentionCheck(run, components.backbone.family, components.backbone.dtype)


def _summary(config: ResolvedConfig, components: Components) -> Summarizer | None:
    table = AttentionTable.of(config)
    if table is None:
        return None
    heads = {layer: heads for layer, kind, heads in components.selection if kind == "q"}
    return Summarizer(table, config.capture.attention.sink_tokens, heads)


def _tell_cost(config: ResolvedConfig, components: Components, sampler: Sampler, lengths: Sequence[int]) -> None:
    """Tells how much attention is computed a second time, from the lengths of the first examples."""
    if not config.capture.attention.enabled or not lengths:
        return
    share = _expected_rows(sampler, "q", lengths) / sum(lengths)
    log.info(
        "attention summaries: about %.3g %% of the attention weights of the captured query heads are computed a second "
        "time, in float32%s",
        100 * share,
        ". Expect them to take longer than the forward passes" if share > _MUCH_ATTENTION else "",
    )


def plans(capture: Capture, batches: Iterator[tuple[Sequence[Tokens], bool]], stages: Stages) -> Iterator[BatchPlan]:
    """Yields the plan of each batch, whose seconds `stages` gets."""
    for batch, ends_group in batches:
        with stages("plan"):
            plan = capture.plan(batch, ends_group=ends_group)
        yield plan


def _capture_batch(capture: Capture, plan: BatchPlan, progress: Progress) -> None:
    """Captures one batch into the journal."""
    capture.run(plan)
    capture.finish(plan)
    texts = sum(example.is_last for example in plan.examples)
    progress.add(texts, sum(example.num_tokens for example in plan.examples), capture.num_rows(plan))


def _seconds_since(now: dict[str, float], before: dict[str, float]) -> str:
    # Tokenizing and planning overlap with the forward pass of an earlier batch; the transfer from a GPU and the writing
    # overlap with that of a later one. The forward pass on a GPU is the time that it takes to enqueue it.
    names = ("tokenize", "plan", "forward", "gather", "transfer", "queue", "write")
    return ", ".join(f"{name} {now.get(name, 0.0) - before.get(name, 0.0):.4f} s" for name in names)


def _tell_plan(config: ResolvedConfig, start: Start, components: Components, window: Window, journal: Journal) -> None:
    """Tells in three lines what the job takes, as if all examples were as long as those of the first window."""
    wanted = shard_rows(config, start.corpus, start.rows_before)
    plan = make_plan(
        config,
        describe(components),
        [window],
        wanted=wanted,
        done=journal.records.values(),
        in_journal=sum(path.stat().st_size for path in journal.segments),
        there=0 if start.base is None else sum(file["bytes"] for file in start.base.manifest["files"].values()),
        base_texts=start.rows_before,
        is_whole=False,
    )
    for line in three_lines(plan):
        log.info("%s", line)


def _check_space(
    config: ResolvedConfig,
    layout: Layout,
    start: Start,
    components: Components,
    sampler: Sampler,
    window: Window,
    journal: Journal,
) -> None:
    """Checks the disk for the whole job, as if all examples were as long as those of the first window.

    Raises:
        StoreError: there is not enough space.
    """
    wanted, lengths = source_rows(config, start.corpus), window.lengths
    if wanted is None or not lengths:
        return
    heads: dict[tuple[str, int], int] = {}  # by kind and size of a vector
    layers = {layer.heads.layer: layer.to_dict() for layer in components.layers}
    for layer, kind, chosen in components.selection:
        key = kind, layers[layer][WIDTHS[kind]]
        heads[key] = heads.get(key, 0) + len(chosen)
    share = _share_in_segments(config, window)
    rows_per_text = {kind: share * _expected_rows(sampler, kind, lengths) / window.num_texts for kind in KINDS}
    examples = wanted - start.rows_before
    required = sum(
        required_bytes(int(number * rows_per_text[kind] * examples), width, components.backbone.dtype.itemsize)
        for (kind, width), number in heads.items()
    )
    if (table := AttentionTable.of(config)) is not None:
        queries = sum(number for (kind, _), number in heads.items() if kind == "q")
        records = int(queries * rows_per_text["q"] * examples)
        required += required_bytes(records, table.width, np.dtype(np.float32).itemsize)
    statistics, hint = config.capture.statistics, ""
    if statistics.enabled:
        groups = sum(is_last for _, is_last in grouped([window], components.cost, group_flops(config, components.cost)))
        required += sum(
            required_statistics_bytes(
                number * len(stages_of(kind, statistics.stages)),
                width,
                ceil(groups * examples / window.num_texts),
                covariance=statistics.covariance,
            )
            for (kind, width), number in heads.items()
        )
        hint = ", or capture.statistics.covariance=false" if statistics.covariance else ""
    in_journal = sum(path.stat().st_size for path in journal.segments)
    copied = 0 if start.base is None else sum(file["bytes"] for file in start.base.manifest["files"].values())
    ensure_space(layout.root, required + copied - in_journal, way_out=LESS_SPACE + hint)


def _expected_rows(sampler: Sampler, kind: str, lengths: Sequence[int]) -> float:
    return sum(number * sampler.expected_rows(kind, length) for length, number in Counter(lengths).items())


def _share_in_segments(config: ResolvedConfig, window: Window) -> float:
    """Returns the share of the tokens of a window that are in `sampler.segments`; 1 without that setting."""
    names = config.sampler.segments
    if names is None:
        return 1.0
    masks = [example.are_in(names) for batch in window.batches for example in batch]
    return float(np.mean(np.concatenate(masks))) if masks else 1.0
