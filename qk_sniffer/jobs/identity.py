"""Identifies a job by the settings that decide its rows and vectors, the commits it is pinned to, and its software.

The identity is stored next to the journal when the job first starts. Every later start compares its own with it, so a
dataset never mixes two configurations, two checkpoints or two versions of a library.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from qk_sniffer.config import ModelConfig
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.checkpoint_files import ADAPTER_WEIGHTS, MODEL_WEIGHTS, CheckpointFiles, folder_digest
from qk_sniffer.hub.revisions import current_commit, hub_commit_of, is_hub_id
from qk_sniffer.jobs.software import versions_of
from qk_sniffer.logs import logger
from qk_sniffer.resolved import ResolvedConfig, completed, fingerprint, without_batching
from qk_sniffer.text import as_yaml, shortened

log = logger(__name__)

ROLES = ("model", "tokenizer", "adapter")
"""What a model is loaded from; each has a commit. Most jobs have no adapter."""


@dataclass(frozen=True)
class Job:
    """The identity of a dataset's job."""

    fingerprint: dict[str, Any]
    """The settings that can change rows or vectors, by their dotted keys. The batch settings are those of the first
    start."""
    commits: dict[str, str | None]
    """The commits of `model`, `tokenizer`, `dataset` and any `adapter` on the Hub; for a local checkpoint the digest of
    its files."""
    versions: dict[str, str]
    """Of the packages that may change tokens or vectors. Some are known only when the model is loaded."""

    @classmethod
    def of(cls, config: ResolvedConfig, commits: dict[str, str | None]) -> "Job":
        """The job of `config`, with the installed software."""
        return cls(fingerprint(config), commits, versions_of(config))

    def with_loaded(self, versions: Mapping[str, str]) -> "Job":
        """This job with the versions of what was loaded for it."""
        return replace(self, versions={**self.versions, **versions})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Job":
        """The job of a stored record or of a manifest; both hold its keys among others."""
        return cls(completed(record["fingerprint"], record["config"]), record["commits"], record["versions"])

    def added_to(self, earlier: "Job") -> "Job":
        """This job as one that adds to the dataset of `earlier`, with the batch settings of its first start."""
        return replace(self, fingerprint=earlier.fingerprint | without_batching(self.fingerprint))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it is stored."""
        return asdict(self)

    def differences(self, earlier: "Job", *, finished: bool = False) -> list[str]:
        """Lists the settings, commits and libraries in which this job differs from `earlier`, one a line.

        The batch settings may differ. A `finished` dataset may also come from other versions of the software, and from
        another number of shards.
        """
        differing = self._differing(earlier, finished)
        return [f"{key}: {as_yaml(there)} there, {as_yaml(now)} now" for key, (there, now) in differing.items()]

    def _differing(self, earlier: "Job", finished: bool) -> dict[str, tuple[Any, Any]]:
        """Returns the value of `earlier` and that of this job for everything in which they differ.

        Versions are compared where both jobs name them: each start knows some only once the model is loaded.
        """
        versions = self.versions.keys() & earlier.versions.keys()
        mine, theirs = _flat(self, versions), _flat(earlier, versions)
        keys = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        if finished:
            keys = [key for key in keys if not key.startswith("version of ") and key != "shard.count"]
        return {key: (theirs.get(key), mine.get(key)) for key in keys}

    def check_continues(self, earlier: "Job", where: str, *, finished: bool) -> None:
        """Refuses to continue the work of `earlier` in `where` if this job differs.

        Raises:
            StoreError: lists every difference, and the way out.
        """
        if different := self.differences(earlier, finished=finished):
            state = "a finished dataset" if finished else "an unfinished job"
            differing = self._differing(earlier, finished)
            # A text may be the public name of a folder.
            settings = [
                f"{key}={as_yaml(there)}"
                for key, (there, _) in differing.items()
                if key in earlier.fingerprint and isinstance(there, int | float | None)
            ]
            old = f" ({shortened(settings, 5)})" if settings else ""
            raise StoreError(
                f"{where} holds {state} of another configuration:",
                *(f"  - {line}" for line in different),
                f"Give this job another folder ({_free_folder(where)}; on the Hub another output.hf_branch), go back "
                f"to the old values{old}, or replace the old work with output.overwrite=true.",
            )


def _free_folder(where: str) -> str:
    """Returns the setting of a folder next to one with other work. The name of the default folder tells few settings.

    Without a name if `where` is a branch, or has characters that a command line needs quotes for.
    """
    if not re.fullmatch(r"[\w./-]+", where) or not Path(where).is_dir():
        return "output.data_root=..."
    return next(f"output.data_root={where}-{number}" for number in count(2) if not os.path.lexists(f"{where}-{number}"))


def refuse_from_python(record: Mapping[str, Any], where: str) -> None:
    """Refuses to continue the work in `where` if its record or manifest is that of a capture from Python.

    Raises:
        StoreError: it is.
    """
    if "source" in record:
        raise StoreError(
            f"{where} holds a capture from Python, which no job resumes or adds to: give this job another folder "
            "(output.data_root=...; on the Hub another output.hf_branch), or replace the capture with "
            "output.overwrite=true"
        )


def resolve_commits(config: ResolvedConfig, earlier: Job | None) -> dict[str, str | None]:
    """The commits of model, adapter and tokenizer: those of an earlier start, else the current ones of their revisions.

    A local checkpoint has no commit. The digest of its files replaces it, computed at every start. If its folder is
    gone, its name may be that of a repository, whose commit differs from the digest.

    Raises:
        SourceError: one of them is not a folder, and no repository that the Hub or the local cache knows.
    """
    model, tokenizer = config.model, config.model.tokenizer
    assert model.name is not None and tokenizer.name is not None
    asked = {"model": (model.name, model.revision), "tokenizer": (tokenizer.name, tokenizer.revision or "main")}
    if model.adapter is not None:
        asked["adapter"] = (model.adapter, "main")
    commits: dict[str, str | None] = {}
    folders = _folders(config.located)
    for role, (name, revision) in asked.items():
        if folders[role].is_dir():
            if is_hub_id(name):  # it has the form of both
                log.info("the %s %s is the local folder %s", role, name, Path(name).absolute())
            commits[role] = folder_digest(folders[role], _weights(role, model))
        elif earlier is not None and hub_commit_of(earlier.commits.get(role)) is not None:
            commits[role] = earlier.commits[role]
        else:
            commits[role] = (
                commits["model"] if asked["model"] == (name, revision) and commits else current_commit(name, revision)
            )
    return commits


@contextmanager
def unchanged_files(
    model: ModelConfig, commits: Mapping[str, str | None], roles: Sequence[str] = ROLES
) -> Iterator[dict[str, CheckpointFiles]]:
    """Yields the files of those `roles` that are local folders, for a block that loads them.

    Raises:
        SourceError: they are not those of `commits`: they have changed since the job started, or during the block; or a
            folder or file has the name of a repository of the Hub, and would be loaded in its place.
    """
    _refuse_local(model, commits, roles)
    files = _checkpoint_files(model, commits, roles)
    yield files
    _refuse_local(model, commits, roles)
    for role, each in files.items():
        each.trails.check(f"the files of the {role} in {each.folder} changed while the job used them")


def _refuse_local(model: ModelConfig, commits: Mapping[str, str | None], roles: Sequence[str]) -> None:
    """Checks that there is no folder or file with the name of a repository of the Hub: loaders prefer it.

    Raises:
        SourceError: there is one.
    """
    for role, path in _folders(model).items():
        if role in roles and hub_commit_of(commits.get(role)) is not None and os.path.lexists(path):
            setting = "model.adapter" if role == "adapter" else "model.name"
            raise SourceError(
                f"the {role} {path} is a repository of the Hub, and there is {path.absolute()} by now, which would be "
                "loaded in its place: move it away and rerun the command, which keeps what was captured before; or "
                f"give {setting} the path of the folder"
            )


def _checkpoint_files(
    model: ModelConfig, commits: Mapping[str, str | None], roles: Sequence[str]
) -> dict[str, CheckpointFiles]:
    folders = _folders(model)
    found = {}
    for role in roles:
        commit = commits.get(role)
        if commit is None or hub_commit_of(commit) is not None:
            continue
        found[role] = CheckpointFiles(folders[role], _weights(role, model))
        if found[role].digest != commit:
            raise SourceError(
                f"the files of the {role} in {folders[role]} changed while the job used them: restore them and rerun "
                "the command, which keeps what was captured before. Give a checkpoint that is written again and again "
                "a copy of its own"
            )
    return found


def _folders(model: ModelConfig) -> dict[str, Path]:
    """Returns the folders of the roles of a model, if they are local ones; else their names in this form."""
    names = {"model": model.name, "tokenizer": model.tokenizer.name or model.name, "adapter": model.adapter}
    return {role: Path(name) for role, name in names.items() if name is not None}


def _weights(role: str, model: ModelConfig) -> Sequence[str]:
    """Returns the files of weights that the loader of a local folder tries, in its order.

    A folder that is both the model's and the tokenizer's has one digest.
    """
    if role == "adapter":
        return ADAPTER_WEIGHTS
    if role == "tokenizer" and model.tokenizer.name not in (None, model.name):
        return ()
    return MODEL_WEIGHTS if model.gguf_file is None else (model.gguf_file,)


def _flat(job: Job, versions: Collection[str]) -> dict[str, Any]:
    return (
        without_batching(job.fingerprint)
        | {f"commit of the {name}": commit for name, commit in job.commits.items()}
        | {f"version of {name}": job.versions[name] for name in versions}
    )
