"""What a verification found, and how it is told: a line a check, each problem with its heads and the way out."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.store.layout import KINDS, HeadKey
from qk_sniffer.text import compact_ranges, counted, in_mb

ANEW = "fetch the dataset again, or make it anew: its command with output.overwrite=true"

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
    "sampler",
    "alike",
    "vector",
    "proof",
)
"""In the order in which they are told."""

KIND_NAMES = {"q": "query", "k": "key"}

_MAX_INSTANCES = 3
_OK = "ok"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong; faults with the same `check`, `what` and `way_out` are one problem.

    `instance` is where it shows first, `rows` in how many rows of the head.
    """

    check: str
    what: str
    instance: str = ""
    way_out: str = ANEW
    head: HeadKey | None = None
    rows: int = 0


@dataclass
class Report:
    """Grows while a dataset is verified. `heads`: all that the dataset has; `size` in bytes."""

    root: Path
    heads: Collection[HeadKey] = ()
    rows: int = 0
    size: int = 0
    table: list[str] = field(default_factory=list)
    """Lines for a person that judge nothing: the rows by bucket."""
    _faults: list[Problem] = field(default_factory=list)
    _lines: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def passed(self, check: str, what: str) -> None:
        """Says what was found right. It is not told if the check turns out to have faults."""
        self._lines.setdefault(check, []).append((_OK, what))

    def skipped(self, check: str, why: str) -> None:
        """Says that a check could not be made."""
        self._lines.setdefault(check, []).append(("--", why))

    def note(self, check: str, what: str) -> None:
        """Says what is worth knowing and not wrong."""
        self._lines.setdefault(check, []).append(("note", what))

    def add(self, faults: Iterable[Problem]) -> None:
        """Takes up what is wrong."""
        self._faults += faults

    @property
    def problems(self) -> int:
        """How many there are; 0 for a dataset that is whole."""
        return len(self._grouped())

    def __str__(self) -> str:
        lines = [f"Dataset: {self.root}"]
        for check in CHECKS:
            problems = [faults for faults in self._grouped() if faults[0].check == check]
            for status, what in self._lines.get(check, ()):
                if not (problems and status == _OK):
                    lines.append(f"  {check:<14}  {status:<5}  {what}")
            for faults in problems:
                lines += self._problem(faults)
        if self.table:
            lines += ["", *self.table, ""]
        if self.problems:
            lines.append(f"NOT WHOLE: {counted(self.problems, 'problem')}")
        else:
            lines.append(f"whole: {counted(len(self.heads), 'head')}, {counted(self.rows, 'row')}, {in_mb(self.size)}")
        return "\n".join(lines)

    def _grouped(self) -> list[list[Problem]]:
        groups: dict[tuple[str, str, str], list[Problem]] = {}
        for fault in self._faults:
            groups.setdefault((fault.check, fault.what, fault.way_out), []).append(fault)
        return list(groups.values())

    def _problem(self, faults: list[Problem]) -> list[str]:
        first = faults[0]
        heads = {fault.head for fault in faults if fault.head is not None}
        rows = sum(fault.rows for fault in faults)
        where = [counted(rows, "row")] if rows else []
        where += [named(heads, self.heads)] if heads else []
        text = f"  {first.check:<14}  WRONG  {first.what}"
        instances = [fault.instance for fault in faults if fault.instance]
        shown = instances[:_MAX_INSTANCES]
        if len(instances) > len(shown):
            shown[-1] += f" (and {len(instances) - len(shown):,} more)"
        lines = [f"{text} ({' in '.join(where)})" if where else text]
        return lines + [" " * 25 + line for line in [*shown, f"way out: {first.way_out}"]]


def named(heads: Collection[HeadKey], whole: Collection[HeadKey]) -> str:
    """`heads`, some of `whole`, in few words: `query heads 0-7 of layers 0-5; all 12 key heads`."""
    parts = []
    for kind in KINDS:
        mine, every = ({key for key in keys if key.kind == kind} for keys in (heads, whole))
        name = KIND_NAMES[kind]
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
