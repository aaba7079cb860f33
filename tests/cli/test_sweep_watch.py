"""A command that waits for the jobs of its sweep in other processes shows how far each of them has come."""

import logging
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qk_sniffer.cli.sweep_watch import SweepWatch
from qk_sniffer.config import from_dict
from qk_sniffer.jobs import job_status, sweep
from qk_sniffer.jobs.progress import Progress
from qk_sniffer.jobs.sweep import PlannedJob
from qk_sniffer.logs import TerminalHandler
from qk_sniffer.resolved import resolve
from qk_sniffer.store.layout import Layout


@pytest.fixture
def jobs(tmp_path: Path) -> list[PlannedJob]:
    configs = [{"model": {"name": "org/m"}, "output": {"data_root": str(tmp_path / str(n))}} for n in range(3)]
    return [PlannedJob(n, (f"sampler.seed={n}",), resolve(from_dict(config))) for n, config in enumerate(configs)]


@pytest.fixture
def folder(jobs: list[PlannedJob], tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "sweep"
    with sweep.announced(folder, jobs, outlive=False):
        yield folder


def job_folder(folder: Path, number: int) -> Path:
    made = folder / str(number)
    made.mkdir()
    return made


def test_a_pipe_gets_a_line_when_the_state_of_a_job_changes_or_a_tenth_is_captured(
    jobs: list[PlannedJob], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watch = SweepWatch(jobs, folder)

    def told() -> list[str]:
        watch.tell()
        found = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
        caplog.clear()
        return found

    assert told() == [], "queued jobs are no news"
    status = job_status.Status.here(0, jobs[0].config)
    layout = Layout(jobs[0].config.data_root)
    with job_status.recorded(status, job_folder(folder, 0)):
        assert told() == ["INFO job 0 (sampler.seed=0): running, loading"]
        layout.work.mkdir(parents=True)
        progress = Progress(2000, file=layout.progress(0, 1))
        progress.add(501, 9, 70)
        progress.close()
        (line,) = told()
        assert line.startswith("INFO job 0 (sampler.seed=0): running, 501 of 2,000 examples (25%), about ")
        assert told() == []
        progress.add(20, 9, 1)
        progress.close()
        assert told() == [], "it is the same tenth"
        progress.add(1479, 9, 1)
        progress.close()
        assert told() == ["INFO job 0 (sampler.seed=0): running, 2,000 of 2,000 examples (100%), finishing"]
        status.succeed(71, None)
    assert told() == ["INFO job 0 (sampler.seed=0): done, 71 rows"]
    broken = job_status.Status.here(1, jobs[1].config)
    with job_status.recorded(broken, job_folder(folder, 1)):
        broken.began = True
        broken.fail("the disk is full")
    assert told() == ["WARNING job 1 (sampler.seed=1): failed: the disk is full"]
    odd = job_status.Status.here(2, jobs[2].config)
    with job_status.recorded(odd, job_folder(folder, 2)):
        odd.fail("the data root is in use")
    assert told() == ["WARNING job 2 (sampler.seed=2): refused: the data root is in use"]


def test_a_terminal_gets_a_line_a_job_below_what_is_logged(
    jobs: list[PlannedJob], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as reader:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.setenv("LINES", "24")
        watch = SweepWatch(jobs, folder, lambda: {2: "Priority"})
        assert watch._live is not None
        lines = [f"job {number} (sampler.seed={number}): queued" for number in range(3)]
        lines[2] += ": Pri ..."
        block = "".join(f"{line}\r\n" for line in lines)

        def shown(expected: str) -> bool:
            """Whether the terminal shows `expected` next, which may come in parts."""
            got = b""
            while len(got) < len(expected.encode()):
                got += reader.read(len(expected.encode()) - len(got))
            return got.decode() == expected

        with watch._live:
            watch.tell()
            assert shown(block)
            TerminalHandler(terminal).emit(logging.makeLogRecord({"msg": "SLURM does not start job 2"}))
            assert shown(f"\r\x1b[3A\x1b[JSLURM does not start job 2\r\n{block}")
        assert shown("\r\x1b[3A\x1b[J")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("LINES", "6")
        with job_status.recorded(job_status.Status.here(1, jobs[1].config), job_folder(folder, 1)):
            watch.tell()
        assert shown("job 1 (sampler.seed=1): running, loading\r\nand 2 more jobs: 2 queued\r\n")


def test_the_table_of_a_sweep_fits_the_terminal_and_keeps_every_word(jobs: list[PlannedJob]) -> None:
    named = [PlannedJob(job.number, ("sampler.base_rate=8", "model=qwen3_8b"), job.config) for job in jobs]
    whole, narrow = sweep.table(named, {}), sweep.table(named, {}, 80)
    assert max(map(len, whole.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
    assert "".join(sorted(whole.replace("\n", "").replace(" ", ""))) == "".join(sorted("".join(narrow.split())))
