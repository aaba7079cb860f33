"""Tells, while a command waits for its jobs on SLURM, why the scheduler does not start them."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import slurm
from qk_sniffer.jobs.sweep import PlannedJob, describe
from qk_sniffer.logs import logger
from qk_sniffer.text import compact_ranges

log = logger(__name__)

FIND_EVERY_S = 5.0
FIRST_S = 10.0
"""Time that the scheduler has for its first decision, before the first question about its reasons."""


class QueueWatch:
    """Asks for the reasons in a thread of its own; a context manager around the launch and the wait.

    `submitted` returns the ids of the jobs that are submitted so far, in the order of the jobs. `record` stores these
    ids for other processes; None where nobody reads them.
    """

    def __init__(
        self,
        planned: Sequence[PlannedJob],
        submitted: Callable[[], Sequence[str]],
        record: Callable[[Sequence[str]], None] | None,
    ) -> None:
        self._planned, self._submitted, self._record = planned, submitted, record
        self._ids: Sequence[str] = ()
        self._told: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        """The scheduler's last answer: why jobs wait, by number."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="queue watch", daemon=True)

    def __enter__(self) -> "QueueWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self.find()

    def find(self) -> None:
        """Looks for jobs that have been submitted, and records their ids."""
        with suppress(OSError, StoreError):  # neither a lost network nor a full disk ends the wait
            found = self._submitted()
            if len(found) > len(self._ids):
                self._ids = found
                if self._record is not None:
                    self._record(found)

    def tell(self) -> None:
        """Logs the reasons that are new since the last call, one line for all jobs with the same reason."""
        reasons = slurm.waiting(self._ids)
        if reasons is None:
            return
        found = {number: reasons[job_id] for number, job_id in enumerate(self._ids) if job_id in reasons}
        self.reasons = found
        self._told = {number: kind for number, kind in self._told.items() if number in found}
        news: dict[str, list[int]] = {}
        for number, reason in found.items():
            if reason != slurm.UNDECIDED and _kind(reason) != self._told.get(number):
                news.setdefault(reason, []).append(number)
                self._told[number] = _kind(reason)
        for reason, numbers in news.items():
            meaning = slurm.advice(reason)
            if meaning is None:
                log.info("SLURM has not started %s: %s", self._named(numbers), reason)
            else:
                log.warning("SLURM does not start %s: %s: %s", self._named(numbers), reason, meaning)

    def _run(self) -> None:
        due: float | None = None
        while not self._ended.wait(FIND_EVERY_S):
            self.find()
            if self._ids and due is None:
                due = time.monotonic() + FIRST_S - FIND_EVERY_S
            elif due is not None and time.monotonic() >= due:
                self.tell()
                due = time.monotonic() + slurm.ASK_EVERY_S

    def _named(self, numbers: Sequence[int]) -> str:
        ids = [self._ids[number] for number in numbers]
        on_slurm = ids[0] if len(ids) == 1 else ", ".join(dict.fromkeys(each.partition("_")[0] for each in ids))
        if len(numbers) > 1:
            return f"jobs {compact_ranges(numbers)} (SLURM {on_slurm})"
        (number,) = numbers
        arguments = self._planned[number].arguments if number < len(self._planned) else ()
        return f"{describe(number, arguments)} (SLURM {on_slurm})"


def _kind(reason: str) -> str:
    """The reason; one and the same word for the ordinary ones, which change often and mean the same."""
    return "ordinary" if slurm.is_ordinary(reason) else reason
