"""SIGINT and SIGTERM end a job where it can be gone on with: between two batches, or at once where none is running."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked the job to end, and it did. What was complete is kept."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        """As a shell says that a process ended by this signal."""
        super().__init__(f"stopped by {self.name}; run the same command again to go on")


class Stopping:
    """Listens to the signals within its block, where that is the main thread's; a context manager."""

    def __init__(self) -> None:
        self._busy = False
        self._pending: int | None = None

    def __enter__(self) -> "Stopping":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def not_now(self) -> Iterator[None]:
        """Puts a signal off to the end of this block; a second one ends it at once.

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
        if not self._busy or self._pending is not None:
            raise Stopped(number)
        self._pending = number
        log.warning("%s: stopping after this batch; once more to stop at once", signal.Signals(number).name)
