"""Measures the time of each stage of a job."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Measures seconds by stage, for one thread. The time of an inner stage does not count for the outer one, so the
    stages sum to the time of the thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            own = whole - self._inner.pop()
            self._inner[-1] += whole
            self.seconds[name] = self.seconds.get(name, 0.0) + own

    def add(self, name: str, seconds: float) -> None:
        """Adds `seconds` that the stage `name` took just now: for stages so short that a block would take longer."""
        self._inner[-1] += seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves `seconds` from the stage `source`, which is over, to the stage `target`."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds


class Clock:
    """Counts the seconds in which any thread is in its block."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.monotonic() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves its block for this one."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def describe(seconds: dict[str, float]) -> str:
    """Returns `forward 12.3 s, gather 0.2 s`: the longest stage first, without stages below 1 % of the whole."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    least = max(0.01 * sum(seconds.values()), 0.001)
    return ", ".join(f"{name} {value:.3g} s" for name, value in longest if value >= least)
