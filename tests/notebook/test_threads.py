"""Another thread reads and saves a capture while passes run: what it gets is of one moment."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.live import LLAMA, random_ids

import qk_sniffer
from qk_sniffer.dataset.verify import verify
from qk_sniffer.notebook import captured as captured_module
from qk_sniffer.notebook.reader import MemoryReader
from qk_sniffer.notebook.statistics import PassStatistics

WAIT_S = 120
"""The longest wait for a thread, so that a fault ends the test."""


class Other(threading.Thread):
    """Calls `act` in another thread, which waits in `pause` until `proceed`."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.act = act
        self.found: Any = None
        self.error: BaseException | None = None
        self.stopped, self.may_proceed = threading.Event(), threading.Event()
        """`stopped`: it waits, or has ended."""

    def run(self) -> None:
        try:
            self.found = self.act()
        except BaseException as error:
            self.error = error
        finally:
            self.stopped.set()

    def pause(self) -> None:
        if threading.current_thread() is self and not self.stopped.is_set():
            self.stopped.set()
            assert self.may_proceed.wait(WAIT_S)

    def started(self) -> None:
        """Returns once it waits or has ended."""
        self.start()
        assert self.stopped.wait(WAIT_S)

    def result(self) -> Any:
        self.may_proceed.set()
        self.join(WAIT_S)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.found


def pausing(original: Callable[..., Any], other: list[Other], *, after: bool = False) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        if not after:
            other[0].pause()
        found = original(*args, **options)
        other[0].pause()
        return found

    return function


def test_a_pass_that_ends_during_a_save_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = LLAMA.model()
    other: list[Other] = []
    with torch.no_grad(), qk_sniffer.capture(model, statistics=True, attention=True) as captured:
        first = model(input_ids=random_ids(2, 6), use_cache=True)
        before = {key: captured.vectors(*key) for key in captured.heads}
        monkeypatch.setattr(captured_module, "save", pausing(captured_module.save, other))
        other.append(Other(lambda: captured.save(tmp_path / "saved")))
        other[0].started()
        model(input_ids=random_ids(2, 3, seed=1), past_key_values=first.past_key_values)
        model(input_ids=random_ids(1, 5, seed=2))
        other[0].result()
    assert verify(tmp_path / "saved").problems == 0
    dataset = qk_sniffer.open_dataset(tmp_path / "saved")
    assert dataset.examples["num_tokens"].to_pylist() == [6, 6]
    assert dataset.statistics(0, "k").count.tolist() == [12] * len(dataset.statistics(0, "k").heads)
    for key, expected in before.items():
        found = dataset.vectors(*key)
        assert np.array_equal(found.positions, expected.positions) and np.array_equal(found.vectors, expected.vectors)


def test_a_read_waits_for_the_end_of_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a pass count before its examples, within one change."""
    model: Any = LLAMA.model()
    other: list[Other] = []

    class Lock:
        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            if threading.current_thread() is other[0]:
                other[0].stopped.set()
            self.lock.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.lock.__exit__(*error)

    original = PassStatistics.end_pass

    def inside(self: PassStatistics) -> None:
        other[0].started()
        original(self)

    def read() -> tuple[int, ...]:
        captured.save(tmp_path / "saved")
        return len(captured.vectors(0, 0, "k").positions), captured.statistics(0, "k").count[0]

    with torch.no_grad(), qk_sniffer.capture(model, statistics=True) as captured:
        changes = captured._store.changes
        monkeypatch.setattr(changes, "_lock", Lock(changes._lock))
        other.append(Other(read))
        model(input_ids=random_ids(1, 6))
        monkeypatch.setattr(PassStatistics, "end_pass", inside)
        model(input_ids=random_ids(1, 7, seed=1))
        assert other[0].result() == (13, 13)
    assert verify(tmp_path / "saved").problems == 0
    assert qk_sniffer.open_dataset(tmp_path / "saved").examples["num_tokens"].to_pylist() == [6, 7]


def test_a_read_of_several_kinds_is_of_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = LLAMA.model()
    other: list[Other] = []
    with torch.no_grad(), qk_sniffer.capture(model, attention=True) as captured:
        first = model(input_ids=random_ids(1, 6), use_cache=True)
        expected = captured.attention(0, 0)
        monkeypatch.setattr(MemoryReader, "vectors", pausing(MemoryReader.vectors, other, after=True))
        other.append(Other(lambda: captured.attention(0, 0)))
        other[0].started()
        model(input_ids=random_ids(1, 3, seed=1), past_key_values=first.past_key_values)
        found = other[0].result()
    assert np.array_equal(found.weights, expected.weights)
