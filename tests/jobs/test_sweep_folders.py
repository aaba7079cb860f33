"""The folders of sweeps and runs: who may take one, what it records, and what is left of a job that dies."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Stopped
from support.status_cases import begin, planned, states

from qk_sniffer.cli import app
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import job_status, signals, sweep
from qk_sniffer.jobs.job_status import Status, recorded, recorded_status
from qk_sniffer.jobs.status import look, table
from qk_sniffer.jobs.sweep import announced
from qk_sniffer.store.locks import restart_patience_s
from qk_sniffer.text import hide_in_address


def test_a_sweep_from_beginning_to_end(tmp_path: Path) -> None:
    folder, jobs = tmp_path / ".sweeps" / "1", planned(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    (tmp_path / "b").mkdir()
    with announced(folder, jobs, outlive=False):
        with pytest.raises(StoreError) as raised, announced(folder, jobs, outlive=False):
            pass
        said = str(raised.value)
        assert said.startswith(f"{folder} is in use: ") and "is running this sweep. Two programs cannot write" in said
        assert states(tmp_path) == {"a": "queued", "b": "queued", "c": "queued"}
        with begin(folder / "0", jobs[0].config):
            assert states(tmp_path) == {"a": "running", "b": "queued", "c": "queued"}
        assert states(tmp_path)["a"] == "interrupted", "nobody said that it is done"
        found = Status.here(1, jobs[1].config)
        (folder / "1").mkdir()
        with recorded(found, folder / "1"):
            found.succeed(7, "https://hub/b")
        assert states(tmp_path)["b"] == "published"
    assert states(tmp_path) == {"a": "interrupted", "b": "published", "c": "not started"}


def test_a_sweep_removes_the_states_of_earlier_jobs_in_its_folder_alone(tmp_path: Path) -> None:
    other, (job,) = tmp_path / ".sweeps" / "1", planned(tmp_path / "a")
    with announced(other, [job], outlive=False), begin(other / "0", job.config):
        pass
    (tmp_path / "website").mkdir()
    (tmp_path / "website" / "status.json").write_text('{"of": "another program"}')
    (tmp_path / "0").mkdir()
    Status.here(0, job.config).write(tmp_path / "0")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with announced(tmp_path, [job], outlive=False):
        pass
    del before[tmp_path / "0" / "status.json"]
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert after.pop(tmp_path / "sweep.json") and after == before


@pytest.mark.parametrize("name", ["status.json", "job.lock", "sweep.json"])
def test_a_file_of_someone_else_in_the_folder_of_a_run_or_a_sweep_is_named_and_stays(name: str, tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    for content in ("mine", '{"of": "another program"}', "[" * 100_000):
        (tmp_path / name).write_text(content)
        record = announced(tmp_path, [job], outlive=False) if name == "sweep.json" else begin(tmp_path, job.config)
        with pytest.raises(StoreError, match=rf"{name} .*move it away"), record:
            pytest.fail("the job must not start")
        assert (tmp_path / name).read_text() == content
    (tmp_path / "job.lock").write_text("mine")
    with pytest.raises(StoreError, match=r"job\.lock .*move it away"), announced(tmp_path, [job], outlive=False):
        pytest.fail("the sweep must not start")
    assert (tmp_path / "job.lock").read_text() == "mine"


@pytest.mark.parametrize("left", [b"", b"\0" * 60, b'{"pid": 1, "host": "a", "slurm_job_id": null}'])
def test_a_lock_that_a_dead_job_has_left_is_taken(left: bytes, tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    (tmp_path / "job.lock").write_bytes(left)
    with begin(tmp_path, job.config):
        pass
    assert not (tmp_path / "job.lock").exists()


def test_a_sweep_keeps_the_states_of_other_runs_in_its_folder(tmp_path: Path) -> None:
    one, two, new = planned(tmp_path / "one", tmp_path / "two", tmp_path / "new")
    for job, name in ((one, "mine"), (two, ".runs/2026-11-02/11-00-00")):
        (tmp_path / name).mkdir(parents=True)
        Status.here(0, job.config).write(tmp_path / name)
    with announced(tmp_path, [new], outlive=False), begin(tmp_path / "2", new.config, 2):
        pass
    assert {path.parent.name for path in tmp_path.rglob("status.json")} == {"mine", "11-00-00", "2"}
    with announced(tmp_path, [one], outlive=False):
        pass
    assert [path.parent.name for path in tmp_path.rglob("status.json")] == ["11-00-00"]


def test_a_run_whose_folder_is_taken_writes_nothing_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, jobs = tmp_path / "1", planned(tmp_path / "a", tmp_path / "b")
    with announced(folder, jobs[:1], outlive=False) as record_slurm_ids, begin(folder / "0", jobs[0].config):
        shutil.rmtree(folder)
        with announced(folder, jobs[1:], outlive=False), begin(folder / "0", jobs[1].config):
            pass
        left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        record_slurm_ids(["7"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == left
    assert states(folder) == {"b": "interrupted"}
    assert caplog.text.count("is not recorded") == 3


def test_a_job_whose_folder_is_taken_does_not_record_there_that_it_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when SLURM's warning reaches a job whose sweep another one has replaced."""
    folder, (job, other) = tmp_path / "0", planned(tmp_path / "a", tmp_path / "b")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    heard: list[int] = []

    def stop(*_: Any) -> None:
        if is_taken:
            shutil.rmtree(folder)
            with begin(folder, other.config):
                pass
        raise signals.Stopped(signal.SIGUSR2)

    monkeypatch.setattr("qk_sniffer.jobs.run.run_job", stop)
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        for is_taken, state in ((False, "requeued"), (True, "interrupted")):
            status = Status.here(0, job.config)
            folder.mkdir(exist_ok=True)
            with pytest.raises(SystemExit), recorded(status, folder) as record:
                app._run_job(job.config, status, record)
            assert recorded_status(folder / "status.json").state == state
            assert Path(recorded_status(folder / "status.json").data_root).name == ("b" if is_taken else "a")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2] * 2, "both are requeued"
    assert "the state of this job is not recorded" in caplog.text


@pytest.mark.parametrize(("outlive", "state"), [(False, "not started"), (True, "queued")])
def test_a_command_that_dies_leaves_its_jobs_in_the_queue_where_there_is_one(
    outlive: bool, state: str, tmp_path: Path
) -> None:
    with pytest.raises(Stopped), announced(tmp_path / "1", planned(tmp_path / "a"), outlive=outlive):
        raise Stopped
    assert states(tmp_path) == {"a": state}


def test_a_sweep_does_not_take_the_folder_of_one_whose_jobs_may_still_start(tmp_path: Path) -> None:
    jobs = planned(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    with pytest.raises(Stopped), announced(tmp_path / "1", jobs, outlive=True):
        raise Stopped
    before = (tmp_path / "1" / "sweep.json").read_bytes()
    for number, state in ((0, job_status.DONE), (1, job_status.INTERRUPTED)):
        (tmp_path / "1" / str(number)).mkdir()
        Status.of(number, jobs[number].config, state=state).write(tmp_path / "1" / str(number))
    with (
        pytest.raises(StoreError, match=r"jobs 1-2 may still start on SLURM.*hydra\.sweep\.dir.*remove .*sweep\.json"),
        announced(tmp_path / "1", jobs[:1], outlive=True),
    ):
        pass
    assert (tmp_path / "1" / "sweep.json").read_bytes() == before
    for number in (1, 2):
        (tmp_path / "1" / str(number)).mkdir(exist_ok=True)
        Status.of(number, jobs[number].config, state=job_status.FAILED).write(tmp_path / "1" / str(number))
    with announced(tmp_path / "1", jobs[:1], outlive=True):
        assert states(tmp_path / "1") == {"a": "queued"}
    with announced(tmp_path / "1", jobs[1:], outlive=True):  # the command before has waited for its jobs
        assert states(tmp_path / "1") == {"b": "queued", "c": "queued"}


def test_a_sweep_does_not_take_the_folder_of_one_whose_jobs_run(tmp_path: Path) -> None:
    """The command before was killed. The states of its jobs were taken for those of the new ones, which never ran."""
    jobs = planned(tmp_path / "a", tmp_path / "b")
    with pytest.raises(Stopped), announced(tmp_path / "1", jobs, outlive=False):
        raise Stopped
    before = (tmp_path / "1" / "sweep.json").read_bytes()
    with (
        begin(tmp_path / "1" / "1", jobs[1].config, 1),
        pytest.raises(StoreError, match=r"whose jobs still run in 1\. Wait .*hydra\.sweep\.dir"),
        announced(tmp_path / "1", jobs[:1], outlive=False),
    ):
        pass
    assert (tmp_path / "1" / "sweep.json").read_bytes() == before
    with announced(tmp_path / "1", jobs[:1], outlive=False):
        assert states(tmp_path / "1") == {"a": "queued"}


def test_jobs_of_other_sweeps_and_runs_in_its_folder_are_not_those_of_a_sweep(tmp_path: Path) -> None:
    """They have the same numbers: a job that failed was done, and settings of jobs that wait were replaced."""
    folder, (job,) = tmp_path / "1", planned(tmp_path / "a")
    others = planned(tmp_path / "b", tmp_path / "c")
    with pytest.raises(Stopped), announced(folder, [job], outlive=True):
        raise Stopped
    with announced(folder / "again", others[:1], outlive=False), begin(folder / "again" / "0", others[0].config):
        pass
    single = Status.here(0, others[1].config)
    (folder / "run").mkdir()
    for path in (folder / "again" / "0", folder / "run"):
        single.succeed(7, None)
        with recorded(single, path):
            pass
    assert {number: status.state for number, status in sweep.statuses(folder).items()} == {0: job_status.QUEUED}
    with pytest.raises(StoreError, match="jobs 0 may still start on SLURM"), announced(folder, [job], outlive=True):
        pass
    found = Status.here(0, job.config)
    (folder / "0").mkdir()
    with recorded(found, folder / "0"):
        found.fail("no luck")
    assert sweep.statuses(folder)[0].error == "no luck"


def test_a_sweep_that_records_no_settings_takes_those_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one takes its folder while its jobs run."""
    with sweep.unannounced(tmp_path / "1"):
        first = os.environ[sweep.NONCE]
    with announced(tmp_path / "1", planned(tmp_path / "a"), outlive=False):
        assert sweep.submitted(tmp_path / "1", 0) is not None
        monkeypatch.setenv(sweep.NONCE, first)
        assert sweep.submitted(tmp_path / "1", 0) is None
    with pytest.raises(StoreError, match="has the settings of an earlier sweep"), sweep.unannounced(tmp_path / "1"):
        pass


def test_a_job_that_its_sweep_has_not_recorded_does_not_run(tmp_path: Path) -> None:
    with (
        announced(tmp_path, planned(tmp_path / "a"), outlive=False),
        pytest.raises(StoreError, match=r"sweep\.json has no job 1, which this process runs; move it away"),
    ):
        sweep.submitted(tmp_path, 1)


def test_settings_that_no_job_could_read_are_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LARGE", 1000)
    with (
        pytest.raises(StoreError, match=r"settings of all jobs .* are larger than .* run it as several sweeps"),
        announced(tmp_path / "1", planned(tmp_path / "a"), outlive=True),
    ):
        pass
    assert not (tmp_path / "1" / "sweep.json").exists()


def test_the_error_of_a_job_shows_no_secret_to_later_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qk_sniffer.text._hidden", ())
    hide_in_address("https://me:a-password@host/a-token")
    found = Status.of(0, planned(tmp_path / "a")[0].config, state=job_status.RUNNING)
    found.fail("RuntimeError: https://me:a-password@host/a-token\x1b")
    assert found.error == "RuntimeError: https://***@host/***\\x1b"


def test_a_job_that_dies_is_interrupted(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from qk_sniffer.config import from_dict
from qk_sniffer.resolved import resolve
from qk_sniffer.jobs.job_status import Status, recorded, recorded_status
config = resolve(from_dict({{"model": {{"name": "org/m"}}, "output": {{"data_root": {str(tmp_path / "a")!r}}}}}))
with recorded(Status.here(0, config), Path({str(tmp_path)!r})):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (line,) = look(tmp_path)
    assert (line.status.state, line.status.code) == ("interrupted", 1)
    assert "a: ended without a message" in table([line])


@pytest.mark.parametrize("count", ["", "a", "-1", "1e3", "9" * 30, "\u0663"])
def test_odd_variables_of_slurm_count_as_none(count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    found = Status.here(0, planned(tmp_path / "a")[0].config)
    assert (found.restarts, found.slurm_job_id, restart_patience_s()) == (0, None, 0.0)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0 --all")
    assert Status.here(0, planned(tmp_path / "a")[0].config).slurm_job_id is None
