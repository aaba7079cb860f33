"""Stops a job on a signal where it can be resumed: between two batches, or at once if no batch is running.

SIGINT and SIGTERM end the job. SIGUSR2 is a scheduler's warning that the job's time is up. It counts only if someone
else has a handler for it, as submitit does in its jobs; that handler queues the job again.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qk_sniffer.logs import logger

log = logger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)

WARNING = signal.SIGUSR2

PATIENCE_S = 20.0
"""How long a batch may continue when no person asked for the stop. By default, SLURM kills 30 s after its SIGTERM, and
the journal needs some of these seconds to write its buffer."""


_UNLOCKED = "release unlocked lock"
"""The error of `threading.Condition.wait` when a signal ends it in the moment in which it begins."""


class Stopped(KeyboardInterrupt):
    """A signal ended the job. Complete batches are kept."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        """The exit code that a shell reports for a process that this signal ended."""
        super().__init__(f"stopped by {self.name}; rerun the same command to resume")


class Stopping:
    """Handles the signals within its block, in the main thread; a context manager."""

    def __init__(self) -> None:
        self._busy = False
        self._pending: int | None = None
        self._alarm: threading.Timer | None = None
        self._time_is_up = False

    def __enter__(self) -> "Stopping":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = SIGNALS + ((WARNING,) if callable(signal.getsignal(WARNING)) else ())
            self._before = {number: signal.signal(number, self._heard) for number in numbers}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, RuntimeError) and str(error) == _UNLOCKED and (stopped := _stop_before(error)) is not None:
            raise stopped

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers a signal to the end of this block, for at most `PATIENCE_S`. A second SIGINT ends the block at once.

        Raises:
            Stopped: a signal came.
        """
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._pending is not None:
            raise Stopped(self._pending)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if self._pending is not None and not self._time_is_up and number != signal.SIGINT:
            return  # schedulers send several signals: the journal must not be disturbed while it writes its buffer
        if self._busy and self._pending is None:
            self._pending = number
            self._wait_for_batch(number)
            return
        self._time_is_up = False
        self._pending = self._pending or number
        raise Stopped(self._pending)

    def _wait_for_batch(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            log.warning("%s: stopping after this batch; repeat it to stop at once", name)
            return
        log.warning("%s: stopping after this batch, or in %.0f s", name, PATIENCE_S)
        main = threading.main_thread().ident
        assert main is not None

        def stop() -> None:
            if self._busy:
                self._time_is_up = True
                signal.pthread_kill(main, number)  # the main thread may be waiting in a system call

        self._alarm = threading.Timer(PATIENCE_S, stop)
        self._alarm.daemon = True
        self._alarm.start()


def _stop_before(error: BaseException) -> Stopped | None:
    """Returns the `Stopped` in whose handling an error was raised; None if there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, Stopped):
        found = found.__context__
    return found
