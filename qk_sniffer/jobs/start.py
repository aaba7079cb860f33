"""Decides how a job starts: from nothing, from the work of an earlier start, or not at all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qk_sniffer.corpus.batches import check_same_texts
from qk_sniffer.corpus.examples import Corpus, open_corpus
from qk_sniffer.corpus.tokens import Tokenizer
from qk_sniffer.dataset.dataset_files import DatasetFiles
from qk_sniffer.errors import HubError, SourceError, StoreError
from qk_sniffer.hub.branch import Branch
from qk_sniffer.jobs.hub_resume import branch_ahead
from qk_sniffer.jobs.identity import Job, refuse_from_python, resolve_commits
from qk_sniffer.jobs.loaded_code import (
    check_same_code,
    check_same_loaded,
    check_same_weights,
    differences_of_loaded,
)
from qk_sniffer.jobs.shards import journals_of
from qk_sniffer.jobs.source_rows import START_PATIENCE_S, changes_limit, limit_problem, source_rows
from qk_sniffer.jobs.tokenizers import tokenizer_once
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig, fingerprint, without_batching
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.disk import type_of
from qk_sniffer.store.files import Files, Folder
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import Lock, hold
from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.previous import PreviousVersion, describe
from qk_sniffer.store.privacy import remember_privacy
from qk_sniffer.store.record import new_job_id, read_record, read_unpublished, write_record
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.store.work_folder import discard_work
from qk_sniffer.text import compact_ranges, shortened

log = logger(__name__)


@dataclass(frozen=True)
class Start:
    """The job's identity, and the work that it continues. `corpus` is open at the commit that the job is pinned to."""

    job: Job
    corpus: Corpus
    found: Literal["nothing", "unfinished", "finished"]
    files: Files
    """The files of the existing work: in the data root, or on the branch of the Hub."""
    base: PreviousVersion | None = None
    """The finished dataset that the job adds to."""
    job_id: str | None = None
    """The identity of the unfinished job; None for a job that is not registered yet."""
    replaces: str | None = None
    """The identity of an unfinished job of the same settings that this one replaces; None if it replaces none."""

    @property
    def rows_before(self) -> int:
        """Source rows that the base was made from."""
        return 0 if self.base is None else int(self.base.record["source_rows"])


def find_existing_work(config: ResolvedConfig, layout: Layout, *, is_mine: bool = False) -> Start:
    """Finds the identity of the job of `config`, and whether it continues existing work. Changes nothing.

    Even with `output.overwrite`, an unfinished job of the same configuration is resumed: a requeued or restarted job
    must not discard its own work. `is_mine` says that the finished dataset is this job's: this start completed its
    promotion, or an earlier one has yet to publish it.

    Raises:
        StoreError: another job's work or dataset exists, and `output.overwrite` is false.
        SourceError: the model's commit or the dataset cannot be found.
    """
    existing = _existing_work(config, layout)
    settings = fingerprint(config)
    if _starts_over(existing, settings, overwrite=config.output.overwrite, is_mine=is_mine):
        return _new_start(config, existing.files)
    assert existing.record is not None
    refuse_from_python(existing.record, str(existing.files))
    earlier = Job.from_record(existing.record)
    # Compares the settings alone before any request to the Hub: the commits of another model are irrelevant here.
    finished = existing.state == "finished"
    Job(settings, earlier.commits, earlier.versions).check_continues(earlier, str(existing.files), finished=finished)
    corpus = open_corpus(config.dataset, earlier.commits["dataset"])
    job = Job.of(config, resolve_commits(config, earlier) | {"dataset": corpus.commit})
    if finished:
        try:
            return _continue_finished(config, layout, existing, job, corpus)
        except (SourceError, StoreError) as error:
            if not config.output.overwrite:
                raise
            log.warning("the finished dataset is replaced: %s", error)
            return _new_start(config, existing.files)
    return _continue_unfinished(config, layout, existing, job, corpus)


def is_yet_to_publish(config: ResolvedConfig, layout: Layout) -> bool:
    """Whether a job that overwrites is to publish the finished dataset: an earlier start made it, and did not.

    A damaged one cannot be published.
    """
    if config.output.hf_repo_id is None or not config.output.overwrite:
        return False
    with suppress(StoreError):  # a dataset or a mark that cannot be read is replaced
        manifest = manifests.read(layout.root)
        if read_unpublished(layout, manifest) is None:
            return False
        log.info("checking the files of %s, which an earlier start has not published", layout.root)
        files = DatasetFiles(Folder(layout.root), manifest["files"])
        return all(files.is_intact(name) for name in files.listed)
    return False


@dataclass(frozen=True)
class _Existing:
    """The work that exists where a job would write: in the data root, or on its branch of the Hub."""

    state: Literal["nothing", "unfinished", "finished"]
    files: Files
    record: Mapping[str, Any] | None
    """The record of the unfinished job, or the manifest of the finished dataset."""


def _existing_work(config: ResolvedConfig, layout: Layout) -> _Existing:
    try:
        record = read_record(layout)
        if record is not None:
            return _Existing("unfinished", Folder(layout.root), record)
        manifest = manifests.read(layout.root) if layout.manifest.exists() else None
    except UnreadableError:
        if not config.output.overwrite:
            raise
        return _Existing("nothing", Folder(layout.root), None)  # the job replaces it
    if config.output.resume_from_hub and not config.output.overwrite:
        branch = branch_ahead(config, layout, manifest)
        if branch is not None:
            return _Existing("finished", branch, manifests.of(branch))
    return _Existing("nothing" if manifest is None else "finished", Folder(layout.root), manifest)


def _starts_over(existing: _Existing, settings: Mapping[str, Any], *, overwrite: bool, is_mine: bool) -> bool:
    """Whether the job ignores the existing work: there is none, or `output.overwrite` replaces it."""
    same_settings = existing.record is not None and (
        without_batching(Job.from_record(existing.record).fingerprint) == without_batching(settings)
    )
    match existing.state, overwrite, is_mine, same_settings:
        case "nothing", _, _, _:
            return True
        case _, False, _, _:
            return False
        case "finished", True, False, _:
            return True
        case _:  # its own work, unless the settings have changed
            return not same_settings


def _continue_finished(config: ResolvedConfig, layout: Layout, existing: _Existing, job: Job, corpus: Corpus) -> Start:
    """Does nothing, or adds the source's new rows to a finished dataset; refuses any other change."""
    files, manifest = existing.files, existing.record
    assert manifest is not None
    earlier = Job.from_record(manifest)
    job.check_continues(earlier, str(files), finished=True)
    if isinstance(files, Folder):
        check_files(layout, manifest)
    grows = _rows_are_added(files, manifest, config, corpus)
    on_hub = asdict(files) if isinstance(files, Branch) else None
    base = PreviousVersion(files, describe(files) | {"hub": on_hub})
    if corpus.commit is None:
        _check_texts(base, corpus, tokenizer_once(config, job.commits))
    if not grows:
        return Start(job, corpus, "finished", files)
    return Start(job.added_to(earlier), corpus, "nothing", files, base)


def _continue_unfinished(
    config: ResolvedConfig, layout: Layout, existing: _Existing, job: Job, corpus: Corpus
) -> Start:
    """Resumes an unfinished job; refuses one that differs, or replaces it with `output.overwrite`."""
    record = existing.record
    assert record is not None
    base, rows = base_of(layout, record), source_rows(config, corpus)
    if changes_limit(config, rows, record):
        problem = limit_problem(layout, rows, record, corpus)
        if problem and not config.output.overwrite:
            raise StoreError(problem)
        if not problem:
            record = {**record, "source_rows": rows}
    if config.output.overwrite:
        if not (_is_same(job, rows, record) and _is_there(base)):
            return _new_start(config, existing.files)
        if corpus.commit is None and not _has_texts_of(layout, record, corpus, tokenizer_once(config, job.commits)):
            return replace(_new_start(config, existing.files), replaces=record["job_id"])
    _check_same(job, rows, record, layout.root)
    if corpus.commit is None and config.dataset.messages_column is not None and config.has_segments:
        # The capture compares the hashes of texts, which have no roles of messages.
        check_same_texts(corpus, _captured_examples(layout, record), tokenizer_once(config, job.commits))
    if base is not None:
        base.check()
        if corpus.commit is None:
            _check_texts(base, corpus, tokenizer_once(config, job.commits))
    return Start(job, corpus, "unfinished", existing.files, base, record["job_id"])


def register_job(layout: Layout, start: Start, record: Mapping[str, Any], *, own_lock: Lock, overwrite: bool) -> str:
    """Stores `record` as that of the job in `layout`, unless another shard of the same job has done so.

    `own_lock` is the lock of this job's shard. With `overwrite`, discards other work: only now that everything this job
    needs was found. Returns the identity of the job: a new one, or that in the stored record.

    Raises:
        StoreError: another job's work exists and must not be replaced, or is running.
        TakenAwayError: the data root is no longer this process's.
    """
    own_lock.check()
    with hold(layout.start_lock, "starting", wait_s=START_PATIENCE_S, replace=overwrite, access=own_lock):
        try:
            stored = read_record(layout, own_lock)
            if stored is not None:
                if not overwrite:
                    _check_same(start.job, record["source_rows"], stored, layout.root)
                    _check_same_heads(record, stored, f"{layout.root} holds an unfinished job")
                    check_same_loaded(record, stored, layout.root)
                    if record["base"] != stored["base"]:
                        raise _overtaken(layout.root)
                if (
                    _is_same(start.job, record["source_rows"], stored)
                    and record["base"] == stored["base"]
                    and _captured(record) == _captured(stored)
                    and not differences_of_loaded(record, stored)
                    and stored["job_id"] != start.replaces
                ):
                    _store_output(layout, stored, record["config"]["output"], own_lock)
                    return str(stored["job_id"])
                discard_work(layout, own_lock.path, own_lock)
        except UnreadableError:
            if not overwrite:
                raise
            discard_work(layout, own_lock.path, own_lock)
        if not overwrite:
            if start.base is None and type_of(layout.manifest) is not None:
                raise _overtaken(layout.root)
            if start.base is not None:
                _check_same_heads(record, start.base.manifest, f"{start.base.files} is a finished dataset")
                what = f"{start.base.files} is a finished dataset"
                check_same_code(record, start.base.manifest, what)
                check_same_weights(record, start.base.manifest, what)
        if start.base is not None:
            _warn_of_other_versions(start.job, Job.from_record(start.base.manifest))
        job_id = new_job_id(record)
        if record["config"]["output"]["private"]:
            remember_privacy(layout, own_lock)
        write_record(layout, {**record, "job_id": job_id}, access=own_lock)
        return job_id


def change_output(config: ResolvedConfig, layout: Layout, own_lock: Lock) -> None:
    """Gives the unfinished job in `layout` the `output` of `config`: a dataset is published as the latest start asks.

    `own_lock` is the lock of the process's shard.
    """
    own_lock.check()
    with hold(layout.start_lock, "starting", wait_s=START_PATIENCE_S, access=own_lock):
        record = read_record(layout, own_lock)
        if record is not None:
            _store_output(layout, record, config.to_dict()["output"], own_lock)


def _store_output(layout: Layout, record: dict[str, Any], output: Mapping[str, Any], access: Access) -> None:
    if output["private"]:
        remember_privacy(layout, access)
    if record["config"]["output"] != output:
        write_record(layout, {**record, "config": {**record["config"], "output": output}}, access=access)


def _captured(record: Mapping[str, Any]) -> dict[tuple[int, str], list[int]]:
    """Returns the captured heads of a record or a manifest, by layer and kind."""
    layers = record["model"]["layers"]
    return {(of["layer"], kind): heads for of in layers for kind, heads in of["captured"].items() if heads}


def _check_same_heads(record: Mapping[str, Any], earlier: Mapping[str, Any], what: str) -> None:
    """Refuses to add to work of an earlier version that selected other heads by the same settings.

    Raises:
        StoreError: it did.
    """
    now, there = _captured(record), _captured(earlier)
    if now != there:
        then, new = (compact_ranges({layer for layer, _ in heads}) for heads in (there, now))
        raise StoreError(
            f"{what} of an earlier version of qk-sniffer, which selected other heads by the same settings: of layers "
            f"{then} there, of layers {new} now (capture.full_attention_only leaves out every layer that hides earlier "
            "keys). Give this job another folder (output.data_root=...), or replace the old work with "
            "output.overwrite=true"
        )


def _overtaken(root: Path) -> StoreError:
    return StoreError(
        f"another job has changed the dataset in {root} while this one started: rerun the command, which continues "
        "from there, or give this job another folder (output.data_root=...)"
    )


def base_of(layout: Layout, record: Mapping[str, Any]) -> PreviousVersion | None:
    """The finished dataset that the job of `record` adds to; None if it adds to none."""
    base = record["base"]
    if base is None:
        return None
    return PreviousVersion(Folder(layout.root) if base["hub"] is None else Branch(**base["hub"]), base)


def _has_texts_of(
    layout: Layout, record: Mapping[str, Any], corpus: Corpus, tokenizer: Callable[[], Tokenizer]
) -> bool:
    """Whether the source still has the texts that the shards of the unfinished job have captured."""
    try:
        check_same_texts(corpus, _captured_examples(layout, record), tokenizer)
    except SourceError as error:
        log.warning("the unfinished job is replaced: %s", error)
        return False
    return True


def _captured_examples(layout: Layout, record: Mapping[str, Any]) -> Iterator[ExampleRecord]:
    for journal in journals_of(layout, record):
        yield from journal.records.values()


def _is_there(base: PreviousVersion | None) -> bool:
    with suppress(HubError):  # a base that cannot be reached must not keep a job from being replaced
        return base is None or base.is_there
    return False


def _new_start(config: ResolvedConfig, files: Files) -> Start:
    corpus = open_corpus(config.dataset)
    job = Job.of(config, resolve_commits(config, None) | {"dataset": corpus.commit})
    return Start(job, corpus, "nothing", files)


def _is_same(job: Job, rows: int | None, record: Mapping[str, Any]) -> bool:
    return not job.differences(Job.from_record(record)) and rows == record["source_rows"]


def _check_same(job: Job, rows: int | None, record: Mapping[str, Any], root: Path) -> None:
    job.check_continues(Job.from_record(record), str(root), finished=False)
    if rows != record["source_rows"]:
        raise StoreError(
            f"{root} holds an unfinished job over {record['source_rows']} examples of the dataset, and {rows} are "
            "asked for now (dataset.max_samples, or the dataset itself, has changed). Finish that job first, give "
            "this one another folder (output.data_root=...), or replace the other with output.overwrite=true"
        )


def _rows_are_added(files: Files, manifest: Mapping[str, Any], config: ResolvedConfig, corpus: Corpus) -> bool:
    """Whether the source has more rows for a finished dataset than it was made from.

    Raises:
        StoreError: it has fewer.
    """
    there: int = manifest["source_rows"]
    if corpus.num_rows is not None:
        now = corpus.num_rows
    else:  # a stream has no known length but the one that is asked for
        wanted, before = config.dataset.max_samples, manifest["config"]["dataset"]["max_samples"]
        if wanted == before:
            return False
        now = there + 1 if wanted is None else wanted
    if now < there:
        raise StoreError(
            f"{files} is finished with {there} examples of the dataset, and only {now} are asked for now "
            "(dataset.max_samples, or the dataset itself, has changed). A dataset can grow, but not shrink: "
            "give this job another folder (output.data_root=...), or replace the dataset with output.overwrite=true"
        )
    return now > there


def check_files(layout: Layout, manifest: Mapping[str, Any]) -> None:
    """Checks that a finished dataset has its files, by their sizes. `verify` also reads them.

    Raises:
        StoreError: a file is missing or has another size.
    """
    if bad := manifests.changed_files(layout.root, manifest):
        raise StoreError(
            f"{layout.root} is damaged: {shortened(bad, 5)} missing, or not of the size that manifest.json lists "
            f"({len(bad)} of {len(manifest['files'])} files). Restore them, or recreate the dataset with "
            "output.overwrite=true"
        )


def _warn_of_other_versions(job: Job, earlier: Job) -> None:
    changed = [
        f"{name} {earlier.versions[name]} there, {version} now"
        for name, version in job.versions.items()
        if earlier.versions.get(name, version) != version
    ]
    if changed:
        log.warning("adding to a dataset that other versions made (%s); the manifest names both", ", ".join(changed))


def _check_texts(previous: PreviousVersion, corpus: Corpus, tokenizer: Callable[[], Tokenizer]) -> None:
    """Refuses a local source whose texts or ids differ from those of the dataset: no commit pins them."""
    origin, rows = f"that {previous.files} was made from", int(previous.record["source_rows"])
    check_same_texts(corpus, previous.examples(), tokenizer, rows=rows, origin=origin)
