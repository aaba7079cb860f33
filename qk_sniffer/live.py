"""Redraws lines at the end of a terminal. What is logged in the meantime goes above them."""

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from qk_sniffer.text import one_line, say

_lock = threading.RLock()
_shown: list["LiveLines"] = []


class LiveLines:
    """Lines that newer ones replace; a context manager, whose end removes them. `stream` is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: Sequence[str] = ()

    def __enter__(self) -> "LiveLines":
        with _lock:
            _shown.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        with _lock:
            self.show(())
            _shown.remove(self)

    def show(self, lines: Sequence[str]) -> None:
        """Replaces the lines. Each is cut to the width of the terminal: one that wraps could not be replaced."""
        with _lock:
            self.erase()
            self._lines = lines
            self.draw()

    def erase(self) -> None:
        """Removes the lines from the terminal; `draw` shows them again."""
        if self._lines:
            self._stream.write(f"\r\x1b[{len(self._lines)}A\x1b[J")

    def draw(self) -> None:
        """Shows the lines at the cursor."""
        if self._lines:
            width = shutil.get_terminal_size().columns - 1
            say(*(one_line(line, width) for line in self._lines), to=self._stream)
        self._stream.flush()


@contextmanager
def above_live_lines() -> Iterator[None]:
    """Moves the live lines of this process out of the way of what the body prints, and below it."""
    with _lock:
        for lines in _shown:
            lines.erase()
        try:
            yield
        finally:
            for lines in _shown:
                lines.draw()
