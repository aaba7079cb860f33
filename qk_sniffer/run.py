"""One job, from its configuration to a finished dataset. Reads as the story of the tool.

A job is a plain function of its config: it runs the same here, in a sweep, on SLURM and in a test.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qk_sniffer.backbone import Backbone, LayerFacts, load_backbone
from qk_sniffer.batching import TextTokenizer, Tokens, batches, load_tokenizer, text_hash, windows
from qk_sniffer.capture import Capture
from qk_sniffer.config import Config, resolved
from qk_sniffer.corpus import Corpus, Example, open_corpus
from qk_sniffer.errors import CaptureError, SourceError, StoreError
from qk_sniffer.finalize import finalize, finish_publication, mark_done
from qk_sniffer.heads import Selection, select
from qk_sniffer.hub import publish, require_login
from qk_sniffer.job import Job, fingerprint, hub_commit_of, read_record, resolve_commits, write_record
from qk_sniffer.progress import Progress, Stages, describe
from qk_sniffer.proof import examples_with_rows, prove
from qk_sniffer.sampling import Sampler
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.compact import HeadSpec
from qk_sniffer.store.disk import ensure_space, required_bytes
from qk_sniffer.store.journal import ExampleRecord, Journal, JournalWriter
from qk_sniffer.store.layout import KINDS, Layout, claim, remove_work
from qk_sniffer.store.locks import hold
from qk_sniffer.summary import show
from qk_sniffer.validation import check

log = logging.getLogger(__name__)


def run_job(config: Config) -> None:
    """Runs the job that `config` describes, or the part of it that is not done yet.

    Raises:
        QkSnifferError: with what is wrong and the way out; nothing that was written before is lost.
    """
    check(config)
    config = resolved(config)
    if config.output.hf_repo_id:
        require_login()  # now, not after hours of capture
    stages = Stages()
    layout = claim(config.data_root)
    shard = config.shard
    with hold(layout.shard_lock(shard.index, shard.count), f"capturing shard {shard.index} of {shard.count}"):
        finish_publication(layout)
        earlier = _earlier_job(config, layout)
        commits = resolve_commits(config, earlier)
        with stages("open dataset"):
            corpus = open_corpus(config.dataset, earlier.commits["dataset"] if earlier else None)
        job = Job.of(config, commits | {"dataset": corpus.commit})
        finished = earlier is not None and not layout.job_file.exists()
        if earlier is not None:
            job.check_continues(earlier, str(layout.root), finished=finished)
        if finished:
            _check_nothing_new(layout, config, corpus)
            show(layout.root, "Nothing to do: the dataset is finished.")
            _publish(config, layout)
            return
        parts = _LazyParts(config, job.commits, stages)
        if earlier is None or not _is_captured(config, layout):
            _capture(config, layout, corpus, job, parts(), stages, anew=earlier is None)
    if finalize(layout, stages, lambda *staged: _prove(config, corpus, parts, *staged)):
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
    chosen = sorted((r.num_tokens, r.index) for r in records if r.example_id in with_rows)[:count]
    if not chosen:
        return {"proven": None, "reason": "the dataset has no rows"}
    indices = {index for _, index in chosen}
    found = islice((example for example in corpus.examples() if example.index in indices), len(indices))
    tokens = parts().tokenizer(list(found))
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


def _capture(
    config: Config, layout: Layout, corpus: Corpus, job: Job, parts: "_Parts", stages: Stages, *, anew: bool
) -> None:
    """Brings the examples of this shard into its journal, and marks the shard as done."""
    if anew:
        remove_work(layout)  # only now that all that is needed was found; a finished dataset stays until the end
    record = write_record(layout, _record(config, job, corpus, parts))
    job.check_continues(Job.from_record(record), str(layout.root), finished=False)
    _capture_examples(config, layout, corpus, parts, stages)
    mark_done(layout, config, skipped=corpus.skipped + parts.tokenizer.skipped)


@dataclass(frozen=True)
class _Parts:
    """What a job that has something to do needs in memory."""

    tokenizer: TextTokenizer
    backbone: Backbone
    layers: list[LayerFacts]
    selection: Selection


def _earlier_job(config: Config, layout: Layout) -> Job | None:
    """The job that this one continues, or whose finished dataset it finds; None where it starts anew.

    An unfinished job of the same fingerprint is continued even with `output.overwrite`: a requeued job, or one
    started again, must not throw away what it did itself.
    """
    record = read_record(layout)
    if record is None and layout.manifest.exists():
        record = None if config.output.overwrite else manifests.read(layout.root)
    if record is None:
        return None
    earlier = Job.from_record(record)
    if config.output.overwrite and earlier.fingerprint != fingerprint(config):
        return None
    # The fingerprint alone, before anything is asked of the Hub: the commits of another model say nothing here.
    mine = Job(fingerprint(config), earlier.commits, earlier.versions)
    mine.check_continues(earlier, str(layout.root), finished=not layout.job_file.exists())
    return earlier


def _is_captured(config: Config, layout: Layout) -> bool:
    """Whether this shard's journal is complete and intact; what a damaged one lacks is to be captured again."""
    shard = config.shard
    done = layout.shard_done(shard.index, shard.count)
    if done.exists() and not Journal(layout.journal(shard.index, shard.count)).is_whole:
        done.unlink()
    return done.exists()


def _check_nothing_new(layout: Layout, config: Config, corpus: Corpus) -> None:
    """Refuses to take a finished dataset of fewer or more examples for the one that is asked for."""
    there: int | None = manifests.read(layout.root)["source_rows"]
    now = _source_rows(config, corpus)
    if there != now:
        raise StoreError(
            f"{layout.root} is finished with {there} rows of the dataset, and {now} are asked for now "
            "(dataset.max_samples, or the dataset itself, has changed). Adding to a finished dataset is not built "
            "yet: give this job another folder (output.data_root=...), or replace the dataset with "
            "output.overwrite=true"
        )


def _source_rows(config: Config, corpus: Corpus) -> int | None:
    """How many rows of the source the dataset is of; None for all rows of a stream, which cannot be counted."""
    return config.dataset.max_samples if corpus.num_rows is None else corpus.num_rows


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
    tokenizer = load_tokenizer(config.model, hub_commit_of(commits["tokenizer"]))
    backbone = load_backbone(
        config.model,
        commit=commits["model"],
        pre_rope=config.capture.capture_pre_rope,
        banded_attention=config.inference.banded_attention,
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


def _record(config: Config, job: Job, corpus: Corpus, parts: _Parts) -> dict[str, Any]:
    """All that is needed to make the dataset from the journals, and what the manifest tells of the model."""
    layers = []
    for layer in parts.layers:
        chosen = {kind: list(heads) for number, kind, heads in parts.selection if number == layer.heads.layer}
        layers.append(layer.to_dict() | {"captured": chosen})
    return job.to_dict() | {
        "config": config.to_dict(),
        "source_rows": _source_rows(config, corpus),
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


def _capture_examples(config: Config, layout: Layout, corpus: Corpus, parts: _Parts, stages: Stages) -> None:
    """Brings every example of this shard into its journal."""
    shard, inference = config.shard, config.inference
    journal = Journal(layout.journal(shard.index, shard.count))
    total = None if corpus.num_rows is None else len(range(shard.index, corpus.num_rows, shard.count))
    if journal.records:
        log.info("resuming: %d of %s examples are done", len(journal.records), "?" if total is None else total)
    sampler = Sampler(config.sampler)
    progress = Progress(total, len(journal.records))
    tokens_wanted = config.capture.capture_token_ids or config.capture.capture_token_strings
    try:
        with journal.writer(
            queue_bytes=inference.queue_mb * 2**20, segment_bytes=inference.segment_mb * 2**20
        ) as writer:
            capture = Capture(parts.backbone, parts.selection, sampler, writer, token_ids=tokens_wanted, stages=stages)
            examples = corpus.examples(shard_index=shard.index, shard_count=shard.count)
            spent = dict(stages.seconds)
            space_checked = False
            for lengths, tokens in _tokenized(config, examples, parts.tokenizer, journal, stages):
                if not space_checked:
                    _check_space(layout, parts, sampler, list(lengths.values()), corpus.num_rows, journal)
                    space_checked = True
                for batch in _batches(config, lengths, tokens):
                    shape = _capture_batch(capture, batch, writer, progress, stages)
                    if inference.debug_logging:
                        now = stages.seconds | {"write": writer.write_s}
                        log.info("batch of %d x %d tokens: %s", *shape, _by_stage(now, spent))
                        spent = now
            with stages("write"):
                writer.close()
    finally:
        progress.close()
    if not journal.records and shard.count == 1:
        raise SourceError(f"dataset {config.dataset.path} has no text that gives a token: nothing was captured")


def _tokenized(
    config: Config, examples: Iterator[Example], tokenizer: TextTokenizer, journal: Journal, stages: Stages
) -> Iterator[tuple[dict[int, int], dict[int, Tokens]]]:
    """Look-ahead windows that are not all done: the length of every example by index, the tokens of those to run."""
    done = dict(journal.records)
    for window in windows(examples, config.inference.lookahead):
        for example in window:
            _check_unchanged(example, done.get(example.index))
        fresh = [example for example in window if example.index not in done]
        if not fresh:
            continue
        with stages("tokenize"):
            tokens = {made.index: made for made in tokenizer(fresh)}
        both = ((example.index, done.get(example.index) or tokens.get(example.index)) for example in window)
        yield {index: found.num_tokens for index, found in both if found is not None}, tokens


def _batches(config: Config, lengths: dict[int, int], tokens: dict[int, Tokens]) -> Iterator[list[Tokens]]:
    """The batches of a window that are to be run.

    Which examples share a batch follows from the whole window, done or not, so that a job that was killed runs the
    same batches as one that was not.
    """
    inference, order = config.inference, list(lengths)
    for batch in batches(
        list(lengths.values()), max_batch_tokens=inference.max_batch_tokens, batch_size=inference.batch_size
    ):
        members = [tokens[order[place]] for place in batch if order[place] in tokens]
        if members:
            yield members


def _check_unchanged(example: Example, record: ExampleRecord | None) -> None:
    if record is not None and text_hash(example.text) != record.text_hash:
        raise SourceError(
            f"row {example.index} of the dataset (id {example.source_id}) is not the text that was captured before "
            "the job stopped: the source has changed. Restore it, or start anew with output.overwrite=true"
        )


def _capture_batch(
    capture: Capture, batch: Sequence[Tokens], writer: JournalWriter, progress: Progress, stages: Stages
) -> tuple[int, ...]:
    """Brings one batch into the journal; returns its shape (B, n)."""
    with stages("plan"):
        plan = capture.plan(batch)
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
            for example in batch
        ]
    )
    progress.add(len(batch), sum(example.num_tokens for example in batch), capture.num_rows(plan))
    return plan.ids.shape


def _by_stage(now: dict[str, float], before: dict[str, float]) -> str:
    # Tokenizing is done for a whole look-ahead window and counts for its first batch; writing goes on beside the rest.
    stages = ("tokenize", "plan", "forward", "gather", "transfer", "queue", "write")
    return ", ".join(f"{name} {now.get(name, 0.0) - before.get(name, 0.0):.4f} s" for name in stages)


def _check_space(
    layout: Layout, parts: _Parts, sampler: Sampler, lengths: list[int], num_rows: int | None, journal: Journal
) -> None:
    """Checks the disk for the whole job, as if all examples were as long as those of the first window."""
    if num_rows is None or not lengths:
        return
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
    ensure_space(layout.root, required - there)
