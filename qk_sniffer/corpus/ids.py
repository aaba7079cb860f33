"""Gives each id of a source a number of its own, its `example_id`.

Each id prefers a number: an integer that fits int32 prefers itself, any other id a 31-bit digest of its text. In the
order of the source, an id gets the number that it prefers. If an earlier id has that number, it gets the next number
that no earlier id has; 0 follows 2**31 - 1. Only ids of examples count: a row without text takes no number.

An id is a value of the source: 12 and the text "12" are two ids, as true and "true" are.

The rule depends on nothing but the ids and their order. An id therefore keeps its number when rows are appended. All
shards agree, and so do a source that is streamed and one that is not.
"""

from array import array
from collections.abc import Callable, Hashable
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

_LARGEST = 2**31 - 1


class RepeatedIdError(ValueError):
    """Two examples have the same id. `first` and `second` are their places in the source."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"places {first} and {second} have the same id")
        self.first = first
        self.second = second


def preferred_number(source_id: Any) -> int:
    """Returns an integer id that fits int32 unchanged, and a 31-bit digest of the text of any other id."""
    if isinstance(source_id, int) and not isinstance(source_id, bool) and -(2**31) <= source_id < 2**31:
        return source_id
    return int.from_bytes(blake2b(str(source_id).encode(), digest_size=4).digest(), "big") & _LARGEST


def identity(source_id: Any) -> tuple[bool, str]:
    """Returns whether an id is a text, and its text: equal for equal ids alone."""
    return isinstance(source_id, str), str(source_id)


def moved_numbers(
    preferred: npt.NDArray[np.int32], id_of: Callable[[int], Hashable | None], suspects: npt.ArrayLike = ()
) -> dict[int, int]:
    """Returns the numbers of the examples that do not get the one that they prefer, by their place.

    Takes about 30 bytes of memory for each place. The result is small: 10 million digests give 23,000 numbers.

    Args:
        preferred: the number that the id at each place of the source prefers, (num_places,).
        id_of: returns the `identity` of the id at a place; None if that row gives no example. It may be slow: it is
            called only for places whose number more than one id may claim.
        suspects: further places for which `id_of` is called, because it may refuse them.

    Raises:
        RepeatedIdError: two examples have the same id.
    """
    order = np.argsort(preferred, kind="stable")
    ordered = preferred[order]
    queued = {*repeated_places(preferred), *np.asarray(suspects, np.int64).tolist()}
    waiting = list(queued)
    heapify(waiting)
    holders: dict[int, tuple[int, Hashable]] = {}

    def places_of(number: int) -> list[int]:
        first, stop = np.searchsorted(ordered, number), np.searchsorted(ordered, number, side="right")
        places: list[int] = order[first:stop].tolist()
        return places

    def holder_of(number: int, before: int) -> tuple[int, Hashable] | None:
        if number not in holders:
            for place in places_of(number):
                # A queued place is in `holders` already if it comes before this one and has kept its number.
                if place < before and place not in queued and (source_id := id_of(place)) is not None:
                    holders[number] = place, source_id
        return holders.get(number)

    moved = {}
    while waiting:
        place = heappop(waiting)
        source_id = id_of(place)
        if source_id is None:
            continue
        number = wanted = int(preferred[place])
        while (holder := holder_of(number, place)) is not None:
            if holder[1] == source_id:
                raise RepeatedIdError(holder[0], place)
            number = (number + 1) & _LARGEST
        holders[number] = place, source_id
        if number != wanted:
            moved[place] = number
            for later in places_of(number):
                if later > place and later not in queued:
                    queued.add(later)
                    heappush(waiting, later)
    return moved


def repeated_places(preferred: npt.NDArray[np.int32]) -> set[int]:
    """Returns the places whose preferred number another place prefers too."""
    order = np.argsort(preferred, kind="stable")
    ordered = preferred[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    return {*order[again].tolist(), *order[again + 1].tolist()}


class StreamedIds:
    """The ids of a stream so far, each with its number. Takes about 40 bytes of memory for each.

    A table of open addresses finds the id of a number. An id is kept as a digest of 64 bits, which is compared only
    with those of the ids that claim the same number.
    """

    def __init__(self) -> None:
        self._numbers = array("i")
        self._digests = array("Q")
        self._places = array("q")
        self._bits = 10
        self._table = array("i", [-1]) * (1 << self._bits)

    def add(self, place: int, source_id: Any) -> int:
        """Returns the number of the id at `place` of the source, which comes after all places before.

        Raises:
            RepeatedIdError: an earlier place has the same id.
        """
        digest = int.from_bytes(blake2b(repr(identity(source_id)).encode(), digest_size=8).digest(), "big")
        number = preferred_number(source_id)
        while (entry := self._table[slot := self._slot(number)]) >= 0:
            if self._digests[entry] == digest:
                raise RepeatedIdError(self._places[entry], place)
            number = (number + 1) & _LARGEST
        self._table[slot] = len(self._numbers)
        self._numbers.append(number)
        self._digests.append(digest)
        self._places.append(place)
        if 2 * len(self._numbers) > len(self._table):
            self._bits += 1
            self._table = array("i", [-1]) * (1 << self._bits)
            for entry, each in enumerate(self._numbers):
                self._table[self._slot(each)] = entry
        return number

    def _slot(self, number: int) -> int:
        """Returns the slot of the table that has the entry of `number`, or would have it."""
        # The upper bits of the product depend on all bits of the number: ids at regular distances spread too.
        slot = (number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> (64 - self._bits)
        while (entry := self._table[slot]) >= 0 and self._numbers[entry] != number:
            slot = (slot + 1) & (len(self._table) - 1)
        return slot
