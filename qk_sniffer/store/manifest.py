"""Reads and writes the manifest, which describes a dataset and lists its files. A root without one is not whole.

format          "qk-sniffer/1"
job             the keys that the job adds: resolved config, versions, commits, head layout, rotary parameters, ...
source          "python" for a capture from Python (`qk_sniffer.capture`); missing for a job. The texts and tokenizer of
                such a capture are not known. Its model has the name and the commit that its config tells, if any. It is
                not proven, because its calls cannot be repeated
batching        changes of the batch settings while the job ran: [{"shard", "from_index", "max_batch_tokens",
                "batch_size", "lookahead"}, ...]. from_index is the source's index of the first example that was
                captured after the change. Earlier versions have no lookahead there. The fingerprint has the settings
                before the first change
grown_from      [{"source_rows", "versions", "batching"}, ...]: of the earlier versions of a dataset that has grown
examples, tokens, rows         of the whole dataset; rows over all heads
texts           with `model.tokenizer.overlong=split`: the texts that the examples are parts of
longest_example tokens of the longest example
truncated_examples, truncated_tokens    examples that were cut to max_length, and the tokens that they lack in all. The
                second is missing if some were not counted: those of long texts, and those of an earlier version
examples_beyond_max_positions   examples of more tokens than `max_positions` of `model`, the number that the model's
                config provides for; missing if the config has no such number, or an earlier version wrote the manifest
segments        {"user": 1234, ...}: the tokens of all examples in segments of each name; missing without segments. Of
                `config.sampler.segments`, only the tokens in these segments have rows, and count in `statistics`
own_special_tokens  {"before", "after"}: examples whose text itself begins or ends with the special tokens that the
                tokenizer adds; they were not added again. `tokenizer` has these tokens
rows_by_bucket  {"q": {"7": 1234, ...}, "k": ...}, over all heads of the kind
nonfinite_rows  {"l00h00q/data.parquet": 3}: rows with NaN or Inf, for the heads that have any
statistics      {"tokens": 9000, "nonfinite": {"l00h00q.post": 3}, "overflow": ["l00h01q.post"]}: the tokens of each
                head, those of them whose vectors have NaN or Inf, for the heads that have any, and the heads with
                numbers that float32 cannot hold, which are NaN; missing without statistics.
                `config.capture.statistics` says which tokens and stages they are of
proof           {"proven", "examples", "rows", "heads", "longest_position", "beyond", "uncovered", "tolerance",
                "largest_difference_by_layer", "row_tolerance", "largest_row_difference_by_layer", "attention", ...}:
                the rows that were derived a second time, over all heads, and each (layer, kind) without one. A
                difference is over the rows of a head in an example, or of a single row. attention has the check of a
                kernel for each kind of attention: {"layer", "kind", "tokens", "positions", "passed", ...}. statistics
                has what was compared of statistics: {"stages", "examples", "tokens", "heads", "uncovered",
                "tolerance", "largest_difference_by_layer"}, the tokens being those of each head. Without rows, these
                alone prove the dataset. summaries has what was compared of attention summaries: {"rows", "heads",
                "uncovered", "tolerance", "largest_difference_by_layer"}. Without numbers there is a "reason"
files           {"l00h00q/data.parquet": {"rows", "bytes", "sha256"}, ...}; rows of Parquet files only. rows and
                rows_by_bucket count vectors, and so not the rows of attention summaries, `l00h00a/data.parquet`
timings         seconds by stage of the run that wrote it: the only part that differs between equal datasets
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.store import stored
from qk_sniffer.store.disk import write_atomic
from qk_sniffer.store.files import Files, difference, inside
from qk_sniffer.store.forms import decode_manifest, read_manifest
from qk_sniffer.store.layout import FORMAT, KINDS, MANIFEST, HeadKey, Layout, missing_manifest, parse_head_name
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.record import is_from_python

WAY_OUT = (
    "use the version of qk-sniffer that wrote it, fetch the dataset again, or recreate it with output.overwrite=true"
)


@dataclass(frozen=True)
class FileEntry:
    """A file of the dataset. `size` is in bytes, `sha256` in hex; `rows` is None for files that are not Parquet."""

    rows: int | None
    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "FileEntry":
        return cls(None, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Written:
    """The result of a compaction. Paths are relative to the root, with slashes."""

    files: dict[str, FileEntry]
    rows_by_bucket: dict[str, dict[int, int]]
    """Rows by kind and bucket, over all heads of the kind."""
    num_examples: int
    num_texts: int
    """The texts that the examples are, or are parts of."""
    num_tokens: int
    num_truncated: int
    truncated_tokens: int | None
    """The tokens that the truncated examples lack in all; None if the number is not known."""
    own_special_tokens: dict[str, int]
    """Examples whose text itself has special tokens "before" and "after", which were not added again."""
    longest_example: int
    nonfinite_rows: dict[str, int]
    """Rows with NaN or Inf, by the head's file, for the heads that have any."""
    segments: dict[str, int] | None = None
    """The tokens in the segments of each name; None without segments."""
    statistics: dict[str, Any] | None = None
    """The manifest's `statistics`; None without statistics."""

    @property
    def rows(self) -> int:
        """The rows of all heads together."""
        return sum(sum(rows.values()) for rows in self.rows_by_bucket.values())

    @property
    def size(self) -> int:
        """The bytes of all files together."""
        return sum(entry.size for entry in self.files.values())


def build(job: Mapping[str, Any], written: Written, *, timings: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Returns the manifest of the files in `written`, as plain data for JSON. `job` gives further keys."""
    manifest = {
        **job,
        "format": FORMAT,
        "examples": written.num_examples,
        "tokens": written.num_tokens,
        "longest_example": written.longest_example,
        "truncated_examples": written.num_truncated,
        "own_special_tokens": written.own_special_tokens,
        "rows": written.rows,
        "rows_by_bucket": written.rows_by_bucket,
        "nonfinite_rows": written.nonfinite_rows,
        "files": {name: _without_none(entry) for name, entry in written.files.items()},
        "timings": dict(timings or {}),
    }
    if written.statistics is not None:
        manifest["statistics"] = written.statistics
    if written.segments is not None:
        manifest["segments"] = written.segments
    if written.truncated_tokens is not None:
        manifest["truncated_tokens"] = written.truncated_tokens
    plain: dict[str, Any] = json.loads(encode(manifest))  # as `read` returns it: all keys are strings
    return plain


def with_files(manifest: Mapping[str, Any], files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """Returns the manifest with `files` added; they replace entries of the same names."""
    entries = {name: _without_none(entry) for name, entry in files.items()}
    return {**manifest, "files": {**manifest["files"], **entries}}


def encode(manifest: Mapping[str, Any]) -> bytes:
    """Returns the manifest's bytes. The keys are sorted, so that equal manifests are equal files."""
    return stored.encode(manifest, indent=2, sort_keys=True)


def write(layout: Layout, manifest: Mapping[str, Any], *, access: Access = PLAIN) -> None:
    """Writes the manifest of the dataset at `layout`, atomically and durably."""
    write_atomic(layout.manifest, encode(manifest), access=access)


def read(root: Path) -> dict[str, Any]:
    """Returns the manifest of the dataset at `root`.

    Raises:
        StoreError: the dataset has none and is therefore incomplete; or the manifest cannot be read, or is not one of
            this package.
    """
    path = inside(root, MANIFEST)
    try:
        return read_manifest(path, way_out=WAY_OUT, follow_links=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(root) from None


def of(files: Files) -> dict[str, Any]:
    """Returns the manifest of the dataset in `files`.

    Raises:
        StoreError: as for `read`.
        HubError: the manifest cannot be fetched.
    """
    return read(files.path(MANIFEST).parent)


def with_digest(files: Files) -> tuple[dict[str, Any], str]:
    """Returns the manifest of the dataset in `files`, and the sha256 of the bytes that it was read from, in hex.

    Raises:
        StoreError, HubError: as for `of`.
    """
    path = inside(files.path(MANIFEST).parent, MANIFEST)
    try:
        data = stored.read_bytes(path, way_out=WAY_OUT, most_bytes=stored.LARGE, follow_links=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path.parent) from None
    return decode_manifest(data, path, way_out=WAY_OUT), hashlib.sha256(data).hexdigest()


def changed_files(root: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Returns the names of the files at `root` that are missing or differ in size from the manifest.

    Raises:
        StoreError: a link leads out of the dataset.
    """
    files = manifest["files"].items()
    return [name for name, entry in files if difference(inside(root, name), entry["bytes"]) is not None]


def texts(manifest: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the key of the number of texts in a manifest, and the number."""
    key = "texts" if "texts" in manifest else "examples"
    return key, manifest[key]


def heads(manifest: Mapping[str, Any]) -> list[HeadKey]:
    """Returns the heads whose vectors a manifest lists, by layer, then in the order of `KINDS`."""
    keys = [key for name in manifest["files"] if (key := parse_head_name(name.split("/")[0])) is not None]
    return sorted((key for key in keys if key.kind in KINDS), key=lambda key: key.order)


def _missing(root: Path) -> StoreError:
    if is_from_python(Layout(root)):
        return StoreError(
            f"the dataset at {root} is incomplete: no manifest.json. It is an unfinished capture from Python, of whose "
            f"whole examples python -m qk_sniffer.finalize data_root={root} makes a dataset"
        )
    return missing_manifest(root)


def _without_none(entry: FileEntry) -> dict[str, Any]:
    values = {"rows": entry.rows, "bytes": entry.size, "sha256": entry.sha256}
    return {key: value for key, value in values.items() if value is not None}
