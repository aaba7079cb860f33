"""The next item is made while the caller works on this one."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """The same `items`, made in a thread, at most two more than were asked for; what they raise comes in its place.

    When the block is left before the end, the item that is being made is the last, and nobody waits for it.
    """
    ready: Queue[T | _End] = Queue(maxsize=1)
    left = Event()

    def make() -> None:
        end = _End()
        try:
            for item in items:
                if left.is_set():
                    return
                ready.put(item)
                if left.is_set():  # while it waited for room
                    return
        except BaseException as error:
            end = _End(error)
        if not left.is_set():
            ready.put(end)

    def taken() -> Iterator[T]:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    Thread(target=make, name="ahead", daemon=True).start()
    try:
        yield taken()
    finally:
        left.set()
        with suppress(Empty):
            ready.get_nowait()  # room for the item that the thread may be waiting with


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None
