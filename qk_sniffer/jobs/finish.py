"""Finishes a captured job: stages the dataset, proves it, promotes it, reports it, and publishes it.

A job does this when its shard is captured, and `python -m qk_sniffer.finalize` at any later time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qk_sniffer.capture.proof_examples import MAX_TOKENS, choose, choose_for_statistics
from qk_sniffer.corpus.batches import check_same_segments, check_same_texts, examples_of
from qk_sniffer.corpus.examples import Corpus
from qk_sniffer.corpus.tokens import chosen
from qk_sniffer.dataset.card import branch_card, write_card
from qk_sniffer.dataset.card_facts import CardFacts
from qk_sniffer.dataset.heads import attention_files
from qk_sniffer.dataset.proof_words import why
from qk_sniffer.dataset.summary import show
from qk_sniffer.errors import CaptureError, SourceError, StoreError
from qk_sniffer.hub.branch import Branch
from qk_sniffer.hub.catalogue import update_catalogue
from qk_sniffer.hub.client import writing_api
from qk_sniffer.hub.publish import publish
from qk_sniffer.jobs import hub_resume
from qk_sniffer.jobs.assemble import CapturedJob, Staged, captured_job, stage
from qk_sniffer.jobs.loaded_code import check_same_code
from qk_sniffer.jobs.pictures import draw_pictures
from qk_sniffer.jobs.tokenizers import tokenizer_once
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig, with_output
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.files import Files, Folder
from qk_sniffer.store.layout import CARD, Layout
from qk_sniffer.store.locks import InUseError
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import PLAIN, Access, Checked
from qk_sniffer.store.privacy import is_private, privacy, remember_privacy
from qk_sniffer.store.promote import promote
from qk_sniffer.store.record import read_unpublished, remove_unpublished, write_unpublished
from qk_sniffer.store.same_dataset import check_same, replaced, same_dataset
from qk_sniffer.store.work_folder import remove_leftovers
from qk_sniffer.text import say
from qk_sniffer.timing import Stages, describe

if TYPE_CHECKING:
    from qk_sniffer.jobs.components import Components

log = logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    Attributes:
        rows: those of the whole dataset; None until it is made.
        url: that of its branch, if it is published.
        manifest: the sha256 of its manifest.
    """

    rows: int | None = None
    url: str | None = None
    manifest: str | None = None


def finish(
    config: ResolvedConfig,
    layout: Layout,
    job_id: str,
    corpus: Corpus | None,
    components: "Components | None",
    stages: Stages,
    access: Access = PLAIN,
    *,
    replaces: bool = False,
) -> Outcome | None:
    """Makes the dataset, reports it and publishes it. Returns None if shards are missing, or another process makes it.

    The arguments and errors are those of `make_dataset` and `report_and_publish`.
    """
    made = make_dataset(config, layout, job_id, corpus, components, stages, access)
    if made is None:
        return None
    config, manifest = made
    note = f"Time: {describe(stages.seconds)}"
    return report_and_publish(config, layout, note, Folder(layout.root), access, manifest, replaces=replaces)


def make_dataset(
    config: ResolvedConfig,
    layout: Layout,
    job_id: str,
    corpus: Corpus | None,
    components: "Components | None",
    stages: Stages,
    access: Access = PLAIN,
) -> tuple[ResolvedConfig, dict[str, Any]] | None:
    """Makes the dataset of a captured job. Returns None if shards are missing, or if another process makes it.

    Returns `config` with the privacy that any start of the job asked for, and the manifest.

    Args:
        config: the settings of this start.
        layout: of the data root.
        job_id: the identity of the job whose dataset is made.
        corpus: the examples to prove; None if `config` asks for no proof.
        components: those that the capture used; None loads them if the proof needs them.
        stages: get the seconds of each stage.
        access: the lock of the process's shard, if it has one.

    Raises:
        TakenAwayError: the data root is no longer the job's.
        SourceError: the texts or the model are others than those of the capture.
        QkSnifferError: everything written before is kept, and this may be called again.
    """
    access.check()  # and not the record, which another shard removes with the work of the whole job
    with captured_job(layout, job_id, access) as job:
        access.check()
        if job is None:
            return None
        # Another shard's start may be later than this process's.
        if config.output.private or is_private(layout, job.claim):
            config = with_output(config, replace(config.output, private=True))
            remember_privacy(layout, job.claim)  # before the record, which says so too, is removed
        with stages("compact"):
            staged = stage(layout, job, config.located, None if components is None else components.tokenizer)
        if corpus is not None:
            _check_texts(config, job.record, staged, corpus, captured_here=components is not None)
        with stages("verify"):
            proof = _with_checks(_prove(config, job, staged, corpus, components, stages), staged)
        job.claim.check()  # what was proven is the job's
        manifest = staged.manifest(proof, timings=stages.seconds)
        card = write_card(CardFacts.of(manifest)).encode()
        _mark_unpublished(config, layout, manifests.with_files(manifest, {CARD: FileEntry.of(card)}), job.claim)
        with stages("promote"):
            promote(layout, manifest, card=card, claim=job.claim)
        # Of a job that was killed while it held another lock.
        remove_leftovers(layout, layout.finalize_lock, job.claim.lock)
        return config, manifests.read(layout.root)


def _mark_unpublished(config: ResolvedConfig, layout: Layout, manifest: Mapping[str, Any], claim: Claim) -> None:
    """Marks a dataset that is published after its promotion, before which its job has no other trace in the folder."""
    if config.output.hf_repo_id is not None and manifest["proof"]["proven"] is not False:
        write_unpublished(layout, manifest, access=claim)
    else:
        remove_unpublished(layout, claim)


def report_and_publish(
    config: ResolvedConfig,
    layout: Layout,
    note: str,
    files: Files,
    access: Access = PLAIN,
    made: Mapping[str, Any] | None = None,
    *,
    replaces: bool = False,
) -> Outcome:
    """Prints a summary of the finished dataset in `files` with `note`, and publishes it to its branch, if it has one.

    `made` is the manifest of the dataset, if this process has made it. `access` is the lock of its shard.
    `replaces` says that the caller has named the branch, whose dataset may be another one; so does `output.overwrite`.

    Raises:
        CaptureError: the proof failed.
        StoreError: the branch has another dataset, or the dataset in `files` is damaged.
        HubError: the dataset could not be published.
        TakenAwayError: another dataset is in the data root now.
    """
    access.check()
    manifest, digest = manifests.with_digest(files)
    if made is not None and manifest != made:
        raise replaced(layout.root)
    show(files, manifest, note)
    if isinstance(files, Branch):
        if not layout.manifest.exists():  # otherwise an earlier version, which is not what the branch has
            hub_resume.write_snapshot(layout, files, access)
        update_catalogue(writing_api(), files.repo_id)  # a killed job may have published without it
        say(f"On the Hub: {files.url}")
        return Outcome(manifest["rows"], files.url, digest)
    proof = manifest["proof"]
    if proof["proven"] is False:
        raise CaptureError(f"the proof of {layout.root} failed, and the dataset was not published. {why(proof)}")
    unchanged = Checked(access, partial(check_same, layout, manifest))
    draw_pictures(layout, unchanged, manifest)
    output = replace(config.output, private=privacy(layout, asked=config.output.private))
    if output.private and not is_private(layout):
        with same_dataset(layout, manifest, access):
            remember_privacy(layout, access)
    if not (output.hf_repo_id and output.hf_branch):
        return Outcome(manifest["rows"], manifest=digest)
    guard = hub_resume.guard if output.resume_from_hub else hub_resume.refuse_other
    mark = read_unpublished(layout, manifest)
    published = publish(
        layout.root,
        manifest,
        output.hf_repo_id,
        output.hf_branch,
        branch_card(layout.root, manifest, output.hf_repo_id, output.hf_branch),
        private=output.private,
        check=unchanged.check,
        guard=None if output.overwrite or replaces else partial(guard, layout, manifest),
    )
    try:
        with same_dataset(layout, manifest, access):
            if mark is not None:
                remove_unpublished(layout, access)
            if output.resume_from_hub:
                hub_resume.write_snapshot(layout, Branch(output.hf_repo_id, output.hf_branch, published.commit), access)
    except InUseError as error:
        log.warning("the dataset is published, and the next start publishes it once more: %s", error)
    say(f"{'Published' if published.changed else 'Already published'}: {published.url}")
    return Outcome(manifest["rows"], published.url, digest)


def _check_texts(
    config: ResolvedConfig, record: Mapping[str, Any], staged: Staged, corpus: Corpus, *, captured_here: bool
) -> None:
    """Checks that the job has captured the texts of `corpus`: no commit pins those of a local source.

    A process that has captured the only shard has compared them.

    Raises:
        SourceError: they have not.
    """
    commit = record["commits"]["dataset"]
    if corpus.commit != commit:
        raise SourceError(
            f"the job has captured {_named(commit)}, and dataset.path names {_named(corpus.commit)} now: restore the "
            "source, or recreate the dataset with output.overwrite=true"
        )
    if commit is None and not (captured_here and record["config"]["shard"]["count"] == 1):
        # Of a stream, the number of rows is not known: rows without text may follow the last example.
        rows = record["source_rows"] or 1 + max((example.index for example in staged.examples), default=-1)
        check_same_texts(corpus, staged.examples, tokenizer_once(config, record["commits"]), rows=rows)


def _named(commit: str | None) -> str:
    return "a local source" if commit is None else f"commit {commit} of a dataset on the Hub"


def _with_checks(proof: dict[str, Any], staged: Staged) -> dict[str, Any]:
    """Returns `proof` with the checks of attention kernels that the capture has made. A failed one fails the proof."""
    if not staged.checks:
        return proof
    failed = any(check["passed"] is False for check in staged.checks)
    return proof | {"attention": staged.checks} | ({"proven": False} if failed else {})


def _prove(
    config: ResolvedConfig,
    job: CapturedJob,
    staged: Staged,
    corpus: Corpus | None,
    components: "Components | None",
    stages: Stages,
) -> dict[str, Any]:
    """Proves rows (`capture/proof.py`) and statistics (`capture/proof_statistics.py`) of some examples.

    Returns the manifest's `proof` without checks.
    """
    record, count = job.record, config.verify.examples
    if "source" in record:
        return {"proven": None, "reason": "captured from Python, whose calls cannot be repeated"}
    if count == 0 or corpus is None:
        return {"proven": None, "reason": "turned off (verify.examples=0)"}
    settings, has_rows = config.capture.statistics, bool(staged.written.rows)
    if not has_rows and not settings.enabled:
        return {"proven": None, "reason": "the dataset has no rows"}
    # These load torch, which a finished dataset does not need.
    from qk_sniffer.capture.proof import prove
    from qk_sniffer.capture.proof_statistics import prove_statistics
    from qk_sniffer.capture.proof_summaries import SummaryFiles
    from qk_sniffer.jobs.components import load_components

    if components is None:
        components = load_components(config, record["commits"], stages)
        check_same_code(components.loaded, record, f"the job in {job.claim.layout.root} is")
    backbone = components.backbone
    boundary = backbone.length_boundary
    cost = components.cost
    passes, of_statistics = [], []
    if has_rows:
        passes = choose(
            staged.layout,
            staged.heads,
            staged.parts,
            count=count,
            cost=cost,
            boundary=boundary,
            access=job.claim,
        )
    if settings.enabled:
        of_statistics = choose_for_statistics(
            staged.parts,
            count=count,
            cost=cost,
            boundary=boundary,
            skip_tokens=settings.skip_tokens,
            segments=config.sampler.segments,
        )
    reason = f"all {'rows' if has_rows else 'tokens of the statistics'} are at positions from {MAX_TOKENS:,} on"
    statistics = staged.written.statistics
    if not has_rows and statistics is not None and not statistics["tokens"]:
        reason = "the statistics have no token"
    elif boundary is not None:
        reason = f"this model's rotary frequencies depend on the length of texts of more than {boundary} tokens"
    if not passes and not of_statistics:
        return {"proven": None, "reason": reason}
    captured = [each.example for each in (*passes, *of_statistics)]
    found = examples_of(corpus, captured, components.tokenizer.content_hash)
    commits = {role: record["commits"][role] for role in components.commits}
    if components.commits != commits:
        raise StoreError(
            f"the job in {staged.layout.root} was captured with the commits {commits}, and the loaded model and "
            f"tokenizer are {components.commits}: they prove nothing about its vectors. Rerun the job's command"
        )
    tokens = chosen(components.tokenizer, found, {each.key for each in captured})
    for each in captured:
        check_same_segments(tokens[each.key], each)
    proof: dict[str, Any] = {"proven": None, "reason": reason}
    if passes:
        ids = {one.example.example_id: tokens[one.example.key].ids for one in passes}
        table, sink_tokens = AttentionTable.of(config), config.capture.attention.sink_tokens
        proof = prove(
            backbone,
            staged.layout,
            staged.heads,
            passes,
            ids,
            layers=components.layers,
            min_tokens=cost.min_tokens,
            summaries=None if table is None else SummaryFiles(attention_files(staged.facts), table, sink_tokens),
            access=job.claim,
        )
    moments = components.moments(settings)
    if moments is not None and of_statistics:
        made = prove_statistics(
            backbone,
            staged.heads,
            components.selection,
            moments,
            of_statistics,
            tokens,
            layers=components.layers,
            min_tokens=cost.min_tokens,
            segments=config.sampler.segments,
        )
        proof = _with_statistics(proof if has_rows else None, made)
    components.check()
    return proof | {"model_commit": components.commits["model"]}


def _with_statistics(proof: dict[str, Any] | None, made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a proof with that of statistics, which alone prove a dataset without rows: `proof` is None then."""
    statistics = {name: value for name, value in made.items() if name != "proven"}
    if proof is None:
        of_dataset = {name: made[name] for name in ("proven", "examples", "reason") if name in made}
        return of_dataset | {"statistics": statistics}
    return proof | {"statistics": statistics} | ({"proven": False} if made["proven"] is False else {})
