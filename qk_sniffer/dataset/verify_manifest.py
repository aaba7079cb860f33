"""Reads the facts that `verify` needs from a manifest, and finds contradictions within the manifest."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import STAGE_NAMES, Config, from_dict
from qk_sniffer.dataset.heads import attention_files, captured_heads
from qk_sniffer.dataset.place import of_several
from qk_sniffer.dataset.proof_words import (
    attention,
    compared,
    largest_difference,
    of_rows,
    of_statistics,
    of_summaries,
    whence,
    why,
)
from qk_sniffer.dataset.verify_report import RECREATE, Problem
from qk_sniffer.errors import StoreError
from qk_sniffer.resolved import fingerprint, resolve, with_public_files
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Head, Layout, is_statistics_file, schema, statistics_file
from qk_sniffer.store.locks import holder, is_held
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.record import is_from_python, read_record
from qk_sniffer.store.statistics import Pairs, paired, stages_of
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import counted, not_a_folder

_COUNTS = ("examples", "tokens", "longest_example", "truncated_examples", "skipped_rows", "source_rows", "rows")

_LATER_COUNTS = {"examples_beyond_max_positions", "texts"}
"""Numbers that not every dataset has."""

_DEPEND_ON_WHERE_IT_RAN = {"model.name", "model.adapter", "model.tokenizer.name", "dataset.path", "shard.count"}
"""Keys whose value in the fingerprint cannot be computed from the config in the manifest."""

_Number = TypeVar("_Number", int, float)


class ProblemError(Exception):
    """A problem that leaves nothing else to check."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


@dataclass(frozen=True, eq=False)
class ManifestFacts:
    """The facts in a manifest.

    `title` names model and dataset in a line. `files` and `heads` are by the file's name, heads in the order of the
    manifest's layers. `proof` is the job's proof in words.
    """

    root: Path
    title: str
    files: dict[str, FileEntry]
    config: Config
    sampler: Sampler
    heads: dict[str, Head]
    attention: dict[str, Head]
    """The files of attention summaries by name; empty without summaries."""
    counts: dict[str, int]
    added_tokens: int | None
    """The special tokens that are added to each text; None if the manifest does not say."""
    max_positions: int | None
    rows_by_bucket: dict[str, dict[int, int]]
    nonfinite_rows: dict[str, int] | None
    segments: dict[str, int] | None
    """The tokens in the segments of each name; None without segments."""
    statistics: dict[str, Any] | None
    """The manifest's `statistics`; None if it has none."""
    frequency_pairs: dict[int, Pairs | None]
    """The components that turn with each rotary frequency, by layer; None where they are not known. Empty without
    statistics."""
    inclusion: dict[str, dict[int, float]]
    fingerprints: tuple[dict[str, Any], dict[str, Any]]
    """The fingerprint of `config`, and the one in the manifest."""
    commits: tuple[str | None, str | None]
    """The model's commits that the dataset was captured and proven with."""
    proven: bool | None
    proof: str
    from_python: bool
    """Whether the dataset is a capture from Python."""

    @classmethod
    def read(cls, root: Path) -> "ManifestFacts":
        """Reads the manifest of the dataset at `root`.

        Raises:
            ProblemError: the manifest is missing, or lacks facts.
        """
        layout = Layout(root)
        try:
            manifest = manifests.read(root)
        except StoreError as error:
            raise ProblemError(_no_manifest(layout, error)) from error
        try:
            return cls._of(layout, manifest)
        except Exception as error:  # a manifest without a key, or with nonsense, fails in any way
            instance = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            way_out = f"use the version of qk-sniffer that wrote it, or {RECREATE}"
            raise ProblemError(Problem("manifest", "manifest.json is not understood", instance, way_out)) from error

    @classmethod
    def _of(cls, layout: Layout, manifest: dict[str, Any]) -> "ManifestFacts":
        config = from_dict(manifest["config"])
        heads = {head.file: head for head in captured_heads(manifest)}
        if not heads:
            raise ValueError("no layer has captured heads")
        files = {
            name: FileEntry(None if "rows" not in entry else int(entry["rows"]), int(entry["bytes"]), entry["sha256"])
            for name, entry in manifest["files"].items()
        }
        model = manifest["model"]
        stage = STAGE_NAMES[model["rope_stage"]]
        nonfinite = manifest.get("nonfinite_rows")  # the first datasets of this format do not have it
        proof = manifest["proof"]
        facts = cls(
            root=layout.root,
            title=f"{config.model.slug} ({model['dtype']}, {stage}) on {config.dataset.slug}",
            files=files,
            config=config,
            sampler=Sampler(config.sampler),
            heads=heads,
            attention={head.file: head for head in attention_files(manifest)},
            counts={key: int(manifest[key]) for key in (*_COUNTS, *(_LATER_COUNTS & manifest.keys()))},
            added_tokens=_num_added(config, manifest),
            max_positions=model.get("max_positions"),
            rows_by_bucket=_by_bucket(manifest["rows_by_bucket"], int),
            segments=manifest.get("segments"),
            statistics=manifest.get("statistics"),
            frequency_pairs=_frequency_pairs(model) if config.capture.statistics.enabled else {},
            nonfinite_rows=None if nonfinite is None else {name: int(rows) for name, rows in nonfinite.items()},
            inclusion=_by_bucket(manifest["inclusion"], float),
            fingerprints=(fingerprint(resolve(config)), with_public_files(manifest["fingerprint"])),
            commits=(manifest["commits"]["model"], proof.get("model_commit", manifest["commits"]["model"])),
            proven=proof["proven"],
            proof=_in_words(proof, heads, int(manifest["examples"])),
            from_python="source" in manifest,
        )
        for head in heads.values():
            if not isinstance(head.sliding_window, int | None):
                raise ValueError(f"the sliding_window of layer {head.layer} is {head.sliding_window}")
            facts.schema(head)
        return facts

    @property
    def is_split(self) -> bool:
        """Whether the examples are parts of texts."""
        return self.config.model.tokenizer.overlong == "split"

    def schema(self, head: Head) -> pa.Schema:
        """Returns the columns that the file of a head must have."""
        return schema(head.head_dim, self.config.capture)

    def contradictions(self) -> Iterator[Problem]:
        """Yields the contradictions within the manifest."""
        counts = self.counts
        if self.heads.keys() <= self.files.keys():
            rows = Counter(dict.fromkeys(self.rows_by_bucket, 0))
            for name, head in self.heads.items():
                rows[head.kind] += self.files[name].rows or 0
            for kind, number in sorted(rows.items()):
                if (in_buckets := sum(self.rows_by_bucket.get(kind, {}).values())) != number:
                    yield _contradiction(f"rows_by_bucket has {in_buckets:,} rows of kind {kind}, files has {number:,}")
            if counts["rows"] != rows.total():
                yield _contradiction(f"rows is {counts['rows']:,}, files has {rows.total():,}")
        texts = "texts" if self.is_split else "examples"
        if counts["source_rows"] != counts.get(texts, 0) + counts["skipped_rows"]:
            others = f"{texts} is {counts.get(texts, 0):,} and skipped_rows {counts['skipped_rows']:,}"
            yield _contradiction(f"source_rows is {counts['source_rows']:,}, but {others}")
        captured, proved = self.commits
        if captured != proved:
            yield _contradiction(f"the model's commit is {captured} in commits, {proved} in proof")
        yield from self._statistics_contradictions()
        of_config, listed = self.fingerprints
        for key in sorted((of_config.keys() & listed.keys()) - _DEPEND_ON_WHERE_IT_RAN):
            if of_config[key] != listed[key]:
                yield _contradiction(f"{key} is {of_config[key]!r} in config, {listed[key]!r} in fingerprint")

    def _statistics_contradictions(self) -> Iterator[Problem]:
        statistics = self.config.capture.statistics
        files = sorted(name for name in self.files if is_statistics_file(name))
        if not statistics.enabled:
            if files or self.statistics is not None:
                what = f"the file {files[0]}" if files else "statistics"
                yield _contradiction(f"it has {what}, but capture.statistics.enabled is false in config")
            return
        layers = {head.layer for head in self.heads.values()}
        expected = {statistics_file(layer) for layer in layers}
        if missing := sorted(expected - self.files.keys()):
            yield _contradiction(
                f"files has no {missing[0]}, one of {counted(len(missing), 'missing file')} of statistics"
            )
        if others := sorted(set(files) - expected):
            yield _contradiction(f"files has {others[0]}, and the layer is not captured")
        if self.statistics is None:
            yield _contradiction("it has no statistics, but capture.statistics.enabled is true in config")
            return
        known = {
            f"{head.name}.{stage}" for head in self.heads.values() for stage in stages_of(head.kind, statistics.stages)
        }
        for name in ("nonfinite", "overflow"):
            if strangers := sorted({*self.statistics.get(name, ())} - known):
                yield _contradiction(
                    f"statistics.{name} has {strangers[0]!r}, which is no head and stage of its statistics"
                )


def _num_added(config: Config, manifest: dict[str, Any]) -> int | None:
    if config.model.tokenizer.add_special_tokens is True:
        return None
    return sum(map(len, manifest["tokenizer"].get("special_tokens", {}).values()))


def _frequency_pairs(model: dict[str, Any]) -> dict[int, Pairs | None]:
    found: dict[int, Pairs | None] = {}
    for layer in model["layers"]:
        rotation = layer.get("rotation")
        of = model["rotary"]["frequencies"][rotation["frequencies"]] if isinstance(rotation, dict) else {}
        found[layer["layer"]] = paired(rotation, len(of.get("inv_freq", ())))
    return found


def _by_bucket(values: dict[str, dict[str, Any]], number: Callable[[Any], _Number]) -> dict[str, dict[int, _Number]]:
    return {kind: {int(bucket): number(value) for bucket, value in row.items()} for kind, row in values.items()}


def _in_words(proof: dict[str, Any], heads: dict[str, Head], examples: int) -> str:
    if proof["proven"] is None:
        return f"not proven: {proof['reason']}"
    if not proof["proven"] and "reason" in proof:
        return why(proof)
    layers = len({head.layer for head in heads.values()})
    statistics = of_statistics(proof, heads=len(heads), layers=layers, examples=examples)
    tolerance = (proof if of_rows(proof) else proof["statistics"])["tolerance"]
    differ = f"differ by {largest_difference(proof):.1g} at most (relative; tolerance {tolerance:g})"
    failed = any(check["passed"] is False for check in proof.get("attention", ()))
    last = why(proof) if failed else attention(proof)
    if not of_rows(proof):
        return f"{statistics}, derived again by the job, {differ}; {last}"
    rows = compared(proof, heads=len(heads), layers=layers)
    what = f"{rows}, derived again by the job from {whence(proof, examples)}, {differ}"
    queries = sum(head.kind == "q" for head in heads.values())
    summaries = of_summaries(proof, heads=queries, layers=layers)
    return "; ".join(part for part in (what, summaries, statistics, last) if part)


def _contradiction(instance: str) -> Problem:
    return Problem("manifest", "manifest.json contradicts itself", instance)


def _no_manifest(layout: Layout, error: StoreError) -> Problem:
    if not layout.root.is_dir():
        way_out = "give data_root the folder of a dataset: one that a job wrote, or fetched from the Hub"
        return Problem("manifest", not_a_folder(layout.root), way_out=way_out)
    if layout.manifest.exists():
        problem = f"manifest.json {error.problem}" if isinstance(error, UnreadableError) else str(error)
        return Problem("manifest", problem, way_out=f"use the version of qk-sniffer that wrote it, or {RECREATE}")
    if (several := of_several(layout.root)) is not None:
        return Problem("manifest", several, way_out="verify one of them")
    what = "the dataset is incomplete: no manifest.json"
    if not layout.work.is_dir():
        return Problem("manifest", what, way_out="rerun its job, or fetch the whole dataset")
    running = [f"{holder(lock) or 'a process'} is writing it" for lock in layout.locks() if is_held(lock)]
    way_out = "wait for the running job" if running else "rerun the command that started its job"
    if is_from_python(layout) and not running:
        way_out = f"make a dataset of them: python -m qk_sniffer.finalize data_root={layout.root}"
    return Problem("manifest", what, "; ".join([*running[:1], _progress(layout)]), way_out)


def _progress(layout: Layout) -> str:
    """Returns the progress of the unfinished job in words."""
    if layout.staging.manifest.exists():
        return "all files are staged, but not promoted yet"
    done = 0
    record = None
    with suppress(OSError, StoreError):  # a running job removes these files when it is done
        record = read_record(layout)
        job_id = None if record is None else record["job_id"]
        done = sum(len(Journal(folder, job_id, verify=False).records) for folder in layout.journals())
    if record is None:
        return "its job has captured nothing yet"
    total = record.get("source_rows")
    if total is None:
        return f"{counted(done, 'example')} captured"
    return f"{done:,} of {counted(total, 'example')} of the source captured"
