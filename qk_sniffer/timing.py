"""Measures the time of each stage of a job."""

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


def describe(seconds: dict[str, float]) -> str:
    """Returns `forward 12.3 s, gather 0.1 s`: the longest stage first, without stages below a millisecond."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.3g} s" for name, value in longest if value >= 0.001)
