"""`python -m qk_sniffer.status` reads the states of datasets and jobs from the files below a folder."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.jobs import Stopped, run, settings
from support.status_cases import begin, planned, states
from support.store_cases import Captured, make_dataset

from qk_sniffer.cli import app
from qk_sniffer.config import ShardConfig, from_dict
from qk_sniffer.errors import StoreError
from qk_sniffer.jobs import sweep
from qk_sniffer.jobs.job_status import Status, recorded
from qk_sniffer.jobs.status import look, table
from qk_sniffer.jobs.sweep import PlannedJob, announced
from qk_sniffer.resolved import resolve
from qk_sniffer.store.disk import sha256_of
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import hold


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


def test_an_error_of_several_lines_is_one_in_the_table_and_whole_in_json_and_the_log(tmp_path: Path) -> None:
    error = StoreError("a holds a dataset of another configuration:", "  - sampler.seed: 0 there, 3 now", "Give ...")
    (job,) = planned(tmp_path / "a")
    found = Status.here(0, job.config)
    with recorded(found, tmp_path):
        found.began = True
        found.fail(str(error))
    log = tmp_path / "qk_sniffer.log"
    log.touch()
    (line,) = look(tmp_path)
    assert (line.to_dict()["error"], line.log) == (str(error), str(log))
    assert table([line]).splitlines()[2:] == [
        f"{tmp_path}/a: a holds a dataset of another configuration: sampler.seed: 0 there, 3 now ...",
        f"  log: {log}",
    ]


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
