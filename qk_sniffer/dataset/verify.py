"""Compares a dataset with its manifest: every file, head and row, the examples, the statistics and the proof."""

import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import TypeVar

from tqdm import tqdm

from qk_sniffer.dataset.verify_attention import check_attention
from qk_sniffer.dataset.verify_buckets import bucket_table
from qk_sniffer.dataset.verify_examples import check_examples
from qk_sniffer.dataset.verify_manifest import ManifestFacts, ProblemError
from qk_sniffer.dataset.verify_report import Problem, Report, named
from qk_sniffer.dataset.verify_rows import Examples, HeadCheck, check_file, check_rows
from qk_sniffer.dataset.verify_statistics import check_statistics
from qk_sniffer.errors import StoreError
from qk_sniffer.machine import num_threads, workers
from qk_sniffer.store.disk import sha256_of
from qk_sniffer.store.files import inside
from qk_sniffer.store.layout import (
    EXAMPLES,
    STATISTICS,
    Head,
    Layout,
    is_statistics_file,
    parse_head_name,
)
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.text import counted, in_mb

HEADS_PER_TASK = 16
"""The number of heads whose rows a thread checks side by side, with one run of the sampler."""

_ROW_CHECKS = {
    "order": "rows are sorted by example and position",
    "unique": "no head has an example and position twice",
    "example_id": "every row belongs to an example in examples/data.parquet",
    "position": "every position is inside of its example",
    "bucket": "buckets match the positions",
    "sliding_window": "windows match the layers",
    "segment": "segments are those of the examples' tokens",
    "offsets": "char_start and char_end are ranges of characters",
    "alike": "the heads of a layer and kind have the same rows",
}

_Step = Callable[[], object]
"""Is called after each step of the work."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def verify(root: Path) -> Report:
    """Verifies the dataset at `root`; returns the passed checks and the problems."""
    report, facts = _opened(root)
    if facts is None:
        return report
    report.rows = facts.counts["rows"]
    report.size = sum(entry.size for entry in facts.files.values())
    num_steps = len(facts.files) + len(_tasks(list(facts.heads.values())))
    num_steps += sum(map(is_statistics_file, facts.files)) + len(facts.attention)
    # disable=None hides the bar if stderr is not a terminal.
    with tqdm(total=num_steps, unit="step", desc="verify", disable=None, dynamic_ncols=True, leave=False) as bar:
        intact, checks = _check_files(facts, report, bar.update)
        _report_files(facts, report)
        examples = _check_data(facts, intact, checks, report, bar.update)
    _check_manifest(facts, examples, report)
    _report_proof(facts, report)
    return report


def verify_data(root: Path, stop: Event) -> Report:
    """Verifies the heads, rows, examples, summaries and statistics of the dataset at `root`.

    Its files are those that the manifest lists: no checksum is compared. Ends early when `stop` is set.

    Raises:
        StoreError: `stop` was set.
    """

    def step() -> None:
        if stop.is_set():
            raise StoreError(f"the check of {root} was stopped")

    report, facts = _opened(root)
    if facts is None:
        return report
    intact, checks = _check_files(facts, report, step, compared=False)
    _check_data(facts, intact, checks, report, step)
    return report


def _opened(root: Path) -> tuple[Report, ManifestFacts | None]:
    """Returns a report, and the facts in the manifest; None and the problem in the report if it cannot be read."""
    report = Report(root)
    try:
        facts = ManifestFacts.read(root)
    except ProblemError as error:
        report.add([error.problem])
        return report, None
    report.heads = [head.key for head in facts.heads.values()]
    return report, facts


def _check_data(
    facts: ManifestFacts,
    intact: Collection[str],
    checks: Mapping[str, HeadCheck],
    report: Report,
    step: _Step,
) -> Examples | None:
    """Reports on what is in the `intact` files. Returns the examples, or None if they are damaged.

    `checks` are those of the heads' files by name.
    """
    _check_heads(facts, report)
    _report_heads(facts, checks, report)
    examples = check_examples(facts, report) if EXAMPLES in intact else None
    whole = _check_rows(facts, checks, examples, report, step)
    check_attention(facts, intact, whole, report, lambda work, heads: _each(work, heads, step))
    check_statistics(facts, intact, whole, examples, report, lambda work, layers: _each(work, layers, step))
    return examples


def _check_heads(facts: ManifestFacts, report: Report) -> None:
    """Compares the heads in the list of files with the captured heads of the layers."""
    listed = {name for name in facts.files if parse_head_name(name.removesuffix("/data.parquet"))}
    of_heads = facts.heads | facts.attention
    if missing := [head.key for name, head in of_heads.items() if name not in listed]:
        report.add(
            Problem("heads", "manifest.json does not list the file of a captured head", head=key) for key in missing
        )
    for name in sorted(listed - of_heads.keys()):
        report.add([Problem("heads", "manifest.json lists heads that no layer captures", name)])
    report.passed("heads", f"{len(report.heads):,}: {named(report.heads, ())}")


def _check_files(
    facts: ManifestFacts, report: Report, step: _Step, *, compared: bool = True
) -> tuple[set[str], dict[str, HeadCheck]]:
    """Returns the names of the intact files, and the checks of the heads' files by name.

    Without `compared`, every file is taken for intact, and the heads' files alone are read.
    """

    def check(name: str) -> tuple[list[Problem], HeadCheck | None]:
        problems = list(_file_problems(facts.root, name, facts.files[name])) if compared else []
        head = facts.heads.get(name)
        if problems or head is None:
            return problems, None
        return problems, check_file(facts.root / name, head, facts.schema(head), facts.files[name].rows or 0)

    intact, checks = set(), {}
    for name, (problems, result) in zip(facts.files, _each(check, list(facts.files), step), strict=True):
        report.add(problems)
        if not problems:
            intact.add(name)
        if result is not None:
            report.add(result.problems)
            checks[name] = result
    return intact, checks


def _report_files(facts: ManifestFacts, report: Report) -> None:
    """Reports on the list of files."""
    report.add(_unlisted(facts))
    for name in (EXAMPLES, Layout(facts.root).card.name):
        if name not in facts.files:
            report.add([Problem("files", "part of every dataset, but manifest.json does not list it", name)])
    size, count = in_mb(report.size), counted(len(facts.files), "file")
    report.passed("files", f"{count}, {size}: size and sha256 match manifest.json")


def _report_heads(facts: ManifestFacts, checks: Mapping[str, HeadCheck], report: Report) -> None:
    """Reports on the heads' files by their checks."""
    some = _some(len(checks), len(facts.heads))
    columns = facts.schema(next(iter(facts.heads.values()))).names
    report.passed("parquet", f"{some} can be read and have the rows that manifest.json lists")
    report.passed("schema", f"{some}: {', '.join(columns)}")
    report.passed("metadata", f"{some}: the metadata of the files matches manifest.json")
    if facts.nonfinite_rows is not None:
        report.add(_nonfinite_problems(facts, checks))
    nonfinite = {name: result.nonfinite for name, result in checks.items() if result.nonfinite}
    if nonfinite:
        where = named([facts.heads[name].key for name in nonfinite], report.heads)
        report.note("vector", f"{counted(sum(nonfinite.values()), 'vector')} with NaN or Inf in {where}")
    else:
        report.passed("vector", f"{some}: no NaN, no Inf")


def _file_problems(root: Path, name: str, entry: FileEntry) -> Iterator[Problem]:
    try:
        path = inside(root, name)
    except StoreError:
        yield Problem("files", "a link leads out of the dataset", name, "replace it by a copy of the file")
        return
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(found.st_mode) else "Not a regular file"
            yield Problem("files", f"cannot be read: {kind}", name, "replace it by a copy of the file")
        elif found.st_size != entry.size:
            sizes = f"{name}: {found.st_size:,} bytes instead of {entry.size:,}"
            yield Problem("files", "the size differs from manifest.json", sizes)
        elif sha256_of(path) != entry.sha256:
            yield Problem("files", "the sha256 differs from manifest.json: the file has changed", name)
    except FileNotFoundError:
        yield Problem("files", "listed in manifest.json, but missing", name)
    except OSError as error:
        way_out = "repair the disk, or the permissions of the file"
        yield Problem("files", f"cannot be read: {error.strerror}", name, way_out)


def _nonfinite_problems(facts: ManifestFacts, checks: Mapping[str, HeadCheck]) -> Iterator[Problem]:
    assert facts.nonfinite_rows is not None
    for name, result in checks.items():
        listed = facts.nonfinite_rows.get(name, 0)
        if result.readable and result.nonfinite != listed:
            what = "the number of vectors with NaN or Inf differs from manifest.json"
            yield Problem.of(facts.heads[name], "vector", what, f"{result.nonfinite:,} instead of {listed:,}")


def _unlisted(facts: ManifestFacts) -> Iterator[Problem]:
    """Yields files in the folders of heads, examples and statistics that readers may take for part of the dataset."""
    known = {*facts.files, *facts.heads, EXAMPLES}
    for folder in sorted(facts.root.iterdir()):
        is_ours = folder.name in ("examples", STATISTICS) or parse_head_name(folder.name) is not None
        if not is_ours or not folder.is_dir():
            continue
        # The names in a linked folder are those of files elsewhere.
        for path in [folder] if folder.is_symlink() else sorted(folder.iterdir()):
            name = path.relative_to(facts.root).as_posix()
            if name not in known and not path.name.startswith("."):
                yield Problem("files", "not part of the dataset: manifest.json does not list it", name, "remove it")


def _check_rows(
    facts: ManifestFacts, file_checks: Mapping[str, HeadCheck], examples: Examples | None, report: Report, step: _Step
) -> set[str]:
    """Returns the names of the heads' files that have exactly the rows that the sampler chooses."""
    heads = [facts.heads[name] for name, result in file_checks.items() if result.readable]
    if examples is None or not heads:
        reason = "examples/data.parquet is damaged" if examples is None else "no head's file can be read"
        report.skipped("sampler", f"the rows were not checked: {reason}")
        return set()
    tasks = _tasks(heads)

    def check(task: list[Head]) -> list[HeadCheck]:
        return check_rows(facts.root, task, facts.sampler, examples)

    checks: list[tuple[Head, HeadCheck]] = []
    for task, results in zip(tasks, _each(check, tasks, step), strict=True):
        checks += zip(task, results, strict=True)
    rows_by_bucket: dict[str, Counter[int]] = {head.kind: Counter() for head in heads}
    for head, result in checks:
        report.add(result.problems)
        rows_by_bucket[head.kind].update(result.rows_by_bucket)
    report.add(_unlike(checks))
    if len(heads) == len(facts.heads) and rows_by_bucket != facts.rows_by_bucket:
        report.add([Problem("manifest", "rows_by_bucket in manifest.json differs from the files")])
    some = _some(len(heads), len(facts.heads))
    has = {"segment": facts.config.capture.capture_segments, "offsets": facts.config.capture.capture_offsets}
    for name, what in _ROW_CHECKS.items():
        if has.get(name, True):
            report.passed(name, f"{some}: {what}")
    rows = counted(sum(counter.total() for counter in rows_by_bucket.values()), "row")
    report.passed("sampler", f"{some}: {rows}, exactly those that the sampler chooses")
    report.table = bucket_table(facts, heads, examples, rows_by_bucket)
    return {head.file for head, result in checks if not (result.problems or file_checks[head.file].problems)}


def _unlike(checks: Sequence[tuple[Head, HeadCheck]]) -> Iterator[Problem]:
    """Yields the heads with other rows than most heads of their layer and kind."""
    keys: dict[tuple[int, str], Counter[int]] = {}
    for head, result in checks:
        keys.setdefault((head.layer, head.kind), Counter())[result.keys_crc] += 1
    for head, result in checks:
        if result.keys_crc != keys[head.layer, head.kind].most_common(1)[0][0]:
            yield Problem.of(head, "alike", "heads have other rows than most of their layer and kind")


def _check_manifest(facts: ManifestFacts, examples: Examples | None, report: Report) -> None:
    report.add(facts.contradictions())
    if examples is not None:
        longest = int(examples.num_tokens.max())
        for kind in sorted({head.kind for head in facts.heads.values()}):
            if facts.inclusion.get(kind) != facts.sampler.inclusion(kind, longest):
                what = "inclusion in manifest.json differs from the sampler's settings"
                report.add([Problem("manifest", what, f"kind {kind}")])
    report.passed("manifest", facts.title)
    if Layout(facts.root).work.is_dir():
        what = "the folder .qk_sniffer exists: a job is making another version of this dataset, or was interrupted"
        report.note("manifest", what)


def _report_proof(facts: ManifestFacts, report: Report) -> None:
    """Reports the job's own proof, which is not repeated here."""
    if facts.proven is None:
        report.note("proof", facts.proof)
    elif facts.proven:
        report.passed("proof", facts.proof)
    else:
        what = "the job's proof of the vectors failed"
        report.add([Problem("proof", what, facts.proof, "do not use them; report this with the model's name")])


def _tasks(heads: Sequence[Head]) -> list[list[Head]]:
    """Splits `heads`, in any order, into parts of one (layer, kind)."""

    def of(head: Head) -> tuple[int, str]:
        return head.layer, head.kind

    tasks = []
    for _, group in groupby(sorted(heads, key=of), key=of):
        same = list(group)
        tasks += [same[at : at + HEADS_PER_TASK] for at in range(0, len(same), HEADS_PER_TASK)]
    return tasks


def _each(work: Callable[[_Item], _Result], items: Sequence[_Item], step: _Step) -> Iterator[_Result]:
    """Yields the results of `work`, which runs in threads, in the order of `items`."""
    with workers(num_threads()) as pool:
        try:
            for result in pool.map(work, items):
                step()
                yield result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _some(number: int, of: int) -> str:
    return counted(of, "head") if number == of else f"{number:,} of {counted(of, 'head')}"
