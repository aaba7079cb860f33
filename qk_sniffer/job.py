"""What a job is: the keys that decide its rows and vectors, the commits it is pinned to, its software.

A job's identity is written beside its journal when it first starts. Whoever continues it, or finds its finished
dataset, compares: a dataset is never a mixture of two configurations, two checkpoints or two libraries.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qk_sniffer.config import Config
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.revisions import HubUnreachableError, cached_commit, hub_commit, is_hub_id
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.layout import Layout

_FREE = {"model.config_overrides", "dataset.data_files", "dataset.filter"}
"""Keys whose value is a dict of the user's own keys."""

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
    "snapshot",
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


def fingerprint(config: Config) -> dict[str, Any]:
    """Every key of a resolved `config` that can change a row or a vector, as `section.key: value`."""
    keys = {key: value for key, value in _dotted(config.to_dict()).items() if not _ignored(key)}
    # What was moved is the same: a checkpoint's digest is among the commits, and texts are compared one by one.
    for key in ("model.name", "model.tokenizer.name", "dataset.path"):
        keys[key] = public_name(keys[key])
    plain: dict[str, Any] = json.loads(json.dumps(keys))  # as it comes back from a file
    return plain


def resolve_commits(config: Config, earlier: Job | None) -> dict[str, str | None]:
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


def public_name(name: str) -> str:
    """A Hub id as it is; of a local file or folder its name alone, so that no path of this machine is published."""
    return Path(name).resolve().name if Path(name).exists() else name


def hub_commit_of(commit: str | None) -> str | None:
    """None for the digest that stands in the place of a local checkpoint's commit."""
    return None if commit is None or commit.startswith("sha256:") else commit


def folder_digest(folder: Path) -> str:
    """`sha256:` over names and contents of the files that a checkpoint is loaded from, documentation left out."""
    suffixes = {".safetensors", ".json", ".bin", ".model", ".gguf", ".py", ".txt", ".jinja"}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes)

    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, files))
    whole = hashlib.sha256()
    for path, part in zip(files, digests, strict=True):
        whole.update(path.name.encode() + b"\0" + part)
    return f"sha256:{whole.hexdigest()}"


def current_commit(name: str, revision: str) -> str:
    """Where `revision` of a model repository stands: asked of the Hub, else of the local cache.

    Raises:
        SourceError: neither knows.
    """
    if name.endswith(".gguf") and (Path(name).is_file() or not is_hub_id(name)):
        folder, file = Path(name).parent, Path(name).name
        raise SourceError(f"model {name} is a GGUF file: set model.name={folder} model.gguf_file={file} instead")
    if not is_hub_id(name):
        raise SourceError(
            f"model {name} is no folder and no Hub id: give model.name (or model.tokenizer.name) a folder with "
            "config.json, or org/name"
        )
    try:
        return hub_commit("model", name, revision)
    except HubUnreachableError as unreachable:
        if (cached := cached_commit("model", name, revision)) is not None:
            return cached
        raise SourceError(
            f"model {name} at {revision}: {unreachable}, and no copy of it is in the local cache"
        ) from None


def read_record(layout: Layout) -> dict[str, Any] | None:
    """What the unfinished job in `layout` wrote at its start; None where there is none."""
    try:
        record: dict[str, Any] = json.loads(layout.job_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def write_record(layout: Layout, record: Mapping[str, Any]) -> None:
    """Stores the record of a job that starts. Hold the start lock."""
    write_atomic(layout.job_file, json.dumps(record, indent=2, sort_keys=True).encode())


def _flat(job: Job) -> dict[str, Any]:
    return (
        job.fingerprint
        | {f"commit of the {name}": commit for name, commit in job.commits.items()}
        | {f"version of {name}": version for name, version in job.versions.items()}
    )


def _ignored(key: str) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in _CANNOT_CHANGE_ROWS_OR_VECTORS)


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, dict) and name not in _FREE:
            flat |= _dotted(value, name + ".")
        else:
            flat[name] = value
    return flat
