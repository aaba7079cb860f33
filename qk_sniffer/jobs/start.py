"""How a job starts: anew, where an earlier start left off, or not at all because its dataset is finished."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from qk_sniffer.corpus.examples import Corpus, open_corpus
from qk_sniffer.corpus.tokenizer import text_hash
from qk_sniffer.errors import HubError, SourceError, StoreError
from qk_sniffer.hub.branch import Branch
from qk_sniffer.jobs.hub_resume import branch_ahead
from qk_sniffer.jobs.identity import Job, resolve_commits
from qk_sniffer.resolved import ResolvedConfig, fingerprint
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Files, Folder
from qk_sniffer.store.layout import EXAMPLES, Layout, discard_work
from qk_sniffer.store.locks import hold
from qk_sniffer.store.previous import PreviousVersion, describe
from qk_sniffer.store.record import read_record, write_record

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""How long a job waits for another shard's that starts in the same moment."""


@dataclass(frozen=True)
class Start:
    """What a job is, and what there is of it. `corpus` is open at the commit that the job is pinned to."""

    job: Job
    corpus: Corpus
    found: Literal["nothing", "unfinished", "finished"]
    files: Files
    """Of what was found: in the data root, or on the branch on the Hub."""
    base: PreviousVersion | None = None
    """The finished dataset that the job adds to."""

    @property
    def rows_before(self) -> int:
        """Rows of the source that the base was made from."""
        return 0 if self.base is None else int(self.base.record["source_rows"])


def find_existing_work(config: ResolvedConfig, layout: Layout, *, is_mine: bool = False) -> Start:
    """Finds out what the job of `config` is, and whether it continues what is in `layout`. Changes nothing.

    An unfinished job of the same configuration is continued even with `output.overwrite`: a requeued job, or one
    started again, must not throw away what it did itself. `is_mine` says so of the finished dataset, whose publication
    this start completed.

    Raises:
        StoreError: another job's work or dataset is there, and `output.overwrite` is false.
        SourceError: the model's commit or the dataset cannot be found.
    """
    files: Files = Folder(layout.root)
    record = read_record(layout)
    finished = record is None and layout.manifest.exists()
    if finished:
        record = manifests.read(layout.root)
    overwrite = config.output.overwrite
    if config.output.resume_from_hub and not overwrite and (record is None or finished):
        branch = branch_ahead(config, layout, record)
        if branch is not None:
            files, finished, record = branch, True, manifests.of(branch)
    replaces = overwrite and finished and not is_mine
    if record is None or replaces or (overwrite and record["fingerprint"] != fingerprint(config)):
        return _anew(config, files)
    earlier = Job.from_record(record)
    # The fingerprint alone, before anything is asked of the Hub: the commits of another model say nothing here.
    mine = Job(fingerprint(config), earlier.commits, earlier.versions)
    mine.check_continues(earlier, str(files), finished=finished)

    corpus = open_corpus(config.dataset, earlier.commits["dataset"])
    job = Job.of(config, resolve_commits(config, earlier) | {"dataset": corpus.commit})
    if finished:
        job.check_continues(earlier, str(files), finished=True)
        if isinstance(files, Folder):
            _check_files(layout, record)
        more = _rows_are_added(files, record, config, corpus)
        if corpus.commit is None:
            _check_texts(files, corpus)
        if not more:
            return Start(job, corpus, "finished", files)
        _note_versions(job, earlier)
        return Start(job, corpus, "nothing", files, PreviousVersion(files, describe(files) | {"hub": _on_hub(files)}))
    base = base_of(layout, record)
    if overwrite and not (_is_same(job, source_rows(config, corpus), record) and _is_there(base)):
        return _anew(config, files)
    _check_same(job, source_rows(config, corpus), record, layout.root)
    if base is not None:
        base.check()
        if corpus.commit is None:
            _check_texts(base.files, corpus)
    return Start(job, corpus, "unfinished", files, base)


def register_job(layout: Layout, job: Job, record: Mapping[str, Any], *, own_lock: Path, overwrite: bool) -> None:
    """Makes `record` that of the job in `layout`, unless another shard of the same job was first.

    Hold `own_lock`, the lock of this job's shard. Other work that is there goes, if `overwrite` says so: only now,
    that all that this job needs was found.

    Raises:
        StoreError: another job's work is there, and not to be replaced, or running.
    """
    with hold(layout.start_lock, "starting", wait_s=PATIENCE_S):
        stored = read_record(layout)
        if stored is not None:
            if not overwrite:
                _check_same(job, record["source_rows"], stored, layout.root)
            if _is_same(job, record["source_rows"], stored) and record["base"] == stored["base"]:
                return
            discard_work(layout, own_lock)
        write_record(layout, record)


def base_of(layout: Layout, record: Mapping[str, Any]) -> PreviousVersion | None:
    """The finished dataset that the job of `record` adds to, if it does."""
    base = record["base"]
    if base is None:
        return None
    return PreviousVersion(Folder(layout.root) if base["hub"] is None else Branch(**base["hub"]), base)


def _is_there(base: PreviousVersion | None) -> bool:
    with suppress(HubError):  # a base that cannot be had any more must not stand in the way of who replaces the job
        return base is None or base.is_there
    return False


def _on_hub(files: Files) -> dict[str, str] | None:
    return asdict(files) if isinstance(files, Branch) else None


def source_rows(config: ResolvedConfig, corpus: Corpus) -> int | None:
    """How many rows of the source the job is over, as far as that is known before they are read."""
    return config.dataset.max_samples if corpus.num_rows is None else corpus.num_rows


def _anew(config: ResolvedConfig, files: Files) -> Start:
    corpus = open_corpus(config.dataset)
    job = Job.of(config, resolve_commits(config, None) | {"dataset": corpus.commit})
    return Start(job, corpus, "nothing", files)


def _is_same(job: Job, rows: int | None, record: Mapping[str, Any]) -> bool:
    return not job.differences(Job.from_record(record)) and rows == record["source_rows"]


def _check_same(job: Job, rows: int | None, record: Mapping[str, Any], root: Path) -> None:
    job.check_continues(Job.from_record(record), str(root), finished=False)
    if rows != record["source_rows"]:
        raise StoreError(
            f"{root} holds an unfinished job over {record['source_rows']} rows of the dataset, and {rows} are asked "
            "for now (dataset.max_samples, or the dataset itself, has changed). Finish that one first, give this job "
            "another folder (output.data_root=...), or replace it with output.overwrite=true"
        )


def _rows_are_added(files: Files, manifest: Mapping[str, Any], config: ResolvedConfig, corpus: Corpus) -> bool:
    """Whether the source has more rows for a finished dataset than it was made from.

    Raises:
        StoreError: it has fewer.
    """
    there: int = manifest["source_rows"]
    if corpus.num_rows is not None:
        now = corpus.num_rows
    else:  # a stream ends where it is told to, or nobody knows where
        wanted, before = config.dataset.max_samples, manifest["config"]["dataset"]["max_samples"]
        if wanted == before:
            return False
        now = there + 1 if wanted is None else wanted
    if now < there:
        raise StoreError(
            f"{files} is finished with {there} rows of the dataset, and only {now} are asked for now "
            "(dataset.max_samples, or the dataset itself, has changed). Rows are added to a dataset, never taken away: "
            "give this job another folder (output.data_root=...), or replace the dataset with output.overwrite=true"
        )
    return now > there


def _check_files(layout: Layout, manifest: Mapping[str, Any]) -> None:
    """Refuses a finished dataset with files that are gone or of another size; `verify` reads them too."""
    if bad := manifests.changed_files(layout.root, manifest):
        raise StoreError(
            f"{layout.root} is damaged: {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''} missing, or not of "
            f"the size that manifest.json lists ({len(bad)} of {len(manifest['files'])} files). Restore them, or make "
            "the dataset anew with output.overwrite=true"
        )


def _note_versions(job: Job, earlier: Job) -> None:
    changed = [
        f"{name} {earlier.versions[name]} there, {version} now"
        for name, version in job.versions.items()
        if earlier.versions.get(name) != version
    ]
    if changed:
        log.warning("adding to a dataset that other software made (%s); the manifest names both", ", ".join(changed))


def _check_texts(files: Files, corpus: Corpus) -> None:
    """Refuses a local source, which no commit pins, whose texts or ids are not those that the dataset was made from."""
    table = pq.read_table(files.path(EXAMPLES), columns=["index", "source_id", "text_hash"]).to_pydict()
    there = dict(zip(table["index"], zip(table["source_id"], table["text_hash"], strict=True), strict=True))
    last = max(there, default=-1)
    for example in corpus.examples():
        if example.index > last:
            break
        if there.get(example.index, found := (example.source_id, text_hash(example.text))) != found:
            raise SourceError(
                f"row {example.index} of the dataset (id {example.source_id}) is not the text that {files} was "
                "made from: the source has changed. Give this job another folder (output.data_root=...), or replace "
                "the dataset with output.overwrite=true"
            )
