"""Measures how long a job takes (`dry_run=measure`): runs two small jobs over some of its batches.

Their folder is on the disk of the data root, and is removed. The first small job runs one batch. It shows what is slow
once: the first forward pass, and the pictures. The second one runs the batches that the time of the others is estimated
from. Both are whole: a journal, its compaction, the proof and the promotion.
"""

import io
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qk_sniffer.capture.capture import BatchPlan, Capture
from qk_sniffer.capture.proof_examples import SHARE, SPREAD, tokens_to_derive
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import ShardConfig
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.assemble import captured_job, mark_done, stage
from qk_sniffer.jobs.capture_examples import open_capture, open_writer, plans
from qk_sniffer.jobs.components import Components
from qk_sniffer.jobs.estimate import Batch, Batches, duration, fit, line_through
from qk_sniffer.jobs.finish import make_dataset
from qk_sniffer.jobs.job_record import record_of
from qk_sniffer.jobs.pictures import draw_pictures
from qk_sniffer.jobs.plan import Plan, make_plan
from qk_sniffer.jobs.plan_lines import labelled, right
from qk_sniffer.jobs.prefetch import ahead
from qk_sniffer.jobs.signals import SIGNALS, Stopping
from qk_sniffer.jobs.start import Start, register_job
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.locks import hold
from qk_sniffer.store.open_folder import Checked, OpenFolder
from qk_sniffer.store.same_dataset import check_same
from qk_sniffer.store.work_folder import prepare_data_root
from qk_sniffer.text import aligned
from qk_sniffer.timing import Stages

LONGEST_S = 20.0
"""The seconds after which no further batch is timed."""

SHORTEST_S, ENOUGH = 3.0, 0.05
"""The seconds after which no further batch is timed once this share of the job's arithmetic is done."""

FEWEST = 3
"""The batches that are timed at least; twice as many before the job's share ends the timing."""


@dataclass(frozen=True)
class Measured:
    """The estimated seconds of a job by stage, and the batches that they follow from."""

    seconds: dict[str, float]
    batches: int
    tokens: int
    """Of these batches."""

    @property
    def total(self) -> float:
        """The seconds of the whole job."""
        return sum(self.seconds.values())

    def lines(self, plan: Plan) -> list[str]:
        """Returns the lines to print, of at most 80 characters."""
        rows = [("stage", "time"), *((name, duration(seconds)) for name, seconds in self.seconds.items())]
        table = aligned([*right([*rows, ("together", f"{duration(self.total)}")])])
        notes = [
            ("publishing", plan.config.output.hf_repo_id is not None),
            ("the check of the finished dataset", plan.there > 0),
            (f"the work of the other {plan.config.shard.count - 1} shards", plan.config.shard.count > 1),
        ]
        left_out = [note for note, applies in notes if applies]
        threads = torch.get_num_threads()
        where = f"{plan.model.device}, {threads} thread{'' if threads == 1 else 's'}"
        measured = (
            f"on {where}: {self.batches:,} of {plan.counts.batches:,} batches, "
            f"{self.tokens:,} of {plan.counts.tokens:,} tokens"
        )
        return [
            *table.split("\n"),
            "",
            *labelled("measured", measured),
            *(labelled("left out", ", ".join(left_out)) if left_out else []),
        ]


@dataclass(frozen=True)
class _Run:
    """A small job. Times are in seconds."""

    batches: Sequence[Batch]
    times: Sequence[float]
    """Of each batch, without the end of a group and the check of attention kernels."""
    check: float
    """The check of attention kernels over the longest text."""
    group: float
    """The end of a group of batches, with statistics."""
    write: float
    """Of the journal's writer, without copies from a device."""
    journal: int
    """The bytes of the journal."""
    stages: dict[str, float]
    """The stages of a job. Of the first one also "first compact", "pictures" and "record", the start of its work."""
    proven_flops: float
    """The arithmetic of the proof."""


@dataclass(frozen=True)
class _Timed:
    """The times of batches, as in `_Run`."""

    times: Sequence[float]
    check: float
    group: float


def measure(
    config: ResolvedConfig,
    start: Start,
    components: Components,
    plan: Plan,
    batches: Batches,
    stages: Stages,
) -> Measured | None:
    """Measures the job of `config`, whose `batches` were noted while it was planned; None if it has none left.

    Args:
        config: of the job.
        start: its start.
        components: its model and tokenizer.
        plan: its plan.
        batches: its batches.
        stages: the seconds to find the job's work, to load the model and to tokenize all texts.

    Raises:
        StoreError: no folder can be made on the disk of the data root, or the disk fails.
        Stopped: a signal came; the folder is removed.
    """
    sample = batches.sample()
    if not sample or batches.first is None:
        return None
    smallest = min(sample, key=lambda batch: batches.flops_of(batches.terms_of(batch)))
    with Stopping() as stopping, _folder(config.data_root) as folder:
        job = partial(_run, config, start, components, batches, stopping)
        one = job(folder / "one", [smallest], is_first=True)
        some = job(folder / "some", sample, is_first=False)
    with stages("plan"):
        make_plan(config, plan.model, [batches.first], wanted=plan.texts, is_whole=False)
    return Measured(
        _seconds(config, components, plan, batches, stages, one, some),
        len(some.batches),
        sum(example.num_tokens for batch in some.batches for example in batch),
    )


def _seconds(
    config: ResolvedConfig,
    components: Components,
    plan: Plan,
    batches: Batches,
    stages: Stages,
    one: _Run,
    some: _Run,
) -> dict[str, float]:
    """Returns the estimated seconds of each stage of the job."""
    found = fit(batches.terms_of_all(some.batches), some.times)
    first = max(0.0, one.times[0] - float((batches.terms_of_all(one.batches) @ found)[0]))
    capture = float((batches.terms @ found).sum()) + first + max(one.check, some.check)
    if config.capture.statistics.enabled:
        capture += some.group * plan.counts.groups
    writing = some.write / some.journal
    # A writer that is faster than the forward passes has about a segment left to write after the last of them.
    capture = max(capture, writing * plan.journal) + writing * min(plan.journal, config.inference.segment_mb << 20)
    stored = plan.journal + plan.in_journal + plan.there
    compact = line_through((one.journal, one.stages["compact"]), (some.journal, some.stages["compact"]), stored) + max(
        0.0, one.stages["first compact"] - one.stages["compact"]
    )
    others = ("open dataset", "load model", "plan")
    return {
        "tokenize": stages.seconds.get("tokenize", 0.0),
        "capture": capture,
        "compact": compact,
        "verify": some.stages["verify"] * _more_proof(config, components, plan, batches, some),
        "others": sum(stages.seconds.get(name, 0.0) for name in others)
        + one.stages["record"]
        + some.stages["promote"]
        + one.stages["pictures"],
    }


def _more_proof(config: ResolvedConfig, components: Components, plan: Plan, batches: Batches, some: _Run) -> float:
    """Returns the arithmetic of the job's proof, divided by that of the small job, which has fewer examples to draw.

    The job's proof is taken to be of examples of mean length and, with rows, of the longest one, if its limit allows.
    """
    cost = components.cost
    examples = [example for batch in some.batches for example in batch]
    of_sample = sum(batches.flops_of(batches.terms_of(batch)) for batch in some.batches)
    least, most = (max(SHARE * flops, cost.few) for flops in (of_sample, batches.flops))
    is_enough = len(examples) >= 4 * SPREAD and some.proven_flops < least / 2
    if config.verify.examples is not None or not some.proven_flops or is_enough:
        return 1.0
    spread, mean = min(SPREAD, plan.counts.examples), batches.flops / plan.counts.examples
    longest = float(cost.flops(tokens_to_derive(max(example.num_tokens for example in examples), None)))
    of_job = min(most, longest + spread * mean) if plan.rows else 0.0
    if config.capture.statistics.enabled:
        of_job += min(most, 2 * spread * mean)
    return max(1.0, of_job / some.proven_flops)


def _run(
    config: ResolvedConfig,
    start: Start,
    components: Components,
    batches: Batches,
    stopping: Stopping,
    root: Path,
    sample: Sequence[Batch],
    *,
    is_first: bool,
) -> _Run:
    """Runs a small job over batches of `sample` at `root`: over all of them, or as many as the constants allow."""
    output = replace(
        config.output, data_root=str(root), hf_repo_id=None, resume_from_hub=False, overwrite=False, private=False
    )
    config = replace(config, output=output, shard=ShardConfig(), dry_run=False)
    job = replace(start.job, fingerprint={**start.job.fingerprint, "shard.count": 1})
    start = replace(start, job=job, found="nothing", base=None, job_id=None, replaces=None)
    layout, stages = prepare_data_root(root), Stages()

    def flops_of(batch: Batch) -> float:
        return batches.flops_of(batches.terms_of(batch))

    texts = sum(example.part == 0 for batch in sample for example in batch)
    with hold(layout.shard_lock(0, 1), "measuring") as lock:
        with stages("record"):
            record = record_of(config, start, components) | {"source_rows": texts}
            job_id = register_job(layout, start, record, own_lock=lock, overwrite=False)
        claim = Claim(lock, layout, job_id)
        journal = Journal(layout.journal(0, 1), job_id, access=claim)
        with open_writer(config, components, journal, claim) as writer:
            capture = open_capture(config, components, Sampler(config.sampler), writer, stages)
            statistics = config.capture.statistics.enabled
            groups = ((batch, not statistics) for batch in sample)
            with ahead(plans(capture, groups, Stages())) as planned:
                timed = _time(capture, planned, len(sample), flops_of, batches.flops, stages, stopping)
            writer.close()
        ran = sample[: len(timed.times)]
        captured = sum(example.part == 0 for batch in ran for example in batch)
        # Texts that were not run count as texts without a token.
        mark_done(
            layout, config.shard, claim=claim, rows=texts, examples=len(journal.records), skipped=texts - captured
        )
        size = sum(path.stat().st_size for path in journal.folder.glob("*.safetensors"))
        if is_first:
            with stages("first compact"), captured_job(layout, job_id, lock) as captured_one:
                assert captured_one is not None
                stage(layout, captured_one, config.located, components.tokenizer)
        made = make_dataset(config, layout, job_id, start.corpus, components, stages, lock)
        assert made is not None, "another process makes the dataset in a folder of this one"
        manifest = made[1]
        if is_first:
            unchanged = Checked(lock, partial(check_same, layout, manifest))
            with stages("pictures"), redirect_stdout(io.StringIO()):  # which names files that are removed
                draw_pictures(layout, unchanged, manifest)
    return _Run(
        ran,
        timed.times,
        timed.check,
        timed.group,
        writer.write_s,
        size,
        stages.seconds,
        _proven_flops(manifest["proof"], [example for batch in ran for example in batch], components),
    )


def _time(
    capture: Capture,
    planned: Iterator[BatchPlan],
    number: int,
    flops_of: Callable[[Batch], float],
    flops: float,
    stages: Stages,
    stopping: Stopping,
) -> _Timed:
    """Captures batches and times each of them: at most `number`, or as many as the constants allow for `flops`."""
    timed, done, began, last = _Timed([], 0.0, 0.0), 0.0, 0.0, 0.0
    for plan in planned:
        now = time.perf_counter()
        if not timed.times:
            began = last = now  # nothing overlaps with the first plan
        checked = stages.seconds.get("check attention", 0.0)
        with stopping.deferred():
            capture.run(plan)
            _synchronize()
            done += flops_of(plan.examples)
            took = time.perf_counter() - began
            count = len(timed.times) + 1
            is_enough = count >= 2 * FEWEST and took > SHORTEST_S and done > ENOUGH * flops
            is_last = count == number or is_enough or (count >= FEWEST and took > LONGEST_S)
            before = time.perf_counter()
            capture.finish(replace(plan, ends_group=plan.ends_group or is_last))
            now = time.perf_counter()
        group = 0.0 if plan.ends_group else now - before
        check = stages.seconds.get("check attention", 0.0) - checked
        timed = _Timed([*timed.times, now - last - group - check], max(timed.check, check), max(timed.group, group))
        last = now
        if is_last:
            break
    return timed


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _proven_flops(proof: Mapping[str, Any], examples: Sequence[Tokens], components: Components) -> float:
    """Returns the arithmetic of a proof over some of these examples. That of statistics runs each one twice."""
    tokens = {example.example_id: example.num_tokens for example in examples if not example.part}
    mean = sum(example.num_tokens for example in examples) // len(examples)  # of parts, which have other numbers there
    runs = [*proof.get("examples", []), *2 * proof.get("statistics", {}).get("examples", [])]
    lengths = [tokens_to_derive(tokens.get(each, mean), None) for each in runs]
    return float(components.cost.flops(lengths).sum())


@contextmanager
def _folder(root: Path) -> Iterator[Path]:
    """Makes a folder on the disk of the data root `root`, and removes it: no signal interrupts that.

    Raises:
        StoreError: it cannot be made.
    """
    parent = next(path for path in root.absolute().parents if path.is_dir())
    name = f".qk-sniffer-measure-{secrets.token_hex(8)}"
    with ExitStack() as opened:
        try:
            outer = opened.enter_context(OpenFolder.at(parent))
            folder = opened.enter_context(outer.new_folder(name))
            os.fchmod(folder.descriptor, 0o700)  # nobody else has anything to do in it
        except OSError as error:
            raise StoreError(
                f"cannot write to {parent}, where the job is measured: {error.strerror}. Choose another "
                "output.data_root, or see the plan alone with dry_run=true"
            ) from error
        try:
            yield folder.path
        finally:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                for each in folder.names():  # of the open folder: its name may be that of another one by now
                    folder.remove(each)
                outer.rmdir(name)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
