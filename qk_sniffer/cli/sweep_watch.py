"""Shows, while a command waits for the jobs of its sweep in other processes, how far each of them has come.

The jobs write to logs of their own. What is shown comes from the status files and the progress that they write anyway.
"""

import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import sweep
from qk_sniffer.jobs.job_status import GOOD, NOT_STARTED, QUEUED, RUNNING, Status, in_brief
from qk_sniffer.jobs.status import Line, line_of_job
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.live import LiveLines
from qk_sniffer.logs import logger
from qk_sniffer.store.layout import Layout
from qk_sniffer.text import counted

log = logger(__name__)

LOOK_EVERY_S = 3.0

_OTHER_LINES = 4
"""Lines of a terminal that are left for what is logged."""


class SweepWatch:
    """Looks at the jobs in a thread of its own; a context manager around the launch and the wait.

    On a terminal, a line for each job is redrawn. Elsewhere a line is logged when the state of a job changes, and when
    a further tenth of its examples is captured.

    Args:
        planned: the jobs.
        folder: that of the sweep.
        reasons: returns the scheduler's reasons why jobs wait, by number.
    """

    def __init__(
        self,
        planned: Sequence[PlannedJob],
        folder: Path,
        reasons: Callable[[], Mapping[int, str]] = lambda: {},
    ) -> None:
        self._planned, self._folder, self._reasons = planned, folder, reasons
        self._told: dict[int, tuple[object, ...]] = {job.number: (QUEUED, 0, None) for job in planned}
        self._live = LiveLines(sys.stderr) if sys.stderr.isatty() else None
        self._open = ExitStack()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep watch", daemon=True)

    def __enter__(self) -> "SweepWatch":
        if self._live is not None:
            self._open.enter_context(self._live)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        if self._live is None:
            self.tell()
        self._open.close()

    def tell(self) -> None:
        """Shows how far the jobs have come by now."""
        with suppress(OSError, StoreError):  # a file may be removed at any time, and nobody needs these lines
            found = self._look()
            if self._live is None:
                self._log(found)
            else:
                most = max(shutil.get_terminal_size().lines - _OTHER_LINES, 2)
                self._live.show(_fitting([(line, self._text(line)) for line in found.values()], most))

    def _run(self) -> None:
        self.tell()
        while not self._ended.wait(LOOK_EVERY_S):
            self.tell()

    def _look(self) -> dict[int, Line]:
        statuses = sweep.statuses(self._folder, unreadable=lambda _: None)
        return {
            job.number: line_of_job(
                Layout(job.config.data_root),
                statuses.get(job.number) or Status.of(job.number, job.config, state=NOT_STARTED),
            )
            for job in self._planned
        }

    def _log(self, found: Mapping[int, Line]) -> None:
        for number, line in found.items():
            tenth = 10 * line.examples // line.total if line.examples is not None and line.total else None
            is_running = line.status.state == RUNNING
            news = (line.status.state, line.status.restarts, tenth if is_running else None)
            if news != self._told[number]:
                self._told[number] = news
                (log.warning if line.status.error else log.info)("%s", self._text(line))

    def _text(self, line: Line) -> str:
        status = line.status
        reason = self._reasons().get(status.number)
        state = status.outcome or status.state
        facts = [state if reason is None or state in (RUNNING, *GOOD) else f"{state}: {reason}"]
        if line.examples is not None:
            share = f" of {line.total:,} examples ({line.examples / line.total:.0%})" if line.total else " examples"
            facts.append(f"{line.examples:,}{share}")
        if line.seconds_left:
            facts.append(f"about {tqdm.format_interval(line.seconds_left)} left")
        if status.state in GOOD and line.rows is not None:
            facts.append(counted(line.rows, "row"))
        if status.state == RUNNING and line.examples is None:
            facts.append("loading")
        if status.state == RUNNING and line.total and line.examples == line.total:
            facts.append("finishing")
        error = f": {in_brief(status.error)}" if status.error else ""
        return f"{self._planned[status.number]}: {', '.join(facts)}{error}"


def _fitting(shown: Sequence[tuple[Line, str]], most: int) -> list[str]:
    """Returns at most `most` lines. Of more jobs, those that run come first, and the last line counts the others."""
    if len(shown) <= most:
        return [text for _, text in shown]
    runs_first = sorted(shown, key=lambda each: each[0].status.state != RUNNING)
    others = Counter(line.status.state for line, _ in runs_first[most - 1 :])
    counts = ", ".join(f"{number:,} {state}" for state, number in others.items())
    return [*(text for _, text in runs_first[: most - 1]), f"and {counted(others.total(), 'more job')}: {counts}"]
