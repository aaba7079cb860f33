"""What comes after the capture: the dataset is made of the journals, proven, shown, and published.

A job does this once its shard is captured, and `python -m qk_sniffer.finalize` at any time later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from qk_sniffer.capture.proof import examples_with_rows, prove
from qk_sniffer.corpus.batches import check_unchanged
from qk_sniffer.corpus.examples import Corpus
from qk_sniffer.dataset.card import branch_card
from qk_sniffer.dataset.summary import show
from qk_sniffer.errors import CaptureError
from qk_sniffer.hub.branch import Branch
from qk_sniffer.hub.catalogue import update_catalogue
from qk_sniffer.hub.client import writing_api
from qk_sniffer.hub.publish import publish
from qk_sniffer.jobs import hub_resume
from qk_sniffer.jobs.assemble import assemble
from qk_sniffer.jobs.components import LazyComponents
from qk_sniffer.resolved import ResolvedConfig
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.compact import HeadSpec
from qk_sniffer.store.files import Files, Folder
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import Layout
from qk_sniffer.timing import Stages, describe


@dataclass(frozen=True)
class Outcome:
    """What a job leaves: `rows` of the whole dataset, None while it is not made; `url` of its branch, where it is."""

    rows: int | None = None
    url: str | None = None


def finish(
    config: ResolvedConfig, layout: Layout, corpus: Callable[[], Corpus], parts: LazyComponents, stages: Stages
) -> Outcome | None:
    """Makes the dataset; None where shards are not done yet, or another process makes it (see `assemble`).

    Raises:
        QkSnifferError: what was made before is kept, and this may be called again.
    """

    def proven(*staged: Any) -> dict[str, Any]:
        return _prove(config, corpus, parts, *staged)

    if not assemble(layout, stages, proven):
        return None
    return report_and_publish(config, layout, f"Time: {describe(stages.seconds)}", Folder(layout.root))


def report_and_publish(config: ResolvedConfig, layout: Layout, note: str, files: Files) -> Outcome:
    """Shows the finished dataset in `files`, with `note`, and brings it to its branch, where one is asked for.

    Raises:
        CaptureError: stored vectors are not those that the model computes on another path.
        HubError: it could not be published.
    """
    show(files, note)
    manifest = manifests.of(files)
    if isinstance(files, Branch):
        hub_resume.write_snapshot(layout, files)
        update_catalogue(writing_api(), files.repo_id)  # which a job that was killed may not have done
        print(f"On the Hub: {files.url}")
        return Outcome(manifest["rows"], files.url)
    proof = manifest["proof"]
    if proof["proven"] is False:
        raise CaptureError(
            f"{layout.root} is unproven, and not published: derived again from the model's projections, vectors differ "
            f"by more than {proof['tolerance']} (relative): {proof['largest_difference_by_layer']} by layer. Please "
            "report this with the model's name; verify.examples=0 makes a dataset without proof"
        )
    output = config.output
    if not (output.hf_repo_id and output.hf_branch):
        return Outcome(manifest["rows"])
    guarded = output.resume_from_hub and not output.overwrite
    published = publish(
        layout.root,
        output.hf_repo_id,
        output.hf_branch,
        branch_card(layout.root, output.hf_repo_id, output.hf_branch),
        private=output.private,
        guard=partial(hub_resume.guard, layout) if guarded else None,
    )
    if output.resume_from_hub:
        hub_resume.write_snapshot(layout, Branch(output.hf_repo_id, output.hf_branch, published.commit))
    print(f"{'Published' if published.changed else 'Already published'}: {published.url}")
    return Outcome(manifest["rows"], published.url)


def _prove(
    config: ResolvedConfig,
    corpus: Callable[[], Corpus],
    parts: LazyComponents,
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
    found = list(islice((example for example in corpus().examples() if example.index in captured), len(captured)))
    for example in found:
        check_unchanged(example, captured[example.index])
    tokens = parts().tokenizer(found)
    return prove(parts().backbone, staging, heads, {made.example_id: made.ids for made in tokens})
