"""Formats the result of a verification: one line for each check; each problem with its heads and its way out."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.store.layout import FILE_NAMES, Head, HeadKey
from qk_sniffer.text import compact_ranges, counted, in_mb, printable

RECREATE = "fetch the dataset again, or recreate it: run its command with output.overwrite=true"

CHECKS = (
    "manifest",
    "files",
    "examples",
    "heads",
    "parquet",
    "schema",
    "metadata",
    "order",
    "unique",
    "example_id",
    "position",
    "bucket",
    "sliding_window",
    "segment",
    "offsets",
    "sampler",
    "alike",
    "vector",
    "attention",
    "statistics",
    "proof",
)
"""The checks in the order of the report."""

_MAX_INSTANCES = 3
_OK = "ok"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong. The report joins problems with the same `check`, `what` and `way_out`.

    `instance` is the first place where it shows, `rows` the number of rows of the head that have it.
    """

    check: str
    what: str
    instance: str = ""
    way_out: str = RECREATE
    head: HeadKey | None = None
    rows: int = 0

    def __post_init__(self) -> None:
        assert self.check in CHECKS, "a check that the report does not have"

    @classmethod
    def of(cls, head: Head, check: str, what: str, instance: str = "", rows: int = 0) -> "Problem":
        """Returns a problem of a head, whose name comes before the instance."""
        return cls(check, what, f"{head.name}: {instance}" if instance else "", head=head.key, rows=rows)


@dataclass
class Report:
    """The report, which grows while a dataset is verified. `heads`: all of the dataset; `size` in bytes."""

    root: Path
    heads: Collection[HeadKey] = ()
    rows: int = 0
    size: int = 0
    table: list[str] = field(default_factory=list)
    """Lines with the rows by bucket."""
    _problems: list[Problem] = field(default_factory=list)
    _lines: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def passed(self, check: str, what: str) -> None:
        """Adds a line for a passed check. It is left out if the check has problems after all."""
        self._lines.setdefault(check, []).append((_OK, what))

    def skipped(self, check: str, why: str) -> None:
        """Adds a line for a check that could not run."""
        self._lines.setdefault(check, []).append(("--", why))

    def note(self, check: str, what: str) -> None:
        """Adds a line about something that is worth knowing but not wrong."""
        self._lines.setdefault(check, []).append(("note", what))

    def add(self, problems: Iterable[Problem]) -> None:
        """Adds problems."""
        self._problems += problems

    @property
    def problems(self) -> int:
        """The number of joined problems; 0 for a whole dataset."""
        return len(self._grouped())

    @property
    def wrong(self) -> list[str]:
        """The lines about the problems, in the order of the checks."""
        groups = sorted(self._grouped(), key=lambda group: CHECKS.index(group[0].check))
        return [line for group in groups for line in self._joined(group)]

    def __str__(self) -> str:
        lines = [f"Dataset: {self.root}"]
        for check in CHECKS:
            groups = [group for group in self._grouped() if group[0].check == check]
            for status, what in self._lines.get(check, ()):
                if not (groups and status == _OK):
                    lines.append(f"  {check:<14}  {status:<5}  {what}")
            for group in groups:
                lines += self._joined(group)
        if self.table:
            lines += ["", *self.table, ""]
        if self.problems:
            lines.append(f"NOT WHOLE: {counted(self.problems, 'problem')}")
        else:
            lines.append(f"whole: {counted(len(self.heads), 'head')}, {counted(self.rows, 'row')}, {in_mb(self.size)}")
        return "\n".join(map(printable, lines))

    def _grouped(self) -> list[list[Problem]]:
        groups: dict[tuple[str, str, str], list[Problem]] = {}
        for problem in self._problems:
            groups.setdefault((problem.check, problem.what, problem.way_out), []).append(problem)
        return list(groups.values())

    def _joined(self, group: list[Problem]) -> list[str]:
        first = group[0]
        heads = {problem.head for problem in group if problem.head is not None}
        rows = sum(problem.rows for problem in group)
        where = [counted(rows, "row")] if rows else []
        where += [named(heads, self.heads)] if heads else []
        text = f"  {first.check:<14}  WRONG  {first.what}"
        instances = [problem.instance for problem in group if problem.instance]
        shown = instances[:_MAX_INSTANCES]
        if len(instances) > len(shown):
            shown[-1] += f" (and {len(instances) - len(shown):,} more)"
        lines = [f"{text} ({' in '.join(where)})" if where else text]
        return lines + [" " * 25 + line for line in [*shown, f"way out: {first.way_out}"]]


def named(heads: Collection[HeadKey], whole: Collection[HeadKey]) -> str:
    """Returns the names of `heads`, which are some of `whole`: `query heads 0-7 of layers 0-5; all 12 key heads`."""
    parts = []
    for kind, name in FILE_NAMES.items():
        mine, every = ({key for key in keys if key.kind == kind} for keys in (heads, whole))
        if mine == every and len(mine) > 1:
            parts.append(f"all {len(mine):,} {name} heads")
            continue
        by_layer: dict[int, list[int]] = {}
        for key in sorted(mine):
            by_layer.setdefault(key.layer, []).append(key.head)
        alike: dict[tuple[int, ...], list[int]] = {}
        for layer, numbers in by_layer.items():
            alike.setdefault(tuple(numbers), []).append(layer)
        for same, layers in alike.items():
            parts.append(f"{name} {_plural('head', same)} of {_plural('layer', layers)}")
    return "; ".join(parts)


def _plural(noun: str, numbers: Collection[int]) -> str:
    return f"{noun if len(numbers) == 1 else noun + 's'} {compact_ranges(numbers)}"
