"""Stages sum to the whole time; progress is a bar on a terminal, and log lines elsewhere."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest

from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import progress
from qk_sniffer.jobs.progress import Progress
from qk_sniffer.logs import TerminalHandler
from qk_sniffer.store.open_folder import PLAIN, Checked
from qk_sniffer.timing import Stages, describe


def test_a_stage_inside_another_counts_for_itself_alone() -> None:
    stages = Stages()
    start = time.perf_counter()
    with stages("forward"):
        time.sleep(0.02)
        for _ in range(2):
            with stages("gather"):
                time.sleep(0.03)
    whole = time.perf_counter() - start
    assert stages.seconds["gather"] >= 0.06
    assert 0.02 <= stages.seconds["forward"] <= whole - 0.06
    assert sum(stages.seconds.values()) <= whole


def test_a_stage_that_fails_is_counted_too() -> None:
    stages = Stages()
    with pytest.raises(ZeroDivisionError), stages("forward"), stages("gather"):
        raise ZeroDivisionError
    with stages("write"):
        pass
    assert stages.seconds.keys() == {"forward", "gather", "write"}


def test_stages_are_described_longest_first() -> None:
    assert describe({"plan": 0.25, "forward": 12.34}) == "forward 12.3 s, plan 0.25 s"


def test_the_description_leaves_out_stages_that_take_next_to_nothing() -> None:
    assert describe({"forward": 258.0, "gather": 1.47, "verify": 73.6}) == "forward 258 s, verify 73.6 s"
    assert describe({"plan": 0.0001}) == ""


def test_plain_lines_where_stderr_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    shown = Progress(total=10, done=4, file=tmp_path / "progress")
    with caplog.at_level(logging.INFO):
        shown.add(examples=2, tokens=300, rows=24)
    shown.close()
    assert caplog.messages[0].startswith("6 of 10 examples, about ")
    assert "tokens/s, 24 rows, " in caplog.messages[0] and "MB memory" in caplog.messages[0]
    assert sys.stderr.getvalue() == ""


def test_a_stream_has_no_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    shown = Progress(total=None, file=tmp_path / "progress")
    with caplog.at_level(logging.INFO):
        shown.add(examples=2, tokens=300, rows=24)
    shown.close()
    assert caplog.messages[0].startswith("2 examples, ")


def everything(master: int) -> str:
    """Everything written to a terminal: each read returns only a part."""
    data = b""
    with suppress(BlockingIOError):
        while part := os.read(master, 4096):
            data += part
    return data.decode()


@contextmanager
def terminal_of(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, TextIO]]:
    """Makes stderr a terminal; yields its master and its file."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        yield master, terminal
    os.close(master)


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with terminal_of(150, monkeypatch) as (master, _):
        shown = Progress(total=10, file=tmp_path / "progress")
        time.sleep(0.15)
        with caplog.at_level(logging.INFO):
            shown.add(examples=5, tokens=300, rows=24)
        shown.close()
        text = everything(master)
    assert " 5/10, " in text and "24 rows" in text and not caplog.messages


def test_a_log_line_does_not_go_on_after_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal_of(80, monkeypatch) as (master, terminal):
        shown = Progress(total=10, file=tmp_path / "progress")
        record = logging.LogRecord("qk_sniffer", logging.INFO, __file__, 1, "plan: 10 texts", None, None)
        TerminalHandler(terminal).emit(record)
        text = everything(master)
        shown.close()
    before, _, after = text.partition("plan: 10 texts")
    assert " 0/10, " in before and re.search(r"\r *\r$", before), "the bar is erased first"
    assert " 0/10, " in after, "and shown again"


@pytest.mark.parametrize(
    ("total", "parts"), [(1_000_000, (" 50% ", " 500000/1000000", " left")), (None, ("500000 texts",))]
)
def test_the_bar_shows_its_parts_at_80_columns(
    total: int | None, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal_of(80, monkeypatch) as (master, _):
        shown = Progress(total=total, unit="text", file=tmp_path / "progress")
        monkeypatch.setattr(shown, "_start", shown._start - 3600.0)
        shown._bar.start_t -= 3600.0
        shown._bar.last_print_t -= 3600.0
        shown.add(examples=500_000, tokens=44_640_000, rows=6_700_000_000)
        shown._bar.refresh()
        drawn = everything(master).split("\r")
        shown.close()
    (line,) = {line.strip() for line in drawn if "500000" in line}
    assert len(line) <= 80 and all(part in f" {line}" for part in parts)
    assert re.search(r"12\.4k tok/s, 6\.70G rows, [\d.]+[MG]B", line)


def test_a_report_replaces_none_of_a_job_that_has_taken_the_data_root(tmp_path: Path) -> None:
    file = tmp_path / "shard.progress"

    def check() -> None:
        if file.with_name(file.name + ".tmp").exists():  # the other job comes while the report is written
            file.write_text("of the other job")
            raise StoreError("taken away")

    Progress(3, file=file, access=Checked(PLAIN, check)).close()
    assert file.read_text() == "of the other job"
