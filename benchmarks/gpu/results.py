"""Keeps the results of a run and its budget. Every row is printed and stored when it is known."""

import json
import time
from pathlib import Path
from typing import Any

Cell = str | float | int | None
Row = dict[str, Cell]


class LeftOutError(Exception):
    """A row is not measured; the text gives the reason."""


class Budget:
    """The time and the bytes that the rest of a run may take."""

    def __init__(self, *, minutes: float, nbytes: int) -> None:
        self._until = time.monotonic() + 60 * minutes
        self.bytes_left = nbytes

    @property
    def seconds_left(self) -> float:
        return self._until - time.monotonic()

    def deadline(self, seconds: float) -> float:
        """Returns the end of a measurement that may take so many seconds, on the clock of `time.monotonic`."""
        return min(self._until, time.monotonic() + seconds)

    def need_time(self) -> None:
        """Looks at the clock.

        Raises:
            LeftOutError: no time is left.
        """
        if self.seconds_left < 0:
            raise LeftOutError("no time is left")

    def take_bytes(self, nbytes: int) -> None:
        """Takes bytes that a measurement is about to write.

        Raises:
            LeftOutError: fewer are left.
        """
        if nbytes > self.bytes_left:
            raise LeftOutError(f"it writes {nbytes / 1e9:.1f} GB, and {self.bytes_left / 1e9:.1f} GB are left")
        self.bytes_left -= nbytes


class Results:
    """The tables of a run, in `folder` as gpu.json and, to read, as gpu.md."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._folder = folder
        self._facts = facts
        self._tables: dict[str, list[Row]] = {}
        self._left_out: list[str] = []
        self.failures: list[str] = []
        """What is wrong. A run with one of them fails."""
        folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def add(self, table: str, row: Row) -> None:
        """Adds a row. The rows of a table have the same columns."""
        rows = self._tables.setdefault(table, [])
        if not rows:
            print("\n" + "\n".join(_head(table, row)), flush=True)
        rows.append(row)
        print(_line(row.values()), flush=True)
        self._save()

    def leave_out(self, what: str, why: str) -> None:
        self._note(self._left_out, f"left out: {what}: {why}")

    def fail(self, what: str) -> None:
        self._note(self.failures, f"WRONG: {what}")

    def _note(self, notes: list[str], text: str) -> None:
        notes.append(text)
        print(text, flush=True)
        self._save()

    def _save(self) -> None:
        found = self._facts | {"tables": self._tables, "left_out": self._left_out, "failures": self.failures}
        (self._folder / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (self._folder / "gpu.md").write_text(self._page(), encoding="utf-8")

    def _page(self) -> str:
        lines = ["# Capture on a GPU", "", *(f"- {name}: {_listed(value)}" for name, value in self._facts.items())]
        for table, rows in self._tables.items():
            lines += ["", *_head(table, rows[0]), *(_line(row.values()) for row in rows)]
        lines += [""] * bool(self.failures or self._left_out)
        return "\n".join([*lines, *(f"- {note}" for note in [*self.failures, *self._left_out])]) + "\n"


def _head(table: str, row: Row) -> list[str]:
    return [f"## {table}", "", _line(row), _line(["---"] * len(row))]


def _line(cells: Any) -> str:
    return f"| {' | '.join(map(_words, cells))} |"


def _listed(value: Any) -> str:
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)


def _words(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}" if abs(cell) < 1 else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)
