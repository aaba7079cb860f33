"""One job, from its configuration to a finished dataset. Reads as the story of the tool.

A job is a plain function of its config: it runs the same here, in a sweep, on SLURM and in a test.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qk_sniffer.ahead import ahead
from qk_sniffer.backbone import Backbone, LayerFacts
from qk_sniffer.batching import TextTokenizer, load_tokenizer
from qk_sniffer.capture import BatchPlan, Capture
from qk_sniffer.config import Config, resolved
from qk_sniffer.corpus import Corpus
from qk_sniffer.errors import CaptureError, ConfigError, SourceError
from qk_sniffer.finalize import finalize, finish_publication, is_still_done, mark_done
from qk_sniffer.heads import Selection, select
from qk_sniffer.hub import publish, require_login
from qk_sniffer.job import hub_commit_of
from qk_sniffer.loading import check_model, load_backbone
from qk_sniffer.machine import return_memory, trim_memory
from qk_sniffer.planning import check_unchanged, open_windows
from qk_sniffer.progress import Progress, Stages, describe
from qk_sniffer.proof import examples_with_rows, prove
from qk_sniffer.sampling import Sampler
from qk_sniffer.start import Start, begin, look, source_rows
from qk_sniffer.stopping import Stopped, Stopping
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.compact import HeadSpec
from qk_sniffer.store.disk import ensure_space, required_bytes
from qk_sniffer.store.journal import ExampleRecord, Journal, JournalWriter
from qk_sniffer.store.layout import KINDS, Layout, claim, tidy
from qk_sniffer.store.locks import hold
from qk_sniffer.summary import show
from qk_sniffer.validation import check

log = logging.getLogger(__name__)


def run_job(config: Config) -> None:
    """Runs the job that `config` describes, or the part of it that is not done yet.

    Raises:
        QkSnifferError: with what is wrong and the way out; nothing that was written before is lost.
        Stopped: by SIGINT or SIGTERM; what was complete is kept.
    """
    check(config)
    config = resolved(config)
    if config.output.hf_repo_id:
        require_login()  # now, not after hours of capture
    existed = config.data_root.exists()
    layout = claim(config.data_root)
    return_memory()
    try:
        with Stopping() as stopping:
            _run(config, layout, Stages(), stopping)
    finally:
        if not existed:
            with suppress(OSError):
                layout.root.rmdir()  # a job that failed before it wrote anything leaves nothing


def _run(config: Config, layout: Layout, stages: Stages, stopping: Stopping) -> None:
    shard = config.shard
    own_lock = layout.shard_lock(shard.index, shard.count)
    with hold(own_lock, f"capturing shard {shard.index} of {shard.count}"):
        published = finish_publication(layout)
        with stages("open dataset"):
            start = look(config, layout, is_mine=published)
        if start.found == "finished":
            tidy(layout, own_lock)
            show(layout.root, "Nothing to do: the dataset is finished.")
            _publish(config, layout)
            return
        parts = _LazyParts(config, start.job.commits, stages)
        if start.found == "nothing" or not is_still_done(layout, config.shard):
            record = _record(config, start, parts())
            begin(layout, start.job, record, own_lock=own_lock, overwrite=config.output.overwrite)
            _capture_examples(config, layout, start, parts(), stages, stopping)
    trim_memory()  # of what the forward leaves behind, before the threads of the compaction come
    if finalize(layout, stages, lambda *staged: _prove(config, start.corpus, parts, *staged)):
        show(layout.root, f"Time: {describe(stages.seconds)}")
        _publish(config, layout)


def _prove(
    config: Config,
    corpus: Corpus,
    parts: "_LazyParts",
    staging: Layout,
    heads: Sequence[HeadSpec],
    records: Sequence[ExampleRecord],
) -> dict[str, Any]:
    """The proof over the shortest examples that have rows (see `proof.py`)."""
    count = config.verify.examples
    if count == 0:
        return {"proven": None, "reason": "turned off (verify.examples=0)"}
    with_rows = examples_with_rows(staging, heads)
    chosen = sorted((r.num_tokens, r.index, r) for r in records if r.example_id in with_rows)[:count]
    if not chosen:
        return {"proven": None, "reason": "the dataset has no rows"}
    captured = {index: record for _, index, record in chosen}
    found = list(islice((example for example in corpus.examples() if example.index in captured), len(captured)))
    for example in found:
        check_unchanged(example, captured[example.index])
    tokens = parts().tokenizer(found)
    return prove(parts().backbone, staging, heads, {made.example_id: made.ids for made in tokens})


def _publish(config: Config, layout: Layout) -> None:
    """Brings the finished dataset to its branch on the Hub, where one is asked for, unless it is disproven.

    Raises:
        CaptureError: stored vectors are not those that the model computes on another path.
    """
    proof = manifests.read(layout.root)["proof"]
    if proof["proven"] is False:
        raise CaptureError(
            f"{layout.root} is unproven, and not published: derived again from the model's projections, vectors differ "
            f"by more than {proof['tolerance']} (relative): {proof['largest_difference_by_layer']} by layer. Please "
            "report this with the model's name; verify.examples=0 makes a dataset without proof"
        )
    output = config.output
    if output.hf_repo_id and output.hf_branch:
        published = publish(layout.root, output.hf_repo_id, output.hf_branch, private=output.private)
        print(f"{'Published' if published.changed else 'Already published'}: {published.url}")


@dataclass(frozen=True)
class _Parts:
    """What a job that has something to do needs in memory."""

    tokenizer: TextTokenizer
    backbone: Backbone
    layers: list[LayerFacts]
    selection: Selection


class _LazyParts:
    """Loads tokenizer and model when they are first needed, which may be never."""

    def __init__(self, config: Config, commits: dict[str, str | None], stages: Stages) -> None:
        self._config, self._commits, self._stages = config, commits, stages
        self._parts: _Parts | None = None

    def __call__(self) -> _Parts:
        if self._parts is None:
            with self._stages("load model"):
                self._parts = _load(self._config, self._commits)
        return self._parts


def _load(config: Config, commits: dict[str, str | None]) -> _Parts:
    check_model(config.model, commit=commits["model"])
    tokenizer = load_tokenizer(config.model, hub_commit_of(commits["tokenizer"]))
    backbone = load_backbone(
        config.model,
        commit=commits["model"],
        pre_rope=config.capture.capture_pre_rope,
        banded_attention=config.inference.banded_attention,
        # To say that none of the layers asked for has full attention, all of them must be seen.
        layers=None if config.capture.full_attention_only else config.capture.layers,
    )
    limit, max_length = backbone.num_positions, config.model.tokenizer.max_length
    if limit is not None and max_length > limit:
        raise ConfigError(
            [f"model.tokenizer.max_length is {max_length}, but this model has positions for {limit}: set it so"]
        )
    layers = backbone.probe()
    selection = select([layer.heads for layer in layers], config.capture)
    if selection.note:
        log.warning("%s", selection.note)
    log.info(
        "%s: %d of %d query heads, %d files; %s on %s",
        config.model.slug,
        selection.drawn,
        sum(layer.heads.num_q_heads for layer in layers),
        selection.num_heads,
        str(backbone.dtype).removeprefix("torch."),
        backbone.device,
    )
    return _Parts(tokenizer, backbone, layers, selection)


def _record(config: Config, start: Start, parts: _Parts) -> dict[str, Any]:
    """All that is needed to make the dataset from the journals, and what the manifest tells of the model."""
    layers = []
    for layer in parts.layers:
        chosen = {kind: list(heads) for number, kind, heads in parts.selection if number == layer.heads.layer}
        layers.append(layer.to_dict() | {"captured": chosen})
    return start.job.to_dict() | {
        "config": config.to_dict(),
        "source_rows": source_rows(config, start.corpus),
        "base": None if start.base is None else dict(start.base.record),
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
    config: Config, layout: Layout, start: Start, parts: _Parts, stages: Stages, stopping: Stopping
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
    progress = Progress(total, len(journal.records))
    tokens_wanted = config.capture.capture_token_ids or config.capture.capture_token_strings
    try:
        with journal.writer(
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
                    with stopping.not_now():
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
    config: Config,
    layout: Layout,
    start: Start,
    parts: _Parts,
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
