"""How a signal ends a job, in the process of the test. `test_faults.py` sends signals to jobs."""

import signal
import threading

import pytest

from qk_sniffer.jobs.signals import Stopped, Stopping


def test_a_signal_at_the_begin_of_a_wait_stops_the_job() -> None:
    # As in `Condition.wait`, whose lock is not taken yet.
    with pytest.raises(Stopped, match="SIGTERM"), Stopping():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            threading.Lock().release()


def test_an_error_of_what_a_stop_still_writes_is_told() -> None:
    with pytest.raises(OSError, match="No space left"), Stopping():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise OSError("No space left")


def test_an_error_of_a_lock_without_a_signal_is_told() -> None:
    with pytest.raises(RuntimeError, match="release unlocked lock"), Stopping():
        threading.Lock().release()
