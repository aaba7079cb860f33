"""What a job is: the keys that decide its rows and vectors, the commits it is pinned to, its software.

A job's identity is written beside its journal when it first starts. Whoever continues it, or finds its finished
dataset, compares: a dataset is never a mixture of two configurations, two checkpoints or two libraries.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.hub.revisions import current_commit, folder_digest
from qk_sniffer.resolved import ResolvedConfig, fingerprint

LIBRARIES = ("torch", "transformers")
"""Another version of these may compute other vectors."""


@dataclass(frozen=True)
class Job:
    """The identity of a dataset's job."""

    fingerprint: dict[str, Any]
    """Config keys that can change rows or vectors, dotted, with their values."""
    commits: dict[str, str | None]
    """`model`, `tokenizer` and `dataset`: the commit of each on the Hub; the digest of a local checkpoint."""
    versions: dict[str, str]

    @classmethod
    def of(cls, config: ResolvedConfig, commits: dict[str, str | None]) -> "Job":
        """The job that a resolved `config` asks for, with the software that is installed."""
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        return cls(fingerprint(config), commits, versions)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Job":
        """The job of a stored record or of a manifest, which both hold these keys among others."""
        return cls(record["fingerprint"], record["commits"], record["versions"])

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)

    def differences(self, earlier: "Job", *, finished: bool = False) -> list[str]:
        """What this job would compute otherwise than `earlier`, a line for each key, commit or library; else empty.

        To a `finished` dataset it does not matter which software made it, and in how many shards.
        """
        mine, theirs = _flat(self), _flat(earlier)
        keys = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        if finished:
            keys = [key for key in keys if not key.startswith("version of ") and key != "shard.count"]
        return [f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} now" for key in keys]

    def check_continues(self, earlier: "Job", where: str, *, finished: bool) -> None:
        """Refuses to go on with what `earlier` began in `where` if this job would compute something else.

        Raises:
            StoreError: with every difference, and the way out.
        """
        if different := self.differences(earlier, finished=finished):
            state = "a finished dataset" if finished else "an unfinished job"
            raise StoreError(
                "\n".join(
                    [
                        f"{where} holds {state} of another configuration:",
                        *(f"  - {line}" for line in different),
                        "Give this job another folder (output.data_root=...; on the Hub another output.hf_branch), go "
                        "back to the values there, or replace what is there with output.overwrite=true.",
                    ]
                )
            )


def resolve_commits(config: ResolvedConfig, earlier: Job | None) -> dict[str, str | None]:
    """The commits of model and tokenizer: those of an earlier start, else where their revisions stand now.

    A local checkpoint has no commit: the digest of its files takes its place, and is taken anew at every start.

    Raises:
        SourceError: one of them is neither a folder nor a repository that can be asked or was cached.
    """
    model, tokenizer = config.model, config.model.tokenizer
    assert model.name is not None and tokenizer.name is not None
    asked = {"model": (model.name, model.revision), "tokenizer": (tokenizer.name, tokenizer.revision or "main")}
    commits: dict[str, str | None] = {}
    for role, (name, revision) in asked.items():
        if Path(name).is_dir():
            commits[role] = folder_digest(Path(name))
        elif earlier is not None:
            commits[role] = earlier.commits[role]
        else:
            commits[role] = (
                commits["model"] if asked["model"] == (name, revision) and commits else current_commit(name, revision)
            )
    return commits


def _flat(job: Job) -> dict[str, Any]:
    return (
        job.fingerprint
        | {f"commit of the {name}": commit for name, commit in job.commits.items()}
        | {f"version of {name}": version for name, version in job.versions.items()}
    )
