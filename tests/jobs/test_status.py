"""`python -m qk_sniffer.status` reads the states of datasets and jobs from the files below a folder."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Stopped, run, settings
from support.slurm_commands import Commands
from support.store_cases import Captured, make_dataset

from qk_sniffer import status
from qk_sniffer.cli import app, program
from qk_sniffer.config import Config, ShardConfig, from_dict
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.jobs import job_status, signals, sweep
from qk_sniffer.jobs.job_status import Status, recorded, recorded_status
from qk_sniffer.jobs.status import Line, look, table
from qk_sniffer.jobs.sweep import PlannedJob, announced
from qk_sniffer.resolved import resolve
from qk_sniffer.status import Settings, show
from qk_sniffer.store.disk import sha256_of
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import hold, restart_patience_s
from qk_sniffer.text import hide_in_address


def planned(*roots: Path) -> list[PlannedJob]:
    configs = (resolve(from_dict({"model": {"name": "org/m"}, "output": {"data_root": str(root)}})) for root in roots)
    return [PlannedJob(number, (), config) for number, config in enumerate(configs)]


def states(folder: Path) -> dict[str, str]:
    return {Path(line.status.data_root).name: line.status.state for line in look(folder)}


def begin(folder: Path, config: Config, number: int = 0) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return recorded(Status.here(number, config), folder)


def test_a_sweep_from_beginning_to_end(tmp_path: Path) -> None:
    folder, jobs = tmp_path / ".sweeps" / "1", planned(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    (tmp_path / "b").mkdir()
    with announced(folder, jobs, outlive=False):
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


def test_a_job_that_dies_has_failed(tmp_path: Path) -> None:
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
    assert line.status.state == "failed" and "ended without a message" in str(line.status.error)
    assert "a: ended without a message" in table([line])


@pytest.mark.parametrize("count", ["", "a", "-1", "1e3", "9" * 30, "\u0663"])
def test_odd_variables_of_slurm_count_as_none(count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    found = Status.here(0, planned(tmp_path / "a")[0].config)
    assert (found.restarts, found.slurm_job_id, restart_patience_s()) == (0, None, 0.0)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0 --all")
    assert Status.here(0, planned(tmp_path / "a")[0].config).slurm_job_id is None


def test_the_last_job_of_a_dataset_and_shard_counts(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    for number, seconds in enumerate((100.0, 50.0)):
        found = Status.here(0, job.config)
        found.since -= seconds
        found.began = True
        (tmp_path / str(number)).mkdir()
        with recorded(found, tmp_path / str(number)):
            found.fail("no room" if number else "no luck")
    for index in range(2):
        found = Status.here(0, replace(job.config, shard=ShardConfig(index, 2)))
        found.began = True
        (tmp_path / f"shard{index}").mkdir()
        with recorded(found, tmp_path / f"shard{index}"):
            found.fail("no memory")
    said = [(line.status.shard_count, line.status.shard_index, line.status.error) for line in look(tmp_path)]
    assert sorted(said, key=str) == [(1, 0, "no room"), (2, 0, "no memory"), (2, 1, "no memory")]


def test_a_command_that_finds_a_dataset_finished_changes_no_time(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    make_dataset(tmp_path / "a", Captured(num_examples=4))
    digest = sha256_of(tmp_path / "a" / "manifest.json")
    for number, seconds in enumerate((90.0, 2.0)):
        found = Status.here(number, job.config)
        found.since -= 100.0 - 95 * number
        found.seconds = seconds
        found.succeed(7, None, digest)
        (tmp_path / str(number)).mkdir()
        found.write(tmp_path / str(number))
    (line,) = look(tmp_path)
    assert (line.status.state, line.status.seconds) == ("done", 90.0)
    assert "01:30" in table([line])


def test_a_job_that_never_started_says_nothing_of_the_one_before_it(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    found = Status.here(0, job.config)
    (tmp_path / "0").mkdir()
    make_dataset(tmp_path / "a", Captured(num_examples=4))
    with recorded(found, tmp_path / "0"):
        found.succeed(7, "https://hub/a", sha256_of(tmp_path / "a" / "manifest.json"))
    with pytest.raises(Stopped), announced(tmp_path / "1", [job], outlive=False):
        raise Stopped
    assert states(tmp_path) == {"a": "published"}


def test_what_runs_counts_more_than_what_was_refused_or_waits(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    make_dataset(tmp_path / "a", Captured(num_examples=4))
    found = Status.here(0, job.config)
    (tmp_path / "0").mkdir()
    with recorded(found, tmp_path / "0"):
        with begin(tmp_path / "1", job.config):
            pass
        with announced(tmp_path / "2", [job], outlive=True):
            assert states(tmp_path) == {"a": "running"}
        found.succeed(7, "https://hub/a", sha256_of(tmp_path / "a" / "manifest.json"))
    assert states(tmp_path) == {"a": "published"}


def test_a_job_that_failed_is_done_where_another_finished_its_dataset(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    jobs = planned(tmp_path / "a")
    found = Status.here(0, jobs[0].config)
    found.began = True
    (tmp_path / "0").mkdir()
    with recorded(found, tmp_path / "0"):
        found.fail("no memory")
    assert states(tmp_path) == {"a": "failed"}
    run(checkpoint, texts, tmp_path / "a")
    (line,) = look(tmp_path)
    assert (line.status.state, line.last_attempt, line.examples) == ("done", None, 24)
    found.since = time.time()
    with recorded(found, tmp_path / "0"):
        found.fail("the Hub is down")
    (line,) = look(tmp_path)
    assert (line.status.state, line.status.error) == ("done", None), "the dataset is whole"
    assert (line.last_attempt, line.last_error) == ("failed", "the Hub is down")
    shown = table([line]).splitlines()
    assert shown[0].endswith("last attempt") and shown[1].endswith("  failed")
    assert shown[2].endswith("a: failed: the Hub is down")


def test_a_job_that_is_refused_changes_the_state_of_nothing(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """Each was "failed" before, with the error of a command that never touched it."""
    whole = run(checkpoint, texts, tmp_path / "whole")
    half = run(checkpoint, texts, tmp_path / "half", shard={"index": 1, "count": 2})
    for number, root in enumerate((whole, half, tmp_path / "none")):
        values = settings(checkpoint, texts, root, sampler={"seed": 7})
        if root.name == "none":
            values["dataset"]["path"] = str(tmp_path / "mistake.jsonl")
        config = resolve(from_dict(values))
        found = Status.here(number, config)
        (tmp_path / ".runs" / str(number)).mkdir(parents=True)
        with recorded(found, tmp_path / ".runs" / str(number)) as record:
            app._run_job(config, found, record)
        assert (found.state, found.began) == ("failed", False)
    lines = {(Path(line.status.data_root).name, line.status.shard_index): line for line in look(tmp_path)}
    assert {key: (line.status.state, line.last_attempt) for key, line in lines.items()} == {
        ("half", 0): ("not started", "refused"),
        ("half", 1): ("done", None),
        ("whole", 0): ("done", "refused"),
    }, "a mistake leaves no entry"
    assert "a finished dataset of another configuration" in str(lines["whole", 0].last_error)
    assert lines["whole", 0].status.error is None
    facts = lines["whole", 0].to_dict()
    assert facts["last_attempt"] == "refused" and facts["last_error"] == lines["whole", 0].last_error
    config = resolve(from_dict(settings(checkpoint, texts, whole)))
    found = Status.here(3, config)
    (tmp_path / ".runs" / "3").mkdir()
    with recorded(found, tmp_path / ".runs" / "3") as record:
        app._run_job(config, found, record)
    assert (found.state, found.began, found.manifest) == ("done", True, sha256_of(whole / "manifest.json"))
    assert {line.last_attempt for line in look(whole.parent) if line.status.data_root == str(whole)} == {None}


def test_a_sweep_shows_its_jobs_that_left_nothing(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    with announced(tmp_path / "1", [job], outlive=False):
        found = Status.here(0, job.config)
        (tmp_path / "1" / "0").mkdir()
        with recorded(found, tmp_path / "1" / "0"):
            found.fail("no such model")
    (line,) = look(tmp_path)
    assert (line.status.state, line.last_attempt, line.status.error) == ("failed", "refused", "no such model")


def test_the_state_of_an_earlier_dataset_is_not_told_of_the_one_that_replaced_it(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    layout, _ = make_dataset(tmp_path / "a", Captured(num_examples=4))
    found = Status.here(0, job.config)
    (tmp_path / "0").mkdir()
    with recorded(found, tmp_path / "0"):
        found.succeed(7, "https://hub/a", sha256_of(layout.manifest))
    (line,) = look(tmp_path)
    manifest = json.loads(layout.manifest.read_text())
    assert (line.status.state, line.status.url, line.rows) == ("published", "https://hub/a", manifest["rows"])
    shutil.rmtree(layout.root)
    make_dataset(tmp_path / "a", Captured(num_examples=5))
    (line,) = look(tmp_path)
    manifest = json.loads(layout.manifest.read_text())
    assert (line.status.state, line.status.url, line.rows) == ("done", None, manifest["rows"])
    assert line.status.model == manifest["config"]["model"]["slug"] != found.model and line.last_attempt is None


def test_the_progress_of_another_job_in_a_data_root_is_not_told_of_one_that_waits(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "a", shard={"index": 0, "count": 2})
    config = resolve(from_dict(settings(checkpoint, texts, root, model={"slug": "other"}, shard={"count": 2})))
    with announced(tmp_path / "1", [PlannedJob(0, (), config)], outlive=True):
        waits, other = look(tmp_path)
    assert (waits.status.state, waits.status.model, waits.examples) == ("queued", "other", None)
    assert (other.status.state, other.status.shard_index) == ("not started", 1)


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_fits_the_terminal(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = planned(tmp_path / "outputs" / "a-model-with-a-long-name-on-texts-with-a-long-name", tmp_path / "b")
    found = Status.here(0, replace(jobs[0].config, shard=ShardConfig(9, 10)))
    found.state, found.slurm_job_id, found.seconds = "queued", "12_0", 4000.0
    found.url = "https://huggingface.co/datasets/me/my/tree/branch"
    line = Line(found, 1_000, 100_000, 12_345.0, 3700.0, 123_456_789, "PartitionTimeLimit", "refused")
    lines = [line, Line(Status.here(1, jobs[1].config), rows=7)]
    shown = table(lines, width).splitlines()
    below = next(number for number, text in enumerate(shown) if found.url in text)
    assert f"(shard 9 of 10): {found.url}, {found.host}, SLURM 12_0" in shown[below], "where it runs is told below"
    assert max(map(len, shown[:below])) <= width < max(map(len, table(lines).splitlines()))
    names = [row.split("  ")[0] for row in shown[1:below]]
    assert "".join(names).replace(" ", "") == f"outputs/{Path(found.data_root).name}(shard9of10)b"
    for number in ("12,345", "1:01:40", "refused"):
        assert number in "".join(shown[:below])


def test_a_dataset_that_is_gone_is_not_done(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    found = Status.here(0, job.config)
    (tmp_path / "0").mkdir()
    with recorded(found, tmp_path / "0"):
        found.succeed(7, None)
    assert look(tmp_path) == []


def test_a_folder_that_is_used_again_forgets_its_last_sweep(tmp_path: Path) -> None:
    jobs = planned(tmp_path / "a")
    with announced(tmp_path / "1", jobs, outlive=False), begin(tmp_path / "1" / "0", jobs[0].config):
        pass
    with announced(tmp_path / "1", jobs, outlive=False):
        assert sweep.statuses(tmp_path / "1")[0].state == "queued"


def test_datasets_without_a_job(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    whole = run(checkpoint, texts, tmp_path / "whole")
    half = run(checkpoint, texts, tmp_path / "half", shard={"index": 1, "count": 2})
    with hold(Layout(half).shard_lock(0, 2), "capturing"):
        lines = {(Path(line.status.data_root).name, line.status.shard_index): line for line in look(tmp_path)}
    assert {key: line.status.state for key, line in lines.items()} == {
        ("half", 0): "running",
        ("half", 1): "done",
        ("whole", 0): "done",
    }
    assert lines["half", 1].examples == 12 and lines["half", 0].status.host
    assert lines["whole", 0].examples == 24
    assert lines["whole", 0].rows == json.loads((whole / "manifest.json").read_text())["rows"]


def test_progress_of_a_running_job(tmp_path: Path) -> None:
    (job,) = planned(tmp_path / "a")
    facts = {"examples": 120, "total": 500, "rows": 77, "tokens_per_s": 1234.4, "seconds_left": 3700.0}
    with begin(tmp_path / "1", job.config):
        file = Layout(tmp_path / "a").progress(0, 1)
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(facts | {"at": time.time()}))
        (line,) = look(tmp_path)
        shown = table([line]).splitlines()[1]
        for part in ("running", "120 of 500 (24%)", "1,234", "1:01:40", "77"):
            assert part in shown
        file.write_text(json.dumps(facts | {"at": time.time() - 100}))  # of an earlier start
        assert look(tmp_path)[0].seconds_left is None
        file.write_text("{")
        assert look(tmp_path)[0].examples is None


def test_as_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with announced(tmp_path / "outputs" / "1", planned(tmp_path / "a"), outlive=True):
        pass
    for arguments in (["outputs/"], ["folder=outputs"], []):
        monkeypatch.setattr(sys, "argv", ["status", *arguments])
        monkeypatch.chdir(tmp_path)
        assert status.main() == 0
        assert "not started" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["status", "outputs", "format=json"])
    assert status.main() == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["state"] == "not started" and found["data_root"] == str(tmp_path / "a")


def test_jobs_that_wait_on_slurm_have_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands(tmp_path / "bin", monkeypatch)
    commands.say("squeue", "12_0|PENDING|PartitionTimeLimit\n12_1|PENDING|BeginTime\n12_2|PENDING|Priority\n")
    jobs = planned(*(tmp_path / name for name in "abcd"))
    with announced(tmp_path / "1", jobs, outlive=True) as record_slurm_ids:
        assert show(Settings(tmp_path)) == 0 and commands.calls("squeue") == [], "no id is known"
        capsys.readouterr()
        record_slurm_ids(["12_0", "12_1", "12_2", "12_3"])
        with begin(tmp_path / "1" / "1", jobs[1].config, 1) as _:
            found = Status.here(1, jobs[1].config)
            found.state, found.slurm_job_id = "requeued", "12_1"
            found.write(tmp_path / "1" / "1")
            assert show(Settings(tmp_path)) == 0
            shown = capsys.readouterr().out.splitlines()
            assert show(Settings(tmp_path, format="json")) == 0
            facts = json.loads(capsys.readouterr().out)
    states = [" ".join(line.split()[1:]) for line in shown[1:5]]
    assert states[0] == "queued: PartitionTimeLimit SLURM 12_0"
    assert states[1].startswith("requeued: BeginTime ")
    assert states[2:] == ["queued: Priority SLURM 12_2", "queued SLURM 12_3"]
    (meaning,) = shown[5:]
    assert meaning.startswith("PartitionTimeLimit: the time limit is above") and "hydra.launcher.timeout_min" in meaning
    assert [(line["state"], line["reason"]) for line in facts] == [
        ("queued", "PartitionTimeLimit"),
        ("requeued", "BeginTime"),
        ("queued", "Priority"),
        ("queued", None),
    ]
    assert commands.calls("squeue") == ["--noheader --array --jobs=12 --format=%i|%T|%r"] * 2


def test_without_slurm_no_reason_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with announced(tmp_path / "1", planned(tmp_path / "a"), outlive=True) as record_slurm_ids:
        record_slurm_ids(["12_0"])
        assert show(Settings(tmp_path)) == 0
        Commands(tmp_path / "bin", monkeypatch).say("squeue", "slurm_load_jobs error: down\n", code=1)
        assert show(Settings(tmp_path)) == 0
    without, failed = capsys.readouterr().out.split("dataset")[1:]
    assert without == failed and "queued  " in without


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format is 'xml'; valid: table, json"):
        show(Settings(tmp_path, format="xml"))
    with pytest.raises(StoreError, match="does not exist"):
        show(Settings(tmp_path / "none"))
    with pytest.raises(ConfigError, match="wach is not a key"):
        program.parse(["outputs", "wach=true"], Settings)


def test_watching_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    looks = []

    def sleep(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert show(Settings(tmp_path, watch=True)) == 0
    assert capsys.readouterr().out.count("no datasets or jobs below") == 3


def test_names_are_relative_where_that_is_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with announced(tmp_path / "1", planned(tmp_path / "a"), outlive=True):
        pass
    assert str(tmp_path) in table(look(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) not in table(look(tmp_path))


def test_what_cannot_be_read_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / sweep.SWEEP_FILE).write_text("{")
    for number, text in enumerate(("[1]", '{"jobs": [1]}', '{"jobs": [{"status": {"new": 1}}]}')):
        (tmp_path / f"1-{number}").mkdir()
        (tmp_path / f"1-{number}" / sweep.SWEEP_FILE).write_text(text)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / job_status.STATUS_FILE).write_text('{"other": 1}')
    (tmp_path / "3" / ".qk_sniffer").mkdir(parents=True)
    (tmp_path / "3" / ".qk_sniffer" / "job.json").write_text("{}")
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "manifest.json").write_text('{"format": "qk-sniffer/1"}')
    assert look(tmp_path) == []


@pytest.mark.parametrize("name", [job_status.STATUS_FILE, sweep.SWEEP_FILE])
def test_a_path_that_no_file_has_is_left_out(name: str, tmp_path: Path) -> None:
    status = {"number": 0, "data_root": "\ud800", "model": "m"}
    facts = status if name == job_status.STATUS_FILE else {"outlive": False, "ended": True, "jobs": [job_of(status)]}
    (tmp_path / name).write_text(json.dumps(facts))
    left_out: list[StoreError] = []
    assert look(tmp_path, left_out.append) == [] and sweep.statuses(tmp_path) == {}
    assert [f"{tmp_path / name} has a data_root that is no path" in str(error) for error in left_out] == [True]


def job_of(status: dict[str, Any]) -> dict[str, Any]:
    return {"status": status, "config": {}}
