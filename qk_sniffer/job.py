"""What a job is: the keys that decide its rows and vectors, the commits it is pinned to, its software.

A job's identity is written beside its journal when it first starts. Whoever continues it, or finds its finished
dataset, compares: a dataset is never a mixture of two configurations, two checkpoints or two libraries.
"""

import importlib.metadata
from dataclasses import asdict, dataclass, replace
from typing import Any

from qk_sniffer.config import Config
from qk_sniffer.errors import StoreError

LIBRARIES = ("torch", "transformers")
"""Another version of these may compute other vectors."""

_CANNOT_CHANGE_ROWS_OR_VECTORS = {
    "model.slug",
    "model.device_map",
    "model.trust_remote_code",
    "model.allow_pickle",
    "model.long_context",
    "dataset.slug",
    "dataset.max_samples",  # fewer or more examples, each with the same rows
    "dataset.streaming",
    "inference.queue_mb",
    "inference.segment_mb",
    "inference.debug_logging",
    "shard.index",
    "verify",
    "output",
    "dry_run",
}


@dataclass(frozen=True)
class Job:
    """The identity of a dataset's job."""

    fingerprint: dict[str, Any]
    """Config keys that can change rows or vectors, dotted, with their values."""
    commits: dict[str, str | None]
    """`model`, `tokenizer` and `dataset`: the commit of each on the Hub; the digest of a local checkpoint."""
    versions: dict[str, str]

    @classmethod
    def of(cls, config: Config, commits: dict[str, str | None]) -> "Job":
        """The job that a resolved `config` asks for, with the software that is installed."""
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        return cls(fingerprint(config), commits, versions)

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)

    def check_continues(self, earlier: "Job", where: str, *, finished: bool) -> None:
        """Refuses to go on with what `earlier` began in `where` if this job would compute something else.

        Raises:
            StoreError: with every key, commit or library that differs, and the way out.
        """
        mine, theirs = _flat(self), _flat(earlier)
        if finished:
            # Other software is fine for a dataset that is whole, and so is another way to share out the work.
            for key in [key for key in mine | theirs if key.startswith("versions.") or key == "shard.count"]:
                mine.pop(key, None), theirs.pop(key, None)
        different = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        if different:
            lines = [f"  - {key}: {theirs.get(key)!r} there, {mine.get(key)!r} now" for key in different]
            state = "a finished dataset" if finished else "an unfinished job"
            raise StoreError(
                "\n".join(
                    [
                        f"{where} holds {state} of another configuration:",
                        *lines,
                        "Give this job another folder (output.data_root=...), go back to the values there, or replace "
                        "what is there with output.overwrite=true.",
                    ]
                )
            )


def fingerprint(config: Config) -> dict[str, Any]:
    """Every key of a resolved `config` that can change a row or a vector, as `section.key: value`."""
    return {key: value for key, value in _dotted(config.to_dict()).items() if not _ignored(key)}


def with_commits(config: Config, commits: dict[str, str | None]) -> Config:
    """`config` as the manifest records it: with the commits that were used in the place of moving names."""
    return replace(
        config,
        model=replace(
            config.model,
            revision=commits["model"] or config.model.revision,
            tokenizer=replace(config.model.tokenizer, revision=commits["tokenizer"]),
        ),
        dataset=replace(config.dataset, revision=commits["dataset"]),
    )


def _flat(job: Job) -> dict[str, Any]:
    return (
        job.fingerprint
        | {f"commit of the {name}": commit for name, commit in job.commits.items()}
        | {f"versions.{name}": version for name, version in job.versions.items()}
    )


def _ignored(key: str) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in _CANNOT_CHANGE_ROWS_OR_VECTORS)


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    # Free dicts (config_overrides, data_files) are values, not sections: an empty one must stay visible.
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict) and name not in {
            "model.config_overrides",
            "dataset.data_files",
            "model.device_map",
        }:
            flat |= _dotted(value, name + ".")
        else:
            flat[name] = value
    return flat
