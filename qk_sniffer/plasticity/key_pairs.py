"""Draws pairs of keys of one example in one bucket, all pairs with the same probability."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

QUERY_ROWS, KEY_ROWS, COMPONENTS, PAIRS = range(4)
"""The kinds of draws: the last word of a draw's seed."""


def generator(seed: int, layer: int, head: int, kind: int) -> np.random.Generator:
    """The random numbers of one draw. They depend on these words alone, not on the order of draws."""
    return np.random.default_rng(np.random.SeedSequence([seed, layer, head, kind]))


class KeyGroups:
    """The keys of one head by bucket and example.

    Args:
        buckets, example_ids, positions: (n,) of the keys, in any order.
    """

    def __init__(self, buckets: npt.ArrayLike, example_ids: npt.ArrayLike, positions: npt.ArrayLike) -> None:
        bucket, example = np.asarray(buckets), np.asarray(example_ids)
        self._order: Int64 = np.lexsort((np.asarray(positions), example, bucket))
        bucket, example = bucket[self._order], example[self._order]
        is_first = np.ones(len(bucket), bool)
        is_first[1:] = (bucket[1:] != bucket[:-1]) | (example[1:] != example[:-1])
        self._starts: Int64 = np.flatnonzero(is_first)
        self._sizes: Int64 = np.diff(self._starts, append=len(bucket))
        self._buckets = bucket[self._starts]

    def sequences(self, bucket: int) -> Sequence[Int64]:
        """The rows of each example with at least two keys in `bucket`, by position."""
        starts, sizes = self._of(bucket)
        return [self._order[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def draw(self, bucket: int, count: int, random: np.random.Generator) -> tuple[Int64, Int64]:
        """The rows of the first and the second key of `count` pairs, or of all pairs if there are fewer.

        The unordered pairs of all examples are numbered, example by example, and within one as (0, 1), (0, 2), (1, 2),
        (0, 3), ... Numbers are drawn without replacement, so memory does not grow with the number of pairs. Plasticity
        does not depend on which key of a pair is the first.
        """
        starts, sizes = self._of(bucket)
        pairs = sizes * (sizes - 1) // 2
        ends = np.cumsum(pairs)
        total = int(ends[-1]) if len(ends) else 0
        numbers = random.choice(total, count, replace=False, shuffle=False) if total > count else np.arange(total)
        example = np.searchsorted(ends, numbers, side="right")
        number = numbers - (ends - pairs)[example]
        second = _triangular_root(number)
        first = number - second * (second - 1) // 2
        return self._order[starts[example] + first], self._order[starts[example] + second]

    def _of(self, bucket: int) -> tuple[Int64, Int64]:
        these = (self._buckets == bucket) & (self._sizes > 1)
        return self._starts[these], self._sizes[these]


def _triangular_root(number: Int64) -> Int64:
    """The largest i with i (i - 1) / 2 <= number. Corrects the rounding of the square root of large numbers."""
    root = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
    root -= root * (root - 1) // 2 > number
    root += root * (root + 1) // 2 <= number
    return root
