"""Compares a dataset with its manifest: every file, every head, every row, the examples and the proof."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from qk_sniffer.dataset.verify_manifest import ManifestFacts, ProblemError
from qk_sniffer.dataset.verify_report import KIND_NAMES, Problem, Report, named
from qk_sniffer.dataset.verify_rows import Examples, Found, Head, check_file, check_rows, values
from qk_sniffer.machine import num_threads
from qk_sniffer.store.layout import EXAMPLES, Layout, examples_schema, parse_head_name
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.text import compact_ranges, counted, in_mb

HEADS_PER_TASK = 16
"""A thread goes through the rows of so many heads side by side, for which the sampler is asked once."""

MAX_BUCKET_LINES = 12

_ROW_CHECKS = {
    "order": "rows are sorted by example and position",
    "unique": "no example and position is there twice in a head",
    "example_id": "every row is of an example in examples/data.parquet",
    "position": "every row is of a token of its example",
    "bucket": "buckets are those of the positions",
    "sliding_window": "windows are those of the layers",
    "alike": "the heads of a layer and kind have the same rows",
}

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def verify(root: Path) -> Report:
    """Everything that is wrong with the dataset at `root`, and what was found right."""
    report = Report(root)
    try:
        stated = ManifestFacts.read(root)
    except ProblemError as error:
        report.add([error.fault])
        return report
    report.heads = [head.key for head in stated.heads.values()]
    report.rows = stated.counts["rows"]
    report.size = sum(entry.size for entry in stated.files.values())
    num_steps = len(stated.files) + len(_tasks(list(stated.heads.values())))
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=num_steps, unit="step", desc="verify", disable=None, dynamic_ncols=True, leave=False) as bar:
        _check_heads(stated, report)
        intact, looked_into = _check_files(Layout(root), stated, report, bar)
        examples = _check_examples(Layout(root), stated, report) if EXAMPLES in intact else None
        _check_rows(stated, looked_into, examples, report, bar)
    _check_manifest(Layout(root), stated, examples, report)
    _tell_proof(stated, report)
    return report


def _check_heads(stated: ManifestFacts, report: Report) -> None:
    """The heads in the list of files against those that the layers say are captured."""
    listed = {name for name in stated.files if parse_head_name(name.removesuffix("/data.parquet"))}
    if missing := [head.key for name, head in stated.heads.items() if name not in listed]:
        report.add(
            Problem("heads", "manifest.json does not list the file of a captured head", head=key) for key in missing
        )
    for name in sorted(listed - stated.heads.keys()):
        report.add([Problem("heads", "manifest.json lists heads that no layer says to be captured", name)])
    report.passed("heads", f"{len(report.heads):,}: {named(report.heads, ())}")


def _check_files(
    layout: Layout, stated: ManifestFacts, report: Report, bar: tqdm
) -> tuple[set[str], dict[str, tuple[Head, Found]]]:
    """The names of the files that are those of the manifest, and what their heads' files hold but for the rows."""

    def look(name: str) -> tuple[list[Problem], Found | None]:
        faults = list(_file_faults(layout.root / name, stated.files[name]))
        head = stated.heads.get(name)
        if faults or head is None:
            return faults, None
        return faults, check_file(head, stated.files[name].rows or 0)

    intact, looked_into = set(), {}
    for name, (faults, found) in zip(stated.files, _each(look, list(stated.files), bar), strict=True):
        report.add(faults)
        if not faults:
            intact.add(name)
        if found is not None:
            report.add(found.faults)
            looked_into[name] = stated.heads[name], found
    report.add(_unlisted(layout, stated))
    for name in (EXAMPLES, layout.card.name):
        if name not in stated.files:
            report.add([Problem("files", "part of every dataset, but manifest.json does not list it", name)])
    size, count = in_mb(report.size), counted(len(stated.files), "file")
    report.passed("files", f"{count}, {size}: size and sha256 are those in manifest.json")
    some = _some(len(looked_into), len(stated.heads))
    columns = next(iter(stated.heads.values())).schema.names
    report.passed("parquet", f"{some} can be read, with the rows that manifest.json lists")
    report.passed("schema", f"{some}: {', '.join(columns)}")
    report.passed("metadata", f"{some}: what each file says of its head is what manifest.json says")
    if stated.nonfinite_rows is not None:
        report.add(_nonfinite_faults(stated.nonfinite_rows, looked_into))
    nonfinite = {head: found.nonfinite for head, found in looked_into.values() if found.nonfinite}
    if nonfinite:
        where = named([head.key for head in nonfinite], report.heads)
        report.note("vector", f"{counted(sum(nonfinite.values()), 'vector')} with NaN or Inf in {where}")
    else:
        report.passed("vector", f"{some}: no NaN, no Inf")
    return intact, looked_into


def _file_faults(path: Path, entry: FileEntry) -> Iterator[Problem]:
    name = f"{path.parent.name}/{path.name}" if path.name == "data.parquet" else path.name
    try:
        size = path.stat().st_size
        if size != entry.size:
            yield Problem("files", "not of the size in manifest.json", f"{name}: {size:,} bytes, not {entry.size:,}")
            return
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                yield Problem("files", "changed since manifest.json was written: another sha256", name)
    except FileNotFoundError:
        yield Problem("files", "listed in manifest.json, but not there", name)
    except OSError as error:
        way_out = "mend the disk, or the rights of the file"
        yield Problem("files", f"cannot be read: {error.strerror}", name, way_out)


def _nonfinite_faults(noted: Mapping[str, int], looked_into: Mapping[str, tuple[Head, Found]]) -> Iterator[Problem]:
    for name, (head, found) in looked_into.items():
        if found.readable and found.nonfinite != noted.get(name, 0):
            what = "the number of vectors with NaN or Inf is not that in manifest.json"
            yield head.fault("vector", what, f"{found.nonfinite:,} instead of {noted.get(name, 0):,}")


def _unlisted(layout: Layout, stated: ManifestFacts) -> Iterator[Problem]:
    """Files in the folders of heads and examples that readers may take for part of the dataset."""
    known = {*stated.files, *stated.heads, EXAMPLES}
    for path in sorted(layout.root.glob("*/*")):
        folder, name = path.parent.name, path.relative_to(layout.root).as_posix()
        is_ours = folder == "examples" or parse_head_name(folder) is not None
        if is_ours and name not in known and not path.name.startswith("."):
            yield Problem("files", "not part of the dataset: manifest.json does not list it", name, "remove it")


def _check_examples(layout: Layout, stated: ManifestFacts, report: Report) -> Examples | None:
    """The examples, where they are good enough to check the rows with them."""
    try:
        with pq.ParquetFile(layout.examples) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        report.add([Problem("examples", "cannot be read as Parquet", str(error).partition("\n")[0])])
        return None
    if not table.schema.equals(examples_schema()):
        columns = ", ".join(f"{column.name} {column.type}" for column in table.schema)
        report.add([Problem("examples", "the columns are not those of the contract", columns)])
        return None
    example_id, num_tokens, index = (values(table[name]) for name in ("example_id", "num_tokens", "index"))
    for key, there in (
        ("examples", len(table)),
        ("tokens", int(num_tokens.sum(dtype=np.int64))),
        ("truncated_examples", int(np.count_nonzero(values(table["truncated"])))),
    ):
        if stated.counts[key] != there:
            instance = f"{key}: {there:,}, not {stated.counts[key]:,}"
            report.add([Problem("examples", "the numbers are not those in manifest.json", instance)])
    max_length = stated.config.model.tokenizer.max_length
    ids, counts = np.unique(example_id, return_counts=True)
    twice = np.isin(example_id, ids[counts > 1])
    by_index = stated.config.dataset.id_column is None
    length_is_wrong = (num_tokens < 1) | (num_tokens > max_length)
    for what, wrong in (
        ("an example_id is there twice", twice),
        ("the indices do not ascend", np.diff(index, prepend=index[:1] - 1) <= 0),
        (f"num_tokens is not 1 to {max_length:,} (model.tokenizer.max_length)", length_is_wrong),
        ("example_id is not the index, though dataset.id_column is null", (example_id != index) & by_index),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            example = ", ".join(f"{name} {table[name][row]}" for name in ("index", "example_id", "num_tokens"))
            report.add([Problem("examples", what, f"row {row}: {example}", rows=int(wrong.sum()))])
    report.passed("examples", f"{len(table):,}, with {counted(int(num_tokens.sum(dtype=np.int64)), 'token')}")
    return None if twice.any() or length_is_wrong.any() or not len(table) else Examples(example_id, num_tokens)


def _check_rows(
    stated: ManifestFacts,
    looked_into: dict[str, tuple[Head, Found]],
    examples: Examples | None,
    report: Report,
    bar: tqdm,
) -> None:
    heads = [head for head, found in looked_into.values() if found.readable]
    if examples is None or not heads:
        reason = "examples/data.parquet is not sound" if examples is None else "no head's file can be read"
        report.skipped("sampler", f"the rows were not checked: {reason}")
        return
    tasks = _tasks(heads)
    found: dict[Head, Found] = {}
    for task, results in zip(
        tasks, _each(lambda heads: check_rows(heads, stated.sampler, examples), tasks, bar), strict=True
    ):
        found |= zip(task, results, strict=True)
    rows_by_bucket: dict[str, Counter[int]] = {head.spec.kind: Counter() for head in heads}
    for head, result in found.items():
        report.add(result.faults)
        rows_by_bucket[head.spec.kind].update(result.rows_by_bucket)
    report.add(_unlike(found))
    if len(heads) == len(stated.heads) and rows_by_bucket != stated.rows_by_bucket:
        report.add([Problem("manifest", "rows_by_bucket in manifest.json is not what the files hold")])
    some = _some(len(heads), len(stated.heads))
    for check, what in _ROW_CHECKS.items():
        report.passed(check, f"{some}: {what}")
    rows = counted(sum(counter.total() for counter in rows_by_bucket.values()), "row")
    report.passed("sampler", f"{some}: {rows}, exactly those that the sampler chooses")
    report.table = _bucket_table(stated, heads, examples, rows_by_bucket)


def _unlike(found: Mapping[Head, Found]) -> Iterator[Problem]:
    """Heads whose rows are not those of most heads of their layer and kind."""
    keys: dict[tuple[int, str], Counter[int]] = {}
    for head, result in found.items():
        keys.setdefault((head.spec.layer, head.spec.kind), Counter())[result.keys_crc] += 1
    for head, result in found.items():
        if result.keys_crc != keys[head.spec.layer, head.spec.kind].most_common(1)[0][0]:
            yield head.fault("alike", "heads have other rows than most of their layer and kind")


def _bucket_table(
    stated: ManifestFacts, heads: Sequence[Head], examples: Examples, rows_by_bucket: dict[str, Counter[int]]
) -> list[str]:
    """The rows of `heads` by bucket, beside what the sampler expects."""
    lengths = np.sort(examples.num_tokens).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)])

    def num_tokens(stop: int) -> int:
        """How many tokens of all examples have a position below `stop`."""
        shorter = int(np.searchsorted(lengths, stop))
        return int(before[shorter]) + (len(lengths) - shorter) * stop

    limit = stated.config.sampler.max_rows_per_example
    header = ("kind", "bucket", "positions", "rows", "expected" if limit is None else "expected at most")
    lines = [header]
    for kind, counter in rows_by_bucket.items():
        inclusion = stated.sampler.inclusion(kind, int(lengths[-1]))
        buckets = list(inclusion)
        num_heads = sum(head.spec.kind == kind for head in heads)
        # Only buckets of equal width, and so of equal probability, can be so many that they share a line.
        step = -(-len(buckets) // MAX_BUCKET_LINES)
        for start in range(0, len(buckets), step):
            some = buckets[start : start + step]
            first, last = stated.sampler.span(kind, some[0])[0], stated.sampler.span(kind, some[-1])[1]
            expected = num_heads * inclusion[some[0]] * (num_tokens(last + 1) - num_tokens(first))
            rows = sum(counter[bucket] for bucket in some)
            positions = f"{first:,} to {min(last, int(lengths[-1]) - 1):,}"
            lines.append((KIND_NAMES[kind], compact_ranges(some), positions, f"{rows:,}", f"{expected:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
    return [
        "  " + "  ".join(align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=True))
        for line in lines
    ]


def _check_manifest(layout: Layout, stated: ManifestFacts, examples: Examples | None, report: Report) -> None:
    report.add(stated.contradictions())
    if examples is not None:
        longest = int(examples.num_tokens.max())
        for kind in sorted({head.spec.kind for head in stated.heads.values()}):
            if stated.inclusion.get(kind) != stated.sampler.inclusion(kind, longest):
                what = "inclusion in manifest.json is not what the sampler's settings give"
                report.add([Problem("manifest", what, f"kind {kind}")])
    report.passed("manifest", stated.title)
    if layout.work.is_dir():
        report.note("manifest", "a job works, or worked, on another version of this dataset (.qk_sniffer is there)")


def _tell_proof(stated: ManifestFacts, report: Report) -> None:
    """Repeats what the job proved; nothing is derived again here."""
    if stated.proven is None:
        report.note("proof", stated.proof)
    elif stated.proven:
        report.passed("proof", stated.proof)
    else:
        what = "the job found that the vectors are not those of the model"
        report.add([Problem("proof", what, stated.proof, "do not use them; report this with the model's name")])


def _tasks(heads: Sequence[Head]) -> list[list[Head]]:
    """`heads` in parts of one (layer, kind)."""
    tasks = []
    for _, group in groupby(heads, key=lambda head: (head.spec.layer, head.spec.kind)):
        same = list(group)
        tasks += [same[at : at + HEADS_PER_TASK] for at in range(0, len(same), HEADS_PER_TASK)]
    return tasks


def _each(work: Callable[[_Item], _Result], items: Sequence[_Item], bar: tqdm) -> Iterator[_Result]:
    """The results of `work`, done by threads, in the order of `items`."""
    with ThreadPoolExecutor(num_threads()) as pool:
        try:
            for result in pool.map(work, items):
                bar.update()
                yield result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _some(number: int, of: int) -> str:
    return counted(of, "head") if number == of else f"{number:,} of {counted(of, 'head')}"
