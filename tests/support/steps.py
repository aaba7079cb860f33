"""Disturbs a job in the middle of its steps, in the process of the test."""

from collections.abc import Callable
from typing import Any

import pytest

from qk_sniffer.capture import proof
from qk_sniffer.capture.capture import Capture
from qk_sniffer.jobs import capture_examples, finish
from qk_sniffer.store import compact, promote
from qk_sniffer.store.segment_writers import SegmentWriters

STEPS: dict[str, tuple[Any, str, int]] = {
    "forward": (Capture, "run", 4),
    "segment": (SegmentWriters, "_write", 2),
    "mark": (capture_examples, "mark_done", 1),
    "finish": (finish, "captured_job", 1),
    "compaction": (compact._Job, "write_heads", 2),
    "proof": (proof, "prove", 1),
    "promotion": (finish, "promote", 1),
    "move": (promote, "_move", 1),
    "root's manifest": (promote, "sync_folder", 10),
    "removal": (promote, "remove_work", 1),
    "report": (finish, "report_and_publish", 1),
}
"""The steps of a job, and the call, counted from 1, in which `at` disturbs it."""


def at(step: str, patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Runs `act` once, just before the job takes a step. What `act` runs has no such steps."""
    owner, name, number = STEPS[step]
    real, calls = getattr(owner, name), 0

    def disturbed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            patch.setattr(owner, name, real)
            act()
        return real(*args, **options)

    patch.setattr(owner, name, disturbed)
