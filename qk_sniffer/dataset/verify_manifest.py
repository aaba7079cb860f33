"""A dataset's manifest as `verify` takes it: what it says of files and heads, and whether it agrees with itself."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import Config, from_dict
from qk_sniffer.dataset.heads import head_specs
from qk_sniffer.dataset.verify_report import ANEW, Problem
from qk_sniffer.dataset.verify_rows import Head
from qk_sniffer.errors import StoreError
from qk_sniffer.resolved import fingerprint, resolve
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Layout, schema
from qk_sniffer.store.locks import holder, is_held
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.record import read_record
from qk_sniffer.text import counted

_COUNTS = ("examples", "tokens", "truncated_examples", "skipped_rows", "source_rows", "rows")

_DEPEND_ON_WHERE_IT_RAN = {"model.name", "model.tokenizer.name", "dataset.path", "shard.count"}
"""Keys whose value in the fingerprint is not found again from the config in the manifest."""

_Number = TypeVar("_Number", int, float)


class ProblemError(Exception):
    """A dataset of which nothing more can be checked."""

    def __init__(self, fault: Problem) -> None:
        super().__init__(fault.what)
        self.fault = fault


@dataclass(frozen=True, eq=False)
class ManifestFacts:
    """What the manifest says. `files` and `heads` by the file's name, heads in the order of the manifest's layers.

    `title`: what was captured, in a line. `proven` and `proof`: what the job found of its vectors, and that in words.
    """

    title: str
    files: dict[str, FileEntry]
    config: Config
    sampler: Sampler
    heads: dict[str, Head]
    counts: dict[str, int]
    rows_by_bucket: dict[str, dict[int, int]]
    nonfinite_rows: dict[str, int] | None
    inclusion: dict[str, dict[int, float]]
    fingerprints: tuple[dict[str, Any], dict[str, Any]]
    """That of `config`, and the one that is stated beside it."""
    proven: bool | None
    proof: str

    @classmethod
    def read(cls, root: Path) -> "ManifestFacts":
        """The manifest of the dataset at `root`.

        Raises:
            FaultError: there is none, or none that can be understood.
        """
        layout = Layout(root)
        try:
            manifest = manifests.read(root)
        except StoreError as error:
            raise ProblemError(_no_manifest(layout, error)) from error
        try:
            return cls._of(layout, manifest)
        except Exception as error:  # whatever a manifest leads to that lacks something or holds nonsense
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            way_out = f"use the version of qk-sniffer that made it, or {ANEW}"
            raise ProblemError(Problem("manifest", "manifest.json is not understood", said, way_out)) from error

    @classmethod
    def _of(cls, layout: Layout, manifest: dict[str, Any]) -> "ManifestFacts":
        config = from_dict(manifest["config"])
        capture = config.capture
        heads = {}
        for spec in head_specs(manifest):
            if not isinstance(spec.sliding_window, int | None):
                raise ValueError(f"the sliding_window of layer {spec.layer} is {spec.sliding_window}")
            path = layout.head_file(spec.layer, spec.head, spec.kind)
            columns = schema(
                spec.head_dim, token_ids=capture.capture_token_ids, token_strings=capture.capture_token_strings
            )
            heads[path.relative_to(layout.root).as_posix()] = Head(spec, path, columns)
        if not heads:
            raise ValueError("no layer has captured heads")
        files = {
            name: FileEntry(None if "rows" not in entry else int(entry["rows"]), int(entry["bytes"]), entry["sha256"])
            for name, entry in manifest["files"].items()
        }
        model = manifest["model"]
        stage = {"pre": "before RoPE", "post": "after RoPE"}[model["rope_stage"]]
        # These two came later than the first datasets of this format.
        nonfinite = manifest.get("nonfinite_rows")
        proof = manifest.get("proof", {"proven": None, "reason": "manifest.json has no proof"})
        return cls(
            title=f"{config.model.slug} ({model['dtype']}, {stage}) on {config.dataset.slug}",
            files=files,
            config=config,
            sampler=Sampler(config.sampler),
            heads=heads,
            counts={key: int(manifest[key]) for key in _COUNTS},
            rows_by_bucket=_by_bucket(manifest["rows_by_bucket"], int),
            nonfinite_rows=None if nonfinite is None else {name: int(rows) for name, rows in nonfinite.items()},
            inclusion=_by_bucket(manifest["inclusion"], float),
            fingerprints=(fingerprint(resolve(config)), dict(manifest["fingerprint"])),
            proven=proof["proven"],
            proof=_in_words(proof),
        )

    def contradictions(self) -> Iterator[Problem]:
        """Where the manifest disagrees with itself."""
        counts = self.counts
        if self.heads.keys() <= self.files.keys():
            rows = Counter(dict.fromkeys(self.rows_by_bucket, 0))
            for name, head in self.heads.items():
                rows[head.spec.kind] += self.files[name].rows or 0
            for kind, number in sorted(rows.items()):
                if (there := sum(self.rows_by_bucket.get(kind, {}).values())) != number:
                    yield _contradiction(f"rows_by_bucket has {there:,} rows of kind {kind}, files has {number:,}")
            if counts["rows"] != rows.total():
                yield _contradiction(f"rows is {counts['rows']:,}, those of files are {rows.total():,}")
        if counts["source_rows"] != counts["examples"] + counts["skipped_rows"]:
            others = f"{counts['examples']:,} examples and {counts['skipped_rows']:,} skipped_rows"
            yield _contradiction(f"source_rows is {counts['source_rows']:,}, but there are {others}")
        mine, beside = self.fingerprints
        for key in sorted((mine.keys() & beside.keys()) - _DEPEND_ON_WHERE_IT_RAN):
            if mine[key] != beside[key]:
                yield _contradiction(f"{key} is {mine[key]!r} in config, {beside[key]!r} in fingerprint")


def _by_bucket(stated: dict[str, dict[str, Any]], number: Callable[[Any], _Number]) -> dict[str, dict[int, _Number]]:
    return {kind: {int(bucket): number(value) for bucket, value in row.items()} for kind, row in stated.items()}


def _in_words(proof: dict[str, Any]) -> str:
    if proof["proven"] is None:
        return f"not proven: {proof['reason']}"
    largest = max(proof["largest_difference_by_layer"].values(), default=math.nan)
    which = counted(len(proof["examples"]), "example")
    return (
        f"rows of {which}, derived again by the job, differ by {largest:.1g} at most (relative; tolerance "
        f"{proof['tolerance']:g})"
    )


def _contradiction(instance: str) -> Problem:
    return Problem("manifest", "manifest.json contradicts itself", instance)


def _no_manifest(layout: Layout, error: StoreError) -> Problem:
    if not layout.root.is_dir():
        way_out = "give data_root the folder of a dataset: one that a job wrote, or fetched from the Hub"
        return Problem("manifest", f"there is no folder {layout.root}", way_out=way_out)
    if layout.manifest.exists():
        return Problem("manifest", str(error), way_out=f"use the version of qk-sniffer that made it, or {ANEW}")
    what = "the dataset is incomplete: no manifest.json"
    if not layout.work.is_dir():
        return Problem("manifest", what, way_out="run its job again, or fetch all of the dataset")
    running = [f"{holder(lock) or 'a process'} is at work" for lock in layout.locks() if is_held(lock)]
    way_out = "wait for the job that runs" if running else "run the same command again: it goes on"
    return Problem("manifest", what, "; ".join([*running[:1], _progress(layout)]), way_out)


def _progress(layout: Layout) -> str:
    """How far the unfinished job is."""
    if layout.staging.manifest.exists():
        return "all files are made; they only have to be put in their places"
    done = 0
    record = None
    with suppress(OSError, StoreError):  # a job that runs removes what it needs no more
        record = read_record(layout)
        done = sum(len(Journal(folder, verify=False).records) for folder in layout.journals())
    if record is None:
        return "its job has captured nothing yet"
    total = record.get("source_rows")
    of = "" if total is None else f" of {counted(total, 'row')} of the source"
    return f"{counted(done, 'example')}{of} captured"
