"""Declares the forms of the record of a job and of the manifest of a dataset, which `stored.py` checks.

Names of files, heads and kinds follow `layout.py`. A file whose name has another form is never read, written or
uploaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args

from msgspec import Meta

from qk_sniffer.config import MOST_COUNT, MOST_RATE, MOST_SHARDS, MOST_SLUG, from_dict
from qk_sniffer.store import stored
from qk_sniffer.store.layout import FORMAT, KEY_HEAD_KINDS, KINDS, is_dataset_file, parse_head_name
from qk_sniffer.store.stored import LARGE, Count, Text, UnreadableError
from qk_sniffer.text import is_branch_name

MOST_LAYERS = 2_000
MOST_HEADS = 10_000
"""The most heads of a kind in one layer."""

MOST_HEAD_DIM = 1 << 16
MOST_FILES = 1 << 17
"""The most heads of a dataset, each of which is a file."""

MOST_BUCKETS = 1 << 20
"""The most buckets of positions that results are drawn by."""

Kind = Literal["q", "k"]
assert get_args(Kind) == KINDS

HeadNumber = Annotated[int, Meta(ge=0, lt=MOST_HEADS)]
NumHeads = Annotated[int, Meta(ge=1, le=MOST_HEADS)]
Bucket = Annotated[str, Meta(pattern=r"\A[0-9]{1,10}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Commit = Annotated[str, Meta(pattern=r"\A[0-9a-f]{40}\Z")]
CommitOrDigest = Annotated[str, Meta(pattern=r"\A([0-9a-f]{40}|sha256:[0-9a-f]{64})\Z")]
_HUB_NAME = "[A-Za-z0-9_]([A-Za-z0-9_.-]{0,98}[A-Za-z0-9_])?"
RepoId = Annotated[str, Meta(pattern=rf"\A{_HUB_NAME}/{_HUB_NAME}\Z")]
Slug = Annotated[str, Meta(pattern=rf"\A[A-Za-z0-9._-]{{1,{MOST_SLUG}}}\Z")]
BatchSize = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
Number = float
"""A number that fits a float; also an integer."""


class Rotation(TypedDict):
    """The rotation of a layer's queries and keys, by the name of its frequencies in `Model.rotary`."""

    frequencies: Text
    pairs: Literal["halves", "neighbours", "neighbours to halves"]
    first: Annotated[int, Meta(ge=0, lt=MOST_HEAD_DIM)]
    direction: Literal[1, -1]
    changed_after: bool


class Layer(TypedDict):
    """A layer, as `LayerFacts.to_dict` and the job describe it."""

    layer: Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]
    num_q_heads: NumHeads
    num_k_heads: NumHeads
    head_dim: Annotated[int, Meta(ge=1, le=MOST_HEAD_DIM)]
    sliding_window: Annotated[int, Meta(ge=1, lt=2**31)] | None
    key_head: NotRequired[list[HeadNumber]]
    full_attention: NotRequired[bool]
    attention_chunk: NotRequired[Annotated[int, Meta(ge=1, lt=2**31)] | None]
    softmax_scale: Number
    softcap: NotRequired[Number | None]
    sinks: NotRequired[list[Number] | None]
    position_bias: NotRequired[bool]
    sparse_attention: NotRequired[bool]
    rotation: NotRequired[Rotation | Text | None]
    captured: dict[Kind, list[HeadNumber]]


class Quantization(TypedDict):
    """The way in which the weights of a checkpoint are quantized; `config` is its `quantization_config`."""

    method: Text
    dequantized: bool
    config: dict[str, Any]


class Adapter(TypedDict):
    """The adapter on the loaded model: its kind in the words of peft, and the model that it was trained on."""

    kind: Text
    base: Text | None


class Model(TypedDict):
    """The loaded model."""

    model_type: Text
    decoder: NotRequired[Text]
    family: NotRequired[Text]
    dtype: Text
    checkpoint_dtype: NotRequired[Text | None]
    quantization: NotRequired[Quantization | None]
    attn_implementation: Text | None
    rope_stage: Literal["pre", "post"]
    layers: Annotated[list[Layer], Meta(min_length=1, max_length=MOST_LAYERS)]
    rotary: dict[str, Any]
    adapter: NotRequired[Adapter]
    max_positions: NotRequired[Count | None]


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


class _Tokenizer(TypedDict):
    name: Text | None


class _Model(TypedDict):
    slug: Slug
    name: Text | None
    revision: Text
    adapter: NotRequired[Text | None]
    tokenizer: _Tokenizer


class _Dataset(TypedDict):
    slug: Slug
    path: Text | None
    max_samples: Count | None
    streaming: bool


class _Keys(TypedDict):
    type: Literal["uniform", "log_uniform", "all"] | None
    base_rate: Annotated[float, Meta(gt=0, le=MOST_RATE)] | None


class SamplerSettings(TypedDict):
    """The settings of a sampler."""

    type: Literal["uniform", "log_uniform", "all"]
    base_rate: Annotated[float, Meta(gt=0, le=MOST_RATE)]
    min_bucket_size: Annotated[int, Meta(ge=1, le=2**31)]
    max_rows_per_example: Annotated[int, Meta(ge=1, le=MOST_COUNT)] | None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    share: Literal["layer_kind", "example"]
    keys: NotRequired[_Keys]


class _Shard(TypedDict):
    index: Annotated[int, Meta(ge=0, lt=MOST_SHARDS)]
    count: Annotated[int, Meta(ge=1, le=MOST_SHARDS)]


class Settings(TypedDict):
    """The settings of a dataset that later steps compute with. `Config` has the types of all."""

    model: _Model
    dataset: _Dataset
    sampler: SamplerSettings


class JobSettings(Settings):
    """The settings of a job, with those of the place where it runs."""

    shard: _Shard
    output: dict[str, Any]
    snapshot: bool | None


class BatchSettings(TypedDict):
    """A change of the batch settings."""

    shard: Annotated[int, Meta(ge=0, lt=MOST_SHARDS)]
    from_index: Count
    max_batch_tokens: BatchSize
    batch_size: BatchSize | None


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
        "model.name": Text,
        "model.tokenizer.name": Text,
        "dataset.path": Text,
        "model.adapter": NotRequired[Text | None],
        "inference.max_batch_tokens": BatchSize,
        "inference.batch_size": BatchSize | None,
    },
)
"""The settings in a fingerprint that later steps read; the others are compared."""


class SpecialTokens(TypedDict):
    """The special tokens that are added to a text that does not have them."""

    before: list[Text]
    after: list[Text]


class OwnSpecialTokens(TypedDict):
    """The numbers of examples whose text has special tokens of its own."""

    before: Count
    after: Count


TokenizerFacts = TypedDict("TokenizerFacts", {"class": Text, "special_tokens": NotRequired[SpecialTokens]})


class Job(TypedDict):
    """The facts that the record of a job and the manifest of its dataset share."""

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
    private: bool


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


class Attention(TypedDict):
    """The check of an attention kernel in one layer, at some positions of one text."""

    layer: Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]
    kind: Text
    tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    positions: Annotated[list[Count], Meta(min_length=1, max_length=1000)]
    tolerance: Number
    passed: bool | None
    reason: NotRequired[Text]
    """Why it was not made, where `passed` is None."""
    largest_difference: NotRequired[Number | None]
    """None if the kernel returned numbers that are not finite."""
    wrong_positions: NotRequired[Annotated[list[Count], Meta(max_length=1000)]]


_COVERAGE = {"rows", "heads", "longest_position", "uncovered"}


class LayerKind(TypedDict):
    """The heads of one kind in one layer."""

    layer: Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]
    kind: Kind


class Beyond(TypedDict):
    """The layers that a proof ran over a longer text than the others."""

    layers: Annotated[list[Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]], Meta(min_length=1, max_length=MOST_LAYERS)]
    longest_position: Count


class Proof(TypedDict):
    """The proof of a dataset. Only one that was made has numbers; the others have a reason."""

    proven: bool | None
    reason: NotRequired[Text]
    examples: NotRequired[list[int]]
    model_commit: NotRequired[Text | None]
    tolerance: NotRequired[Number]
    largest_difference_by_layer: NotRequired[dict[Bucket, float]]
    rows: NotRequired[Count]
    heads: NotRequired[Count]
    longest_position: NotRequired[Count]
    beyond: NotRequired[Beyond]
    uncovered: NotRequired[list[LayerKind]]
    attention: NotRequired[Annotated[list[Attention], Meta(max_length=MOST_LAYERS)]]


class Manifest(Job):
    """The manifest of a dataset."""

    format: Text
    config: Settings
    examples: Count
    tokens: Count
    longest_example: Annotated[int, Meta(ge=0, lt=2**31)]
    truncated_examples: Count
    truncated_tokens: NotRequired[Count]
    own_special_tokens: NotRequired[OwnSpecialTokens]
    examples_beyond_max_positions: NotRequired[Count]
    skipped_rows: Count
    source_rows: Count
    batching: NotRequired[list[BatchSettings]]
    grown_from: list[Growth]
    rows: Count
    rows_by_bucket: dict[Kind, dict[Bucket, Count]]
    inclusion: dict[Kind, dict[Bucket, Annotated[float, Meta(ge=0, le=1)]]]
    nonfinite_rows: NotRequired[dict[str, Count]]
    files: dict[str, Entry]
    job_id: NotRequired[JobId]  # until the manifest is promoted
    sha256: NotRequired[Sha256]  # until it is promoted: a digest of the rest
    proof: Proof
    timings: dict[str, Number]


def read_record(path: Path, *, way_out: str) -> dict[str, Any]:
    """Returns the record of a job in a file of the work folder, as plain data.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is not a record of this package.
    """
    return decode_record(stored.read_bytes(path, way_out=way_out, most_bytes=LARGE), path, way_out=way_out)


def decode_record(data: bytes, name: Path | str, *, way_out: str) -> dict[str, Any]:
    """Returns the record of a job in `data`, as plain data. `name` is its name in errors.

    Raises:
        UnreadableError: it is not a record of this package.
    """
    values: Any = stored.decode(data, Record, name, way_out)
    return _checked(values, name, way_out, _in_a_record)


def read_manifest(path: Path, *, way_out: str, follow_links: bool) -> dict[str, Any]:
    """Returns the manifest in a file, as plain data.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UnreadableError: it is not a manifest of this package.
    """
    data = stored.read_bytes(path, way_out=way_out, most_bytes=LARGE, follow_links=follow_links)
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
    return _checked(manifest, name, way_out, _in_a_manifest)


def _checked(
    values: dict[str, Any], name: Path | str, way_out: str, contradictions: Callable[[Mapping[str, Any]], Iterator[str]]
) -> dict[str, Any]:
    """Checks what types and ranges do not tell: the settings, and what is impossible together."""
    try:
        from_dict(values["config"])
    except ValueError as error:
        raise UnreadableError(name, f"is not understood (config: {error})", way_out) from error
    for problem in contradictions(values):
        raise UnreadableError(name, f"contradicts itself ({problem})", way_out)
    return values


def _in_a_record(record: Mapping[str, Any]) -> Iterator[str]:
    count, of_fingerprint = record["config"]["shard"]["count"], record["fingerprint"].get("shard.count")
    if count != of_fingerprint:
        yield f"shard.count is {count} in config, {of_fingerprint} in fingerprint"
    base = record["base"]
    if base is not None and base["hub"] is not None and not is_branch_name(base["hub"]["name"]):
        yield f"{base['hub']['name']!r} is not the name of a branch"
    yield from _in_layers(record["model"]["layers"])


def _in_a_manifest(manifest: Mapping[str, Any]) -> Iterator[str]:
    layers = manifest["model"]["layers"]
    yield from _in_layers(layers)
    for name in manifest["files"]:
        if not is_dataset_file(name):
            yield f"{name!r} is not the name of a dataset's file"
    if not any(parse_head_name(name.partition("/")[0]) for name in manifest["files"]):
        yield "it lists no heads"
    captured = {kind for layer in layers for kind, heads in layer["captured"].items() if heads}
    if lacking := captured - manifest["rows_by_bucket"].keys():
        yield f"rows_by_bucket lacks the kind {min(lacking)}"
    sampler = manifest["config"]["sampler"]
    types = {sampler["type"], sampler.get("keys", {}).get("type")}
    if types & {"uniform", "all"} and manifest["longest_example"] > MOST_BUCKETS * sampler["min_bucket_size"]:
        yield f"its positions have more than {MOST_BUCKETS:,} buckets"
    yield from _in_a_proof(manifest["proof"])


def _in_a_proof(proof: Mapping[str, Any]) -> Iterator[str]:
    checks = proof.get("attention", ())
    failed = any(check["passed"] is False for check in checks)
    needed = {"examples", "tolerance", "largest_difference_by_layer"}
    if proof["proven"] is None or (failed and "reason" in proof):
        needed = {"reason"}
    elif proof.keys() & _COVERAGE:  # earlier versions have none of these
        needed |= _COVERAGE
    if missing := needed - proof.keys():
        yield f"proof lacks {', '.join(sorted(missing))}"
    elif proof["proven"] and not proof["largest_difference_by_layer"]:
        yield "proof is of no layer"
    elif proof["proven"] is not False and failed:
        yield "proof is not false, and a check of attention failed"
    for check in checks:
        if check["passed"] is not True and ("reason" if check["passed"] is None else "wrong_positions") not in check:
            yield f"the check of attention in layer {check['layer']} does not say what is wrong"


def _in_layers(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    captured = sum(len(heads) for layer in layers for heads in layer["captured"].values())
    if not 1 <= captured <= MOST_FILES:
        yield f"its layers list {captured:,} captured heads, not 1 to {MOST_FILES:,}"
    seen = set()
    for layer in layers:
        number, num_q, num_k = layer["layer"], layer["num_q_heads"], layer["num_k_heads"]
        if number in seen:
            yield f"layer {number} is listed twice"
        seen.add(number)
        if num_k > num_q:
            yield f"layer {number} has {num_k:,} key heads for {num_q:,} query heads"
        if (of_queries := layer.get("key_head")) is not None:
            if len(of_queries) != num_q:
                yield f"layer {number} lists the key heads of {len(of_queries):,} query heads, and has {num_q:,}"
            elif max(of_queries) >= num_k:
                yield f"layer {number} lists key head {max(of_queries)} in key_head, which it does not have"
        for kind, heads in layer["captured"].items():
            if len(set(heads)) != len(heads):
                yield f"layer {number} lists a head of kind {kind} twice"
            if max(heads, default=0) >= (num_k if kind in KEY_HEAD_KINDS else num_q):
                yield f"layer {number} lists head {max(heads)} of kind {kind}, which it does not have"
