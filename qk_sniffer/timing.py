"""Measures where the time of a job goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds by stage. A stage inside another counts for itself alone. For one thread's use: the stages of a thread
    sum to its time."""

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

    def move(self, seconds: float, source: str, target: str) -> None:
        """Counts `seconds` of the stage `source`, which is over, for `target`."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds


def describe(seconds: dict[str, float]) -> str:
    """`forward 12.3 s, gather 0.1 s`, longest first; stages under a millisecond are left out."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.3g} s" for name, value in longest if value >= 0.001)
