"""Makes the dataset of a job whose shards are all captured, and publishes one that is finished."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qk_sniffer.config import Config, OutputConfig, VerifyConfig, from_dict
from qk_sniffer.corpus.examples import open_corpus
from qk_sniffer.dataset.place import of_several
from qk_sniffer.errors import ConfigError, SourceError, StoreError
from qk_sniffer.hub.client import require_access, require_uploads_from
from qk_sniffer.jobs.assemble import finish_interrupted_promotion
from qk_sniffer.jobs.finish import finish, report_and_publish
from qk_sniffer.jobs.from_python import end_capture
from qk_sniffer.jobs.identity import ROLES, Job, resolve_commits
from qk_sniffer.jobs.shards import uncaptured
from qk_sniffer.jobs.start import check_files
from qk_sniffer.resolved import ResolvedConfig, with_output
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Folder
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout, missing_manifest
from qk_sniffer.store.locks import holder, is_held
from qk_sniffer.store.open_folder import anchored
from qk_sniffer.store.places import refuse_inside, refuse_unlisted
from qk_sniffer.store.privacy import allow_public, privacy, remember_privacy
from qk_sniffer.store.record import read_record
from qk_sniffer.store.work_folder import clear_obstacles
from qk_sniffer.text import say
from qk_sniffer.timing import Stages
from qk_sniffer.validation import output_problems

_WITHOUT_HUB = {"eager", "sdpa", "flex_attention"}
"""The kernels of attention that are torch's own."""


@dataclass(frozen=True)
class Allowed:
    """The code that a job may run when its dataset is made: settings of `model` that the caller allows too."""

    trust_remote_code: bool = False
    allow_pickle: bool = False
    family: str | None = None
    attn_implementation: str | None = None


def finalize(
    data_root: Path,
    *,
    prove: bool = True,
    allowed: Allowed | None = None,
    hf_repo_id: str | None = None,
    hf_branch: str | None = None,
    private: bool | None = None,
) -> int:
    """Makes and publishes the dataset at `data_root`, or prints which shards are missing; returns the exit code.

    Raises:
        ConfigError: `hf_branch` is given without `hf_repo_id`, or one of them is no name.
        QkSnifferError: there is no job, its journals do not make a dataset, or the publication failed.
    """
    if hf_branch is not None and hf_repo_id is None:  # the branch of a job would be replaced as if it had this name
        raise ConfigError(
            [f"hf_branch is {hf_branch!r}, but hf_repo_id is not given; set it to org/name to publish to"]
        )
    layout = Layout(data_root)
    if not layout.root.is_dir():
        raise missing_manifest(layout.root)
    if (problem := of_several(layout.root)) is not None:
        raise StoreError(problem)
    refuse_inside(layout.root, "data_root")
    if hf_repo_id is not None:
        require_uploads_from(layout.root)
    clear_obstacles(layout, overwrite=False)
    finish_interrupted_promotion(layout)
    record = read_record(layout)
    if record is None:
        # Where a dataset is published is decided by the caller alone: it may be of someone else.
        manifest = manifests.read(layout.root)
        check_files(layout, manifest)
        _set_privacy(layout, private)
        config = replace(from_dict(manifest["config"]), output=OutputConfig())
        config = _published(config, layout, hf_repo_id, hf_branch, private)
        with anchored(layout.root) as access:
            note = "Nothing to do: the dataset is finished."
            report_and_publish(config, layout, note, Folder(layout.root), access, replaces=hf_branch is not None)
        return 0
    refuse_unlisted(layout)
    _set_privacy(layout, private)
    if "source" in record and uncaptured(layout, record):
        end_capture(layout, record)
    if missing := missing_shards(layout, record):
        say(
            f"{layout.root} cannot be finished yet:",
            *(f"  - {line}" for line in missing),
            "Rerun the command that started the job: it runs the missing shards and leaves the others alone.",
        )
        return 1
    config = _published(from_dict(record["config"]), layout, hf_repo_id, hf_branch, private)
    if not prove:
        config = replace(config, verify=VerifyConfig(examples=0))
    loads_tokenizer = _loads_tokenizer(config, record)
    if problems := list(_forbidden(config, allowed or Allowed(), loads_tokenizer=loads_tokenizer)):
        raise ConfigError(problems)
    _check_checkpoint(config, layout, record)
    needs_texts = _proves(config) or _compares_texts(record)
    corpus = open_corpus(config.dataset, record["commits"]["dataset"]) if needs_texts else None
    done = finish(config, layout, record["job_id"], corpus, None, Stages(), replaces=hf_branch is not None)
    return 1 if done is None and read_record(layout) is not None else 0


def _set_privacy(layout: Layout, private: bool | None) -> None:
    """Makes the dataset stay private from now on, or no longer; None leaves that as it is."""
    if private is not None:
        with anchored(layout.root) as access:
            (remember_privacy if private else allow_public)(layout, access)


def _proves(config: Config) -> bool:
    """Whether the job derives rows a second time, for which it loads the model."""
    return config.verify.examples != 0


def _compares_texts(record: Mapping[str, Any]) -> bool:
    """Whether shards may have captured other texts: no commit pins those of a local source, which only one shard read.

    A capture from Python has no source.
    """
    return "source" not in record and record["commits"]["dataset"] is None and record["config"]["shard"]["count"] > 1


def _loads_tokenizer(config: Config, record: Mapping[str, Any]) -> bool:
    """Whether a dataset that is not proven needs the tokenizer: for strings, or for the texts of conversations."""
    of_messages = config.dataset.messages_column is not None
    return config.capture.capture_token_strings or (of_messages and _compares_texts(record))


def _check_checkpoint(config: ResolvedConfig, layout: Layout, record: dict[str, Any]) -> None:
    """Checks that a local model, adapter and tokenizer are those of the job, if this program loads them.

    Raises:
        SourceError: they have changed.
    """
    needed = [role for role in ROLES if role in record["commits"]] if _proves(config) else []
    if _loads_tokenizer(config, record):
        needed.append("tokenizer")
    there = record["commits"]
    now = resolve_commits(config, Job.from_record(record)) if needed else there
    if changed := sorted({role for role in needed if now[role] != there[role]}):
        raise SourceError(
            f"the {' and the '.join(changed)} of the job at {layout.root} changed after the capture: restore the files "
            f"of {config.model.name}, or rerun the job with output.overwrite=true"
        )


def _forbidden(config: Config, allowed: Allowed, *, loads_tokenizer: bool) -> Iterator[str]:
    """Yields a line for each setting of the job that runs code and is not allowed. Each line begins with its key."""
    model = config.model
    proves = _proves(config)
    way_out = "if you trust it" + ("" if loads_tokenizer else "; prove=false loads no model")
    if model.trust_remote_code and (proves or loads_tokenizer) and not allowed.trust_remote_code:
        yield (
            f"trust_remote_code is false, but the job runs Python code of {model.name} (model.trust_remote_code=true): "
            f"give trust_remote_code=true {way_out}"
        )
    if model.allow_pickle and proves and not allowed.allow_pickle:
        yield (
            f"allow_pickle is false, but the job loads pickled weights of {model.name} (model.allow_pickle=true): "
            "give allow_pickle=true if you trust them; prove=false loads no model"
        )
    named = [("family", "imports", model.family, allowed.family)]
    if (kernel := model.attn_implementation) is not None and _may_be_of_hub(kernel):
        named.append(("attn_implementation", "loads the kernel", kernel, allowed.attn_implementation))
    for key, verb, asked, given in named:
        if asked is not None and proves and given != asked:
            yield (
                f"{key} is {'null' if given is None else given}, but the job {verb} {asked} (model.{key}): give "
                f"{key}={asked} if you trust it; prove=false loads no model"
            )


def _may_be_of_hub(kernel: str) -> bool:
    """Whether transformers may load a kernel of attention from the Hub, as it does for `flash_attention_2` too."""
    return "/" in kernel or (kernel not in _WITHOUT_HUB and find_spec("kernels") is not None)


def _published(
    config: Config, layout: Layout, hf_repo_id: str | None, hf_branch: str | None, private: bool | None
) -> ResolvedConfig:
    """`config` with the given place on the Hub, if there is one. It is private as the caller says, or else the job."""
    asked = config.output.private if private is None else private
    output = replace(config.output, private=privacy(layout, asked=asked))
    if hf_repo_id is not None:
        # A start may have asked to replace what is on its own branch, and not on this one.
        output = replace(output, hf_repo_id=hf_repo_id, hf_branch=hf_branch, overwrite=False)
    # The folder of a stored job may have moved.
    if problems := list(output_problems(replace(output, folder=OutputConfig().folder, data_root=None))):
        raise ConfigError(problems)
    if hf_repo_id is None:
        return with_output(config, output)
    require_access(hf_repo_id, private=output.private)
    return with_output(config, output)


def missing_shards(layout: Layout, record: dict[str, Any]) -> list[str]:
    """Describes each shard of the job of `record` that is not captured, one a line."""
    count = record["config"]["shard"]["count"]
    lines = []
    for index in uncaptured(layout, record):
        lock = layout.shard_lock(index, count)
        if is_held(lock):
            state = f"running ({holder(lock)})"
        elif captured := len(Journal(layout.journal(index, count), record["job_id"], verify=False).records):
            state = f"stopped, with {captured} examples captured"
        else:
            state = "not started"
        lines.append(f"shard {index} of {count}: {state}")
    return lines
