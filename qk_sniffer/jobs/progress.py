"""Reports the progress of a job: a bar on a terminal, log lines elsewhere, and a file for other processes."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import psutil
from msgspec import Meta
from tqdm import tqdm

from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.store import stored
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.stored import Count, encode

log = logger(__name__)

LINE_EVERY_S = 10.0


_BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}, {remaining} left"
_STREAM = "{n_fmt} {unit}s{postfix}"
"""The forms of the bar. Its numbers fit 80 columns, and the bar itself takes what is left."""


class Progress:
    """Reports examples done, tokens/s, ETA, rows and memory on stderr, and in `file` for `read_progress`.

    `unit` names what is counted: examples, or texts where a text has several. `total` is None if their number is not
    known, as in a stream. `access` is the way to the file: the claim
    of the job. The file is not written when its check fails.
    """

    def __init__(
        self, total: int | None, done: int = 0, unit: str = "example", *, file: Path, access: Access = PLAIN
    ) -> None:
        # disable=None: no bar unless stderr is a terminal; log lines replace it.
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            disable=None,
            dynamic_ncols=True,
            bar_format=_STREAM if total is None else _BAR,
        )
        self._total, self._done, self._unit, self._file, self._access = total, done, unit, file, access
        self._resumed = done > 0
        self._tokens = self._rows = self._new = 0
        self._start = self._last_line = time.monotonic()
        self._process = psutil.Process()
        self._write(self._start)

    def add(self, examples: int, tokens: int, rows: int) -> None:
        """Counts a finished batch: its examples or texts, valid tokens and rows over all heads."""
        self._done += examples
        self._new += examples
        self._tokens += tokens
        self._rows += rows
        now = time.monotonic()
        memory_mb = self._process.memory_info().rss / 2**20
        facts = f"{self._speed(now):,.0f} tokens/s, {self._rows:,} rows, {memory_mb:,.0f} MB memory"
        if not self._bar.disable:
            numbers = map(_short, (self._speed(now), self._rows, memory_mb * 2**20))
            self._bar.set_postfix_str("{} tok/s, {} rows, {}B".format(*numbers), refresh=False)
            self._bar.update(examples)
        if now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._write(now)
            if self._bar.disable:
                log.info("%s, %s", self._where(now), facts)

    def close(self) -> None:
        """Closes the bar, and writes the file for the last time."""
        self._bar.close()
        self._write(time.monotonic())

    def _speed(self, now: float) -> float:
        return self._tokens / max(now - self._start, 1e-9)

    def _where(self, now: float) -> str:
        left_s = self._seconds_left(now)
        if left_s is None:
            return f"{self._done:,} {self._unit}s"
        return f"{self._done:,} of {self._total:,} {self._unit}s, about {tqdm.format_interval(left_s)} left"

    def _seconds_left(self, now: float) -> float | None:
        if self._total is None or not self._new:
            return None
        return (self._total - self._done) * (now - self._start) / self._new

    def _write(self, now: float) -> None:
        facts = {
            "examples": self._done,
            "total": self._total,
            "rows": None if self._resumed else self._rows,  # the rows of earlier starts are not known
            "tokens_per_s": round(self._speed(now), 1),
            "seconds_left": self._seconds_left(now),
            "at": time.time(),
        }
        name = self._file.name
        # The journal reports a full disk and a lost data root.
        with suppress(OSError, StoreError), self._access.open(self._file.parent) as folder:
            self._access.check()
            with folder.create(f"{name}.tmp") as file:
                file.write(encode(facts))
            self._access.check()
            folder.rename(f"{name}.tmp", folder, name)


def _short(number: float) -> str:
    """Returns a number in at most five characters: `87`, `1.2k`, `345k`, `6.7M`."""
    return str(tqdm.format_sizeof(number)) if number >= 1000 else f"{number:.0f}"


def read_progress(file: Path) -> dict[str, Any]:
    """Reads the last report of a job; empty if there is none.

    Keys: `examples` done of `total`, `rows` (None after a resume), `tokens_per_s`, `seconds_left`, and `at`, the time
    of the report in seconds since 1970.
    """
    try:
        facts: Any = stored.read(file, _Facts, way_out="rerun the job")
    except (OSError, StoreError):
        return {}
    return dict(facts)


_Number = Annotated[float, Meta(ge=-1e12, le=1e12)]


class _Facts(TypedDict):
    examples: Count
    total: Count | None
    rows: Count | None
    tokens_per_s: _Number
    seconds_left: _Number | None
    at: _Number
