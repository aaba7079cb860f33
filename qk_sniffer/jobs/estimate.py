"""Estimates the time of a job from batches that were timed."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from math import ceil

import numpy as np
import numpy.typing as npt

from qk_sniffer.capture.forward_cost import ForwardCost
from qk_sniffer.corpus.batches import Window
from qk_sniffer.corpus.tokens import Tokens

MOST_SAMPLED = 64
"""The batches of a job that may be timed."""

Batch = Sequence[Tokens]
Terms = npt.NDArray[np.float64]
"""(batches, 3): 1, the tokens of the forward pass with padding, and the arithmetic of its attention in GFLOP."""


class Batches:
    """Notes the terms of the batches of a job, and keeps evenly spaced ones and the one with the most arithmetic."""

    def __init__(self, cost: ForwardCost) -> None:
        self._cost = cost
        self._terms: list[tuple[float, float, float]] = []
        self._spaced: dict[int, Batch] = {}
        self._step = 1
        self._largest = -1.0, -1
        self._largest_batch: Batch = ()
        self.first: Window | None = None
        """The first window."""

    def noted(self, windows: Iterable[Window]) -> Iterator[Window]:
        """Yields `windows`."""
        for window in windows:
            if self.first is None:
                self.first = window
            for batch in window.batches:
                self._add(batch)
            yield window

    def _add(self, batch: Batch) -> None:
        number, terms = len(self._terms), self.terms_of(batch)
        self._terms.append(terms)
        if (flops := self.flops_of(terms)) > self._largest[0]:
            self._largest, self._largest_batch = (flops, number), batch
        if number % self._step == 0:
            self._spaced[number] = batch
        if len(self._spaced) >= MOST_SAMPLED:
            self._step *= 2
            self._spaced = {at: kept for at, kept in self._spaced.items() if at % self._step == 0}

    def terms_of(self, batch: Batch) -> tuple[float, float, float]:
        """Returns the `Terms` of one batch."""
        longest = max(example.num_tokens for example in batch)
        attention = float(self._cost.flops(longest)) - 2 * self._cost.parameters * longest
        return 1.0, float(len(batch) * longest), len(batch) * attention / 1e9

    def flops_of(self, terms: tuple[float, float, float]) -> float:
        """Returns the arithmetic of a batch with these terms."""
        return 2 * self._cost.parameters * terms[1] + 1e9 * terms[2]

    def terms_of_all(self, batches: Sequence[Batch]) -> Terms:
        """Returns the terms of several batches."""
        return np.array([self.terms_of(batch) for batch in batches]).reshape(-1, 3)

    @property
    def terms(self) -> Terms:
        """Those of all batches."""
        return np.array(self._terms).reshape(-1, 3)

    @property
    def flops(self) -> float:
        """The arithmetic of all batches."""
        return sum(map(self.flops_of, self._terms))

    def sample(self) -> list[Batch]:
        """Returns the kept batches in the order to time them in: the largest, the smallest, a median one, others."""
        kept = {**self._spaced} | ({self._largest[1]: self._largest_batch} if self._terms else {})
        order = sorted(kept, key=lambda number: (-self.flops_of(self._terms[number]), number))
        first = list(dict.fromkeys([*order[:1], *order[-1:], *order[len(order) // 2 :][:1]]))
        others = [number for number in order if number not in first]
        step = ceil(len(others) / 8)
        spread = [number for start in range(step) for number in others[start::step]]
        return [kept[number] for number in [*first, *spread]]


def fit(terms: Terms, seconds: Sequence[float]) -> npt.NDArray[np.float64]:
    """Returns the seconds of each term (3,), none negative, that have the least squares of relative errors.

    Of three terms, every choice of some is solved without a limit; the solution with the limit is among those that have
    no negative number.
    """
    measured = np.maximum(np.asarray(seconds, np.float64), 1e-9)
    scaled = terms / measured[:, None]
    best, least = np.zeros(terms.shape[1]), np.inf
    for size in range(1, terms.shape[1] + 1):
        for chosen in map(list, combinations(range(terms.shape[1]), size)):
            found = np.linalg.lstsq(scaled[:, chosen], np.ones(len(measured)))[0]
            error = float(np.square(scaled[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(terms.shape[1]), error
                best[chosen] = found
    return best


def line_through(few: tuple[float, float], many: tuple[float, float], at: float) -> float:
    """Returns the seconds for `at` bytes, from two pairs of bytes and seconds.

    Of almost equal pairs the larger one counts, and seconds do not fall with bytes.
    """
    (less, short), (more, long) = few, many
    if more <= 1.1 * less:
        return long
    return long + max(0.0, (long - short) / (more - less)) * max(0.0, at - more)


def duration(seconds: float) -> str:
    """Returns a duration with two or three digits: `4.2 s`, `85 s`, `12 min`, `3.4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for size, unit, most in ((1, "s", 120), (60, "min", 120), (3600, "h", 48)):
        if (number := seconds / size) < most - 0.5:
            return f"{number:.1f} {unit}" if number < 9.95 else f"{number:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
