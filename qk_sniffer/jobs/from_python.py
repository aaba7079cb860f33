"""Makes datasets of captures from Python: their record, their claim to a folder, and their end.

Such a capture is like a job of one shard, with the same files. It differs in one thing: nobody can repeat its calls. No
job resumes it or adds to its dataset, and it replaces the work in a folder only if it is told to.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qk_sniffer.config import Config, DatasetConfig, OutputConfig, ShardConfig, VerifyConfig
from qk_sniffer.corpus.token_ids import NO_TOKENIZER
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.jobs.assemble import finish_interrupted_promotion, mark_done
from qk_sniffer.jobs.finish import make_dataset
from qk_sniffer.jobs.identity import Job
from qk_sniffer.jobs.software import installed, versions_of_loaded
from qk_sniffer.jobs.source_rows import START_PATIENCE_S
from qk_sniffer.resolved import ResolvedConfig, fingerprint, resolve, safe_name
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.disk import type_of
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import Lock, hold
from qk_sniffer.store.places import refuse_unlisted
from qk_sniffer.store.record import new_job_id, read_record, write_record
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.store.work_folder import discard_work, prepare_data_root, remove_work
from qk_sniffer.text import counted
from qk_sniffer.timing import Stages

SOURCE = "python"
"""The `source` in the record and the manifest of a capture from Python."""

LONGEST = 2**31 - 1
"""The `model.tokenizer.max_length` of a capture from Python: nothing is cut."""


def settings_of(config: Config, facts: Mapping[str, Any]) -> ResolvedConfig:
    """Returns the settings of a capture from Python as a dataset states them.

    Args:
        config: the settings of the capture. Of `model`, `name` is that of the user's model, None if it is not known.
        facts: those of the model, in the form of the manifest.
    """
    # The tokenizer is not known. Its revision is the one that every reader fills in.
    tokenizer = replace(config.model.tokenizer, revision=config.model.revision)
    values = {name: getattr(config, name) for name in ("sampler", "capture", "inference")}
    known = {name: facts[name] for name in ("dtype", "attn_implementation")}
    model = replace(config.model, tokenizer=tokenizer, **known)
    if model.name is None:
        model = replace(model, slug=safe_name(facts["model_type"]))
    resolved = resolve(
        Config(**values, model=model, dataset=DatasetConfig(slug=SOURCE), verify=VerifyConfig(examples=0))
    )
    return replace(resolved, model=replace(resolved.model, tokenizer=tokenizer), output=OutputConfig())


def record_of(
    config: ResolvedConfig, model: Mapping[str, Any], commit: str | None, *, quantizers: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the record of a capture from Python: what is known of it before its first call.

    Args:
        config: from `settings_of`.
        model: the facts of the model, in the form of the manifest.
        commit: the commit of the model on the Hub that its config tells, if any.
        quantizers: the packages that quantize its weights.
    """
    packages = ["torch", "transformers", *(["peft"] if "adapter" in model else [])]
    versions = installed(packages) | versions_of_loaded(quantizers)
    job = Job(fingerprint(config), {"model": hub_commit_of(commit), "tokenizer": None, "dataset": None}, versions)
    unknown: dict[str, list[str]] = {"license": [], "language": []}
    return job.to_dict() | {
        "source": SOURCE,
        "config": config.to_dict(),
        "source_rows": None,
        "base": None,
        "stated": {"model": unknown, "dataset": unknown},
        "model": dict(model),
        "tokenizer": {"class": NO_TOKENIZER},
    }


@contextmanager
def registered(folder: Path, record: Mapping[str, Any], *, overwrite: bool, way_out: str) -> Iterator[Claim]:
    """Registers a capture from Python as the job of a folder, and holds the folder within the block.

    Creates the folder. Removes it again if it is empty at the end.

    Args:
        folder: of the dataset.
        record: from `record_of`.
        overwrite: whether the capture replaces a dataset or the work of another job in the folder. It never replaces
            other files.
        way_out: ends the error about work in the folder.

    Raises:
        StoreError: the folder has a dataset, the work of another job or other files; or it cannot be written.
        InUseError: another process works in the folder.
    """
    existed = folder.exists()
    layout = prepare_data_root(folder, overwrite=overwrite, setting="folder")
    made = layout.root.stat()
    try:
        with hold(layout.shard_lock(0, 1), "capturing from Python", replace=overwrite) as lock, lock.explaining():
            finish_interrupted_promotion(layout, lock, overwrite=overwrite)
            if not overwrite:
                _check_free(layout, lock, way_out)
            refuse_unlisted(layout)
            yield Claim(lock, layout, _register(layout, record, lock, overwrite=overwrite, way_out=way_out))
    finally:
        if not existed:
            with suppress(OSError):
                if os.path.samestat(made, layout.root.stat()):
                    layout.root.rmdir()


def finish_capture(claim: Claim, config: ResolvedConfig) -> dict[str, Any]:
    """Makes the dataset of the examples in the journal of a capture from Python. Returns its manifest.

    Raises:
        StoreError: the journal has no example, or the disk is full or fails.
        TakenAwayError: the folder is no longer the capture's.
    """
    _mark(claim)
    done = make_dataset(config, claim.layout, claim.job_id, None, None, Stages(), claim.lock)
    assert done is not None, "the shard's lock is held, and it is the only one"
    return done[1]


def end_capture(layout: Layout, record: Mapping[str, Any]) -> None:
    """Ends a capture from Python whose process has died: its dataset is made of the examples that are durable.

    Raises:
        StoreError: no example is.
        InUseError: the capture is running.
    """
    with hold(layout.shard_lock(0, 1), "ending a capture from Python") as lock, lock.explaining():
        _mark(Claim(lock, layout, record["job_id"]))


def discard_capture(claim: Claim) -> None:
    """Removes the work of a capture from Python, unless its dataset is whole and only to be moved to its place."""
    if type_of(claim.layout.staging.manifest, claim) is None:
        claim.check()
        remove_work(claim.layout, claim.lock)


def unfinished_capture(layout: Layout, job_id: str) -> str:
    """Says that a folder holds an unfinished capture from Python, and how to finish it."""
    journal = Journal(layout.journal(0, 1), job_id, verify=False)
    what = f"{layout.root} holds an unfinished capture from Python, of {counted(len(journal.records), 'whole example')}"
    if not journal.records:
        return what
    return f"{what}: python -m qk_sniffer.finalize data_root={layout.root} makes a dataset of them"


def _mark(claim: Claim) -> None:
    journal = Journal(claim.layout.journal(0, 1), claim.job_id, verify=False, access=claim)
    if not journal.records:
        raise StoreError(
            f"the capture from Python in {claim.layout.root} has no whole example: there is nothing to make a dataset "
            "of. Remove the folder, and capture again"
        )
    mark_done(claim.layout, ShardConfig(), claim=claim, rows=None, examples=len(journal.records), skipped=0)


def _check_free(layout: Layout, lock: Lock, way_out: str) -> None:
    record = read_record(layout, lock)
    if record is not None and "source" in record:
        raise StoreError(f"{unfinished_capture(layout, record['job_id'])}. {way_out}")
    if record is not None:
        raise StoreError(f"{layout.root} holds an unfinished job: rerun its command to resume it. {way_out}")
    if type_of(layout.manifest, lock) is not None:
        raise StoreError(f"{layout.root} holds a finished dataset. {way_out}")


def _register(layout: Layout, record: Mapping[str, Any], lock: Lock, *, overwrite: bool, way_out: str) -> str:
    with hold(layout.start_lock, "starting", wait_s=START_PATIENCE_S, replace=overwrite, access=lock):
        if overwrite:
            with suppress(UnreadableError):
                if read_record(layout, lock) is None:
                    return _write(layout, record, lock)
            discard_work(layout, lock.path, lock)
        else:
            _check_free(layout, lock, way_out)  # a job may have started meanwhile
        return _write(layout, record, lock)


def _write(layout: Layout, record: Mapping[str, Any], lock: Lock) -> str:
    job_id = new_job_id(record)
    write_record(layout, {**record, "job_id": job_id}, access=lock)
    return job_id
