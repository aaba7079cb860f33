"""Runs work in a thread next to the caller: the next item of an iterator, or a check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Yields `items`, made in a thread that is at most two items ahead. Raises an error of `items` in its place.

    When the block ends early, the thread stops after its current item, and nobody waits for it.
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
                if left.is_set():  # while `put` waited
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
            ready.get_nowait()  # frees a place for the item that the thread may be putting


@contextmanager
def in_background(work: Callable[[Event], None]) -> Iterator[Callable[[], None]]:
    """Runs `work` in a thread within the block. Yields a function that waits for its end, and raises its error.

    `work` gets an event. It is set when the block ends early, and `work` returns soon after. Nobody waits for that.
    """
    left = Event()
    done: Queue[BaseException | None] = Queue(maxsize=1)

    def run() -> None:
        try:
            work(left)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)

    def wait() -> None:
        if (error := done.get()) is not None:
            raise error

    Thread(target=run, name="background", daemon=True).start()
    try:
        yield wait
    finally:
        left.set()


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None
