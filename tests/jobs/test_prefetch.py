"""The prefetch yields the same items, raises errors in their place, and leaves no thread behind."""

import threading
import time
from collections.abc import Iterator
from threading import Event

import pytest

from qk_sniffer.jobs.prefetch import ahead, in_background


def is_running() -> bool:
    return any(thread.name == "ahead" for thread in threading.enumerate())


def wait_until_gone() -> None:
    deadline = time.monotonic() + 60
    while is_running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running()


def counted(made: list[int], count: int, error: BaseException | None = None) -> Iterator[int]:
    for number in range(count):
        made.append(number)
        yield number
    if error is not None:
        raise error


def test_all_items_come_in_their_order() -> None:
    with ahead(counted([], 100)) as items:
        assert list(items) == list(range(100))
    wait_until_gone()


def test_few_are_made_ahead() -> None:
    made: list[int] = []
    with ahead(counted(made, 100)) as items:
        assert next(items) == 0
        deadline = time.monotonic() + 60
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [0, 1, 2]  # one is in the queue, and one waits for room


def test_an_error_comes_after_the_items_before_it() -> None:
    with ahead(counted([], 3, KeyError("three"))) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="three"):
            next(items)
    wait_until_gone()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_leaving_early_ends_the_thread(count: int) -> None:
    made: list[int] = []
    with pytest.raises(ZeroDivisionError), ahead(counted(made, count, ValueError())) as _:
        time.sleep(0.05)
        raise ZeroDivisionError
    wait_until_gone()
    assert len(made) <= 3


def test_leaving_does_not_wait_for_an_item_that_takes_long() -> None:
    go = threading.Event()

    def slow() -> Iterator[int]:
        go.wait(60)
        yield 1

    with pytest.raises(ZeroDivisionError), ahead(slow()) as _:
        raise ZeroDivisionError
    assert is_running(), "the thread still waits for its item"
    go.set()
    wait_until_gone()


def test_work_in_the_background_ends_with_the_block() -> None:
    began, ended = Event(), Event()

    def work(left: Event) -> None:
        began.set()
        assert left.wait(10)
        ended.set()

    with pytest.raises(ValueError, match="of the caller"), in_background(work):
        assert began.wait(10)
        raise ValueError("of the caller")
    assert ended.wait(10)


def test_an_error_in_the_background_is_raised_where_the_caller_waits() -> None:
    def fail(_: Event) -> None:
        raise KeyError("in the thread")

    with in_background(fail) as wait, pytest.raises(KeyError, match="in the thread"):
        wait()
    with in_background(lambda _: None) as wait:
        wait()
