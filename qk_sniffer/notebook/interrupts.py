"""Keeps Ctrl-C out of the changes of a capture: each is made whole, or the capture is refused from then on.

Python raises KeyboardInterrupt in the main thread between any two instructions. Notebooks interrupt a cell in this way,
and the user goes on with the same capture.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qk_sniffer.errors import CaptureError


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defers SIGINT to the end of this block, which must be short. A second SIGINT ends the block at once.

    Raises:
        KeyboardInterrupt: a signal came, and the handler of the program raises it.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(came) == 1:
            signal.raise_signal(signal.SIGINT)


class Changes:
    """The changes of what a capture holds. Other threads may read it between them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_torn = False
        self._cause: BaseException | None = None

    def check(self) -> None:
        """Checks that all changes were made whole.

        Raises:
            CaptureError: one was not.
        """
        if self._is_torn:
            raise CaptureError(
                "this capture was interrupted twice while it took the rows of a forward pass, or failed there: which "
                "of its rows belong together is not known. Capture again"
            ) from self._cause

    @contextmanager
    def between(self) -> Iterator[None]:
        """Reads what the capture holds, between two changes. This block must be short: a change waits for its end.

        Raises:
            CaptureError: a change was not made whole.
        """
        with self._lock:
            self.check()
            yield

    @contextmanager
    def change(self, *regular: type[Exception]) -> Iterator[None]:
        """Makes the change of this block, whole. SIGINT is deferred to its end.

        `regular` are the errors after which nothing has changed.

        Raises:
            CaptureError: an earlier change was not made whole.
        """
        self.check()
        with deferred_interrupts(), self._lock:
            self._is_torn = True
            try:
                yield
            except BaseException as error:
                self._is_torn = not isinstance(error, regular)
                self._cause = error if self._is_torn else None
                raise
            self._is_torn = False
