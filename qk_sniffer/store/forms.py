"""Declares the forms of the record of a job and of the manifest of a dataset, which `stored.py` checks.

Names of files, heads and kinds follow `layout.py`. A file whose name has another form is never read, written or
uploaded.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from qk_sniffer.config import MOST_SHARDS, from_dict
from qk_sniffer.resolved import template_file
from qk_sniffer.store import stored
from qk_sniffer.store.form_types import (
    MOST_BUCKETS,
    BatchSize,
    Bucket,
    Commit,
    CommitOrDigest,
    Kind,
    RepoId,
    Sha256,
)
from qk_sniffer.store.layout import FORMAT, KINDS, is_dataset_file, parse_head_name
from qk_sniffer.store.model_forms import Model, layer_problems
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.proof_forms import Proof, proof_problems
from qk_sniffer.store.settings_forms import JobSettings, Settings
from qk_sniffer.store.stored import LARGE, Count, Seconds, Text, UnreadableError
from qk_sniffer.text import is_branch_name


class Commits(TypedDict):
    """Commits on the Hub; for a local checkpoint the digest of its files."""

    model: CommitOrDigest | None
    tokenizer: CommitOrDigest | None
    dataset: Commit | None
    adapter: NotRequired[CommitOrDigest]


class Terms(TypedDict):
    """The terms that a source states."""

    license: list[Text]
    language: list[Text]


class Stated(TypedDict):
    """The terms of the sources."""

    model: Terms
    dataset: Terms
    adapter: NotRequired[Terms]


class BatchSettings(TypedDict):
    """A change of the batch settings."""

    shard: Annotated[int, Meta(ge=0, lt=MOST_SHARDS)]
    from_index: Count
    max_batch_tokens: BatchSize
    batch_size: BatchSize | None
    lookahead: NotRequired[BatchSize | None]


class Growth(TypedDict):
    """An earlier version of a dataset."""

    source_rows: Count
    versions: dict[str, Text]
    batching: NotRequired[list[BatchSettings]]


class Place(TypedDict):
    """A branch of the Hub at a commit."""

    repo_id: RepoId
    name: Text
    commit: Commit


class Base(TypedDict):
    """The finished dataset that a job adds to; `hub` is None for the one in the data root."""

    hub: Place | None
    manifest_sha256: Sha256
    source_rows: Count
    skipped_rows: Count
    versions: dict[str, Text]
    batching: NotRequired[list[BatchSettings]]
    grown_from: list[Growth]


Fingerprint = TypedDict(
    "Fingerprint",
    {
        "model.name": Text | None,
        "model.tokenizer.name": Text | None,
        "dataset.path": Text | None,
        "dataset.name": NotRequired[Text | None],
        "dataset.split": NotRequired[Text],
        "model.adapter": NotRequired[Text | None],
        "inference.max_batch_tokens": BatchSize,
        "inference.batch_size": BatchSize | None,
        "inference.lookahead": NotRequired[BatchSize | None],
    },
)
"""The settings in a fingerprint that later steps read; the others are compared. A name is None only where it is not
known: for a capture from Python."""


class SpecialTokens(TypedDict):
    """The special tokens that are added to a text that does not have them."""

    before: list[Text]
    after: list[Text]


class OwnSpecialTokens(TypedDict):
    """The numbers of examples whose text has special tokens of its own."""

    before: Count
    after: Count


TokenizerFacts = TypedDict(
    "TokenizerFacts",
    {"class": Text, "special_tokens": NotRequired[SpecialTokens], "chat_template": NotRequired[Sha256]},
)
"""`chat_template` is a digest of the template that renders conversations."""


class Job(TypedDict):
    """The facts that the record of a job and the manifest of its dataset share."""

    source: NotRequired[Literal["python"]]  # of a capture from Python alone
    fingerprint: Fingerprint
    commits: Commits
    versions: dict[str, Text]
    stated: Stated
    model: Model
    tokenizer: TokenizerFacts


JobId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}-[0-9a-f]{16}\Z")]
"""The identity of a job: see `record.py`."""


class Identity(TypedDict):
    """The part of a record that identifies its job."""

    job_id: JobId


class Mark(TypedDict):
    """The mark of a captured shard: the examples in its journal, and its source rows without text."""

    job: JobId
    examples: Count
    skipped: Count


class Unpublished(TypedDict):
    """The mark of a dataset that its job has not published yet. `manifest` is the digest of its manifest."""

    manifest: Sha256


class Record(Job):
    """The record of an unfinished job. `sha256` is a digest of the rest."""

    sha256: Sha256
    job_id: JobId
    config: JobSettings
    source_rows: Count | None
    base: Base | None


class Entry(TypedDict):
    """A file of a dataset."""

    rows: NotRequired[Count]
    bytes: Count
    sha256: Sha256


class StatisticsFacts(TypedDict):
    """The statistics of a dataset: tokens of each head, vectors with NaN or Inf by head and stage, and heads and stages
    with numbers that float32 cannot hold. Earlier versions have no `overflow`."""

    tokens: Count
    nonfinite: dict[str, Count]
    overflow: NotRequired[list[Text]]


class Manifest(Job):
    """The manifest of a dataset."""

    format: Text
    config: Settings
    examples: Count
    texts: NotRequired[Count]
    tokens: Count
    longest_example: Annotated[int, Meta(ge=0, lt=2**31)]
    truncated_examples: Count
    truncated_tokens: NotRequired[Count]
    own_special_tokens: NotRequired[OwnSpecialTokens]
    segments: NotRequired[dict[Text, Count]]
    examples_beyond_max_positions: NotRequired[Count]
    skipped_rows: Count
    source_rows: Count
    batching: NotRequired[list[BatchSettings]]
    grown_from: list[Growth]
    rows: Count
    rows_by_bucket: dict[Kind, dict[Bucket, Count]]
    inclusion: dict[Kind, dict[Bucket, Annotated[float, Meta(ge=0, le=1)]]]
    nonfinite_rows: NotRequired[dict[str, Count]]
    statistics: NotRequired[StatisticsFacts]
    files: dict[str, Entry]
    job_id: NotRequired[JobId]  # until the manifest is promoted
    replaces: NotRequired[dict[str, Sha256 | None]]  # until it is promoted: files of the version before it
    sha256: NotRequired[Sha256]  # until it is promoted: a digest of the rest
    proof: Proof
    timings: dict[str, Seconds]


def read_record(path: Path, *, way_out: str, access: Access = PLAIN) -> dict[str, Any]:
    """Returns the record of a job in a file of the work folder, as plain data. `access` is the way to the file.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a record of this package.
    """
    data = stored.read_bytes(path, way_out=way_out, most_bytes=LARGE, access=access)
    return decode_record(data, path, way_out=way_out)


def decode_record(data: bytes, name: Path | str, *, way_out: str) -> dict[str, Any]:
    """Returns the record of a job in `data`, as plain data. `name` is its name in errors.

    Raises:
        UnreadableError: it is not a record of this package.
    """
    values: Any = stored.decode(data, Record, name, way_out)
    return _checked(values, name, way_out, _in_a_record)


def read_manifest(path: Path, *, way_out: str, follow_links: bool, access: Access = PLAIN) -> dict[str, Any]:
    """Returns the manifest in a file, as plain data. `access` is the way to a file that may not be a link.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UnreadableError: it is not a manifest of this package.
    """
    data = stored.read_bytes(path, way_out=way_out, most_bytes=LARGE, follow_links=follow_links, access=access)
    return decode_manifest(data, path, way_out=way_out)


def decode_manifest(data: bytes, name: Path | str, *, way_out: str) -> dict[str, Any]:
    """Returns the manifest in `data`, as plain data. `name` is its name in errors.

    Raises:
        UnreadableError: it is not a manifest of this package.
    """
    values = stored.decode(data, dict[str, Any], name, way_out)
    if values.get("format") != FORMAT:
        raise UnreadableError(name, f"is not a manifest of qk-sniffer in the format {FORMAT!r}", way_out)
    manifest: Any = stored.check(values, Manifest, name, way_out)
    if not stored.is_unicode(manifest):  # unlike a record, whose paths may hold any bytes
        raise UnreadableError(name, "is not understood (a text is not valid Unicode)", way_out)
    return _checked(manifest, name, way_out, _in_a_manifest)


def _checked(
    values: dict[str, Any], name: Path | str, way_out: str, contradictions: Callable[[Mapping[str, Any]], Iterator[str]]
) -> dict[str, Any]:
    """Checks what types and ranges do not tell: the settings, and what is impossible together."""
    try:
        template = from_dict(values["config"]).dataset.chat.template
    except ValueError as error:
        raise UnreadableError(name, f"is not understood (config: {error})", way_out) from error
    if template is not None and template_file(template) is not None:  # a job stores the content of the user's file
        raise UnreadableError(name, "names a file of this machine as chat template, which is not read", way_out)
    for problem in contradictions(values):
        raise UnreadableError(name, f"contradicts itself ({problem})", way_out)
    return values


def _in_a_record(record: Mapping[str, Any]) -> Iterator[str]:
    count, of_fingerprint = record["config"]["shard"]["count"], record["fingerprint"].get("shard.count")
    if count != of_fingerprint:
        yield f"shard.count is {count} in config, {of_fingerprint} in fingerprint"
    yield from _missing_names(record)
    base = record["base"]
    if base is not None and base["hub"] is not None and not is_branch_name(base["hub"]["name"]):
        yield f"{base['hub']['name']!r} is not the name of a branch"
    yield from layer_problems(record["model"]["layers"])


def _in_a_manifest(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield from _missing_names(manifest)
    layers = manifest["model"]["layers"]
    yield from layer_problems(layers)
    for name in (*manifest["files"], *manifest.get("replaces", ())):
        if not is_dataset_file(name):
            yield f"{name!r} is not the name of a dataset's file"
    listed = (parse_head_name(name.partition("/")[0]) for name in manifest["files"])
    if not any(key.kind in KINDS for key in listed if key is not None):
        yield "it lists no heads"
    captured = {kind for layer in layers for kind, heads in layer["captured"].items() if heads}
    if lacking := captured - manifest["rows_by_bucket"].keys():
        yield f"rows_by_bucket lacks the kind {min(lacking)}"
    sampler = manifest["config"]["sampler"]
    types = {sampler["type"], sampler.get("keys", {}).get("type")}
    if types & {"uniform", "all", "none"} and manifest["longest_example"] > MOST_BUCKETS * sampler["min_bucket_size"]:
        yield f"its positions have more than {MOST_BUCKETS:,} buckets"
    yield from proof_problems(manifest["proof"])


def _missing_names(job: Mapping[str, Any]) -> Iterator[str]:
    """Yields each source without a name. Only those of a capture from Python need none."""
    for key in ("model.name", "model.tokenizer.name", "dataset.path"):
        if job["fingerprint"][key] is None and "source" not in job:
            yield f"{key} is null in fingerprint"
