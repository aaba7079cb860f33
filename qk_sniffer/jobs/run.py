"""Runs one job, from its config to a finished dataset.

A job is a function of its config. It runs the same way here, in a sweep, on SLURM and in a test.

What needs torch is imported where it is used: a finished dataset, and mistakes, are answered without it.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from qk_sniffer.config import Config
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.client import require_access, require_uploads_from
from qk_sniffer.hub.revisions import check_cache
from qk_sniffer.jobs.assemble import finish_interrupted_promotion, is_still_done, remove_unreadable_marks
from qk_sniffer.jobs.finish import Outcome, finish, report_and_publish
from qk_sniffer.jobs.job_record import record_of
from qk_sniffer.jobs.prefetch import in_background
from qk_sniffer.jobs.segment_names import check_segment_names
from qk_sniffer.jobs.signals import Stopping
from qk_sniffer.jobs.source_rows import change_limit
from qk_sniffer.jobs.start import Start, change_output, find_existing_work, is_yet_to_publish, register_job
from qk_sniffer.logs import logger
from qk_sniffer.machine import return_memory, trim_memory
from qk_sniffer.resolved import ResolvedConfig, resolve, with_output
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.layout import MANIFEST, Layout
from qk_sniffer.store.locks import hold, restart_patience_s
from qk_sniffer.store.places import refuse_unlisted
from qk_sniffer.store.previous import PreviousVersion
from qk_sniffer.store.privacy import privacy
from qk_sniffer.store.work_folder import prepare_data_root, remove_leftovers
from qk_sniffer.timing import Stages
from qk_sniffer.validation import check

if TYPE_CHECKING:
    from qk_sniffer.jobs.components import Components

log = logger(__name__)


def run_job(config: Config, begin: Callable[[], None] = lambda: None) -> Outcome:
    """Runs the job of `config`, or the part of it that is not done yet; with `dry_run`, shows its plan.

    Calls `begin` when nothing refuses the job any more, before it captures, or before it makes, checks or publishes a
    dataset.

    Raises:
        QkSnifferError: names what is wrong and the way out; everything written before is kept.
        Stopped: a signal came (see `signals.py`); complete batches are kept.
    """
    if config.dry_run:
        from qk_sniffer.jobs.dry_run import show_plan

        plan = show_plan(config)
        if plan is not None:
            plan.check_space()
        return Outcome()
    check(config)
    job = resolve(config)
    job = with_output(job, replace(job.output, private=privacy(Layout(job.data_root), asked=job.output.private)))
    if job.output.hf_repo_id:
        require_uploads_from(job.data_root)
        require_access(job.output.hf_repo_id, private=job.output.private)  # now, not after hours of capture
    if not all(name and Path(name).is_dir() for name in _loaded_from(job)):
        check_cache()
    existed = job.data_root.exists()
    layout = prepare_data_root(job.data_root, overwrite=job.output.overwrite)
    made = layout.root.stat()
    return_memory()
    try:
        with Stopping() as stopping:
            return _run(job, layout, Stages(), stopping, begin)
    finally:
        if not existed:
            with suppress(OSError):
                if os.path.samestat(made, layout.root.stat()):  # and not the folder of another job
                    layout.root.rmdir()  # a job that failed before it wrote anything leaves nothing


def _loaded_from(job: ResolvedConfig) -> list[str | None]:
    names = [job.model.name, job.model.tokenizer.name]
    return names if job.model.adapter is None else [*names, job.model.adapter]


def _run(
    config: ResolvedConfig, layout: Layout, stages: Stages, stopping: Stopping, begin: Callable[[], None]
) -> Outcome:
    shard, overwrite = config.shard, config.output.overwrite
    path, purpose = layout.shard_lock(shard.index, shard.count), f"capturing shard {shard.index} of {shard.count}"
    with hold(path, purpose, wait_s=restart_patience_s(), replace=overwrite) as lock, lock.explaining():
        promoted = finish_interrupted_promotion(layout, lock, overwrite=overwrite)
        with stages("open dataset"):
            start = find_existing_work(config, layout, is_mine=promoted or is_yet_to_publish(config, layout))
        if start.found == "finished":
            begin()
            remove_leftovers(layout, lock.path, lock)
            note = "Nothing to do: the dataset is finished."
            return report_and_publish(config, layout, note, start.files, lock)
        refuse_unlisted(layout)
        if start.found == "unfinished":
            change_limit(config, layout, start.corpus, access=lock)
            change_output(config, layout, lock)
        if start.base is not None:
            start.base.fetch()  # now, not after hours of capture
        components = None
        claim = None if start.job_id is None else Claim(lock, layout, start.job_id)
        if claim is not None and overwrite:
            remove_unreadable_marks(layout, shard.count, claim)
        if claim is None or not is_still_done(layout, shard, claim):
            log.info("loading %s ...", config.model.slug)  # before torch, whose import takes seconds
            from qk_sniffer.jobs.capture_examples import capture_examples

            components = _load(config, start, stages)
            start = replace(start, job=start.job.with_loaded(components.versions))
            check_segment_names(config, start.corpus, components.tokenizer)
            record = record_of(config, start, components)
            job_id = register_job(layout, start, record, own_lock=lock, overwrite=overwrite)
            claim = Claim(lock, layout, job_id)
            begin()
            capture_examples(config, layout, start, claim, components, stages, stopping)
        else:
            begin()
        trim_memory()  # of the forward passes, before the compaction starts its threads
        return finish(config, layout, claim.job_id, start.corpus, components, stages, lock) or Outcome()


def _load(config: ResolvedConfig, start: Start, stages: Stages) -> "Components":
    """Loads the components. At the same time, checks the dataset that the job adds to."""
    from qk_sniffer.jobs.components import load_components

    if start.base is None:
        return load_components(config, start.job.commits, stages)
    with in_background(partial(_check_base, start.base)) as wait:
        components = load_components(config, start.job.commits, stages)
        with stages("check dataset"):
            wait()
    return components


def _check_base(base: PreviousVersion, stop: Event) -> None:
    """Checks the dataset that the job adds to, as `verify` does: its files, and then what is in them.

    Its rows become those of the job's own dataset, whose proof draws a few examples. A damaged file would otherwise be
    noticed when all new rows are captured.

    Raises:
        StoreError: the dataset is damaged, or is not what its manifest says.
    """
    from qk_sniffer.dataset.verify import verify_data

    base.check_files(stop)
    report = verify_data(base.files.path(MANIFEST).parent, stop)
    if report.problems:
        raise StoreError(f"nothing can be added to {base.files}, which is not whole:", *report.wrong)
