"""Makes the record of a job, which its work folder keeps."""

from typing import TYPE_CHECKING, Any

from qk_sniffer.hub.revisions import hub_commit_of
from qk_sniffer.jobs.licenses import stated_terms
from qk_sniffer.jobs.source_rows import source_rows
from qk_sniffer.jobs.start import Start
from qk_sniffer.resolved import ResolvedConfig, batching_of

if TYPE_CHECKING:
    from qk_sniffer.jobs.components import Components


def record_of(config: ResolvedConfig, start: Start, components: "Components") -> dict[str, Any]:
    """Returns the job's record: all that finalizing needs besides the journals, and facts for the manifest."""
    from qk_sniffer.jobs.components import model_facts

    settings, backbone = config.to_dict(), components.backbone
    settings["inference"] |= batching_of(start.job.fingerprint)
    return start.job.to_dict() | {
        "config": settings,
        "source_rows": source_rows(config, start.corpus),
        "base": None if start.base is None else dict(start.base.record),
        "stated": {
            **{
                role: stated_terms("model", name, hub_commit_of(start.job.commits[role]))
                for role, name in (("model", config.located.name), ("adapter", config.located.adapter))
                if name is not None
            },
            "dataset": stated_terms("dataset", config.dataset.path or "", start.job.commits["dataset"]),
        },
        "model": model_facts(backbone, components.layers, components.selection)
        | ({} if backbone.adapter is None else {"adapter": backbone.adapter}),
        "tokenizer": components.loaded["tokenizer"],
    }
