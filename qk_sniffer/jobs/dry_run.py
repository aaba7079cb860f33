"""Shows the plan of a job (`dry_run`), and with `dry_run=measure` its time.

Writes nothing to stay: no data root, no lock and no status.
"""

import sys
from dataclasses import replace

from qk_sniffer.backbone.outline import device_of, outline
from qk_sniffer.capture.forward_cost import ForwardCost
from qk_sniffer.capture.selection import select
from qk_sniffer.config import Config
from qk_sniffer.corpus.batches import open_windows
from qk_sniffer.corpus.tokens import Tokenizer
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.client import require_access, require_uploads_from
from qk_sniffer.jobs.components import check_captured, check_lengths, load_components, open_fitting
from qk_sniffer.jobs.estimate import Batches
from qk_sniffer.jobs.identity import unchanged_files
from qk_sniffer.jobs.measure import measure
from qk_sniffer.jobs.plan import Described, Plan, describe, make_plan
from qk_sniffer.jobs.plan_lines import plan_text
from qk_sniffer.jobs.segment_names import check_segment_names
from qk_sniffer.jobs.source_rows import shard_rows
from qk_sniffer.jobs.start import Start, find_existing_work, is_yet_to_publish
from qk_sniffer.resolved import ResolvedConfig, resolve
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.places import refuse_unlisted
from qk_sniffer.store.privacy import privacy
from qk_sniffer.store.work_folder import check_data_root
from qk_sniffer.text import say, say_text
from qk_sniffer.timing import Stages
from qk_sniffer.validation import check


def show_plan(config: Config) -> Plan | None:
    """Prints the plan of the job of `config`, and returns it; None for a dataset that is finished.

    Raises:
        QkSnifferError: as for the job, as far as that is known without a forward pass.
    """
    check(config)
    job = resolve(config)
    if job.output.hf_repo_id:
        require_uploads_from(job.data_root)
        private = privacy(Layout(job.data_root), asked=job.output.private)
        require_access(job.output.hf_repo_id, private=private)
    try:
        check_data_root(job.data_root)
    except OSError as error:
        raise StoreError(f"cannot read the data root {job.data_root}: {error.strerror}") from error
    layout, stages = Layout(job.data_root), Stages()
    with stages("open dataset"):
        start = find_existing_work(job, layout, is_mine=is_yet_to_publish(job, layout))
    say(f"Plan for {job.data_root}; nothing is written there.")
    if start.found == "finished":
        say("Nothing to do: the dataset is finished.")
        return None
    if layout.root.is_dir():
        refuse_unlisted(layout)
    if job.dry_run == "measure":
        return _measured(job, layout, start, stages)
    plan = _plan(job, layout, start, *_outlined(job, start), stages)
    say_text(plan_text(plan))
    return plan


def _measured(config: ResolvedConfig, layout: Layout, start: Start, stages: Stages) -> Plan:
    """Prints the plan and the time of the job."""
    say(f"loading {config.model.slug} ...", to=sys.stderr)
    components = load_components(config, start.job.commits, stages)
    batches = Batches(components.cost)
    plan = _plan(config, layout, start, describe(components), components.tokenizer, stages, batches)
    say_text(plan_text(plan))
    if plan.is_short:
        return plan
    start = replace(start, job=start.job.with_loaded(components.versions))
    say("timing some batches ...", to=sys.stderr)
    found = measure(config, start, components, plan, batches, stages)
    say("", *(["time       none: all texts are captured"] if found is None else found.lines(plan)))
    return plan


def _plan(
    config: ResolvedConfig,
    layout: Layout,
    start: Start,
    described: Described,
    tokenizer: Tokenizer,
    stages: Stages,
    batches: Batches | None = None,
) -> Plan:
    """Plans the job. `stages` get the seconds of tokenizing, and `batches` note those of the job."""
    check_segment_names(config, start.corpus, tokenizer)
    shard = config.shard
    journal = Journal(layout.journal(shard.index, shard.count), start.job_id, verify=False)
    if start.job_id is None:
        journal.records.clear()  # of another job, which this one replaces
        journal.segments.clear()
    windows = open_windows(
        start.corpus.examples(shard_index=shard.index, shard_count=shard.count, after=start.rows_before),
        tokenizer,
        journal.records.values(),
        config.inference,
        boundary=described.boundary,
        stages=stages,
    )
    return make_plan(
        config,
        described,
        windows if batches is None else batches.noted(windows),
        wanted=shard_rows(config, start.corpus, start.rows_before),
        done=journal.records.values(),
        in_journal=sum(path.stat().st_size for path in journal.segments),
        there=0 if start.base is None else sum(file["bytes"] for file in start.base.manifest["files"].values()),
        base_texts=start.rows_before,
    )


def _outlined(config: ResolvedConfig, start: Start) -> tuple[Described, Tokenizer]:
    """Describes the model without its weights; with them if it cannot be described otherwise."""
    model, commits = config.located, start.job.commits
    with unchanged_files(model, commits):
        text, tokenizer = open_fitting(config, commits)
        found = outline(
            model,
            commit=commits["model"],
            adapter_commit=commits.get("adapter"),
            banded_attention=config.inference.banded_attention,
            layers=None if config.capture.full_attention_only else config.capture.layers,
        )
    if found is None:
        components = load_components(config, commits, Stages())
        return describe(components), components.tokenizer
    check_lengths(config, found.backbone, tokenizer)
    selection = select([layer.heads for layer in found.layers], config.capture)
    check_captured(selection, found.layers, text.model_type)
    device = device_of(model.device_map)
    return (
        Described(
            found.layers,
            selection,
            str(found.dtype).removeprefix("torch."),
            device,
            found.weight_bytes,
            ForwardCost.of(found.parameters, [layer.to_dict() for layer in found.layers], device),
            found.backbone.length_boundary,
            max((layer.heads.head_dim for layer in found.layers), default=0) // 2,
            found.activation_bytes,
        ),
        tokenizer,
    )
