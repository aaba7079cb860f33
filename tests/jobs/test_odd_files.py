"""Odd files of sweeps, statuses, locks and snapshots end in one clear error, or are named and left out."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qk_sniffer.config import MOST_SHARDS, Config, DatasetConfig, ModelConfig, OutputConfig, ShardConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.branch import Branch
from qk_sniffer.jobs import hub_resume, job_status, sweep
from qk_sniffer.jobs.job_status import Status
from qk_sniffer.jobs.status import look
from qk_sniffer.jobs.sweep import PlannedJob, announced
from qk_sniffer.resolved import resolve
from qk_sniffer.status import Settings, show
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import Holder, holder
from qk_sniffer.validation import problems


def job(root: Path, number: int = 0) -> PlannedJob:
    config = Config(model=ModelConfig(name="org/m"), output=OutputConfig(data_root=str(root)))
    return PlannedJob(number, (), resolve(config))


def status_file(folder: Path, root: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    found = Status.of(0, job(root).config, state="failed")
    found.began = True
    found.write(folder)
    file = folder / job_status.STATUS_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shard_count": 1e9}, "Expected `int`, got `float` - at `$.shard_count`"),
        ({"shard_count": 10**9}, "Expected `int` <= 100000"),
        ({"since": float("nan")}, "Expected `float` >= 0.0"),
        ({"seconds": 1e300}, "Expected `float` <= 1000000000000.0"),
        ({"data_root": "a\0b"}, "at `$.data_root`"),
        ({"data_root": ["x"]}, "Expected `str`, got `array`"),
        ({"state": "\x1b[31m"}, "at `$.state`"),
        ({"slurm_job_id": "1,2 --all"}, "at `$.slurm_job_id`"),
        ({"number": None}, "Expected `int`, got `null`"),
    ],
)
def test_an_odd_status_is_named_and_the_others_are_shown(
    changes: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status_file(tmp_path / "good", tmp_path / "a")
    file = status_file(tmp_path / "odd", tmp_path / "b", **changes)
    assert show(Settings(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "  failed\n" in shown.out and problem in shown.err
    assert shown.err.startswith(f"left out: {file} is not understood") and shown.err.count("\n") == 1
    assert show(Settings(tmp_path, format="json")) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["data_root"] == str(tmp_path / "a")


def test_other_things_of_the_name_of_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "0" / job_status.STATUS_FILE).symlink_to(status_file(tmp_path / "good", tmp_path / "a"))
    os.mkfifo(tmp_path / "1" / job_status.STATUS_FILE)
    (tmp_path / "2" / sweep.SWEEP_FILE).symlink_to("sweep.json")
    (tmp_path / "3" / job_status.STATUS_FILE).mkdir()
    assert len(look(tmp_path)) == 1
    assert show(Settings(tmp_path)) == 0
    told = capsys.readouterr().err
    assert "is a link, which is not followed" in told and "is not a file" in told
    assert len(sweep.statuses(tmp_path)) == 1


def test_a_data_root_that_no_file_can_have_is_shown(tmp_path: Path) -> None:
    status_file(tmp_path / "1", tmp_path / ("x" * 300))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    status_file(tmp_path / "2", loop, state="done")
    assert [line.status.state for line in look(tmp_path)] == ["failed"]


def test_datasets_and_jobs_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job" / ".qk_sniffer").mkdir(parents=True)
    (tmp_path / "job" / ".qk_sniffer" / "job.json").write_text('{"config": {"shard": {"count": 1e9}}}')
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "manifest.json").write_text('{"format": "qk-sniffer/1"}')
    assert show(Settings(tmp_path)) == 0
    told = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[2] for line in told) == [
        str(tmp_path / "dataset" / "manifest.json"),
        str(tmp_path / "job" / ".qk_sniffer" / "job.json"),
    ]


@pytest.mark.slow
def test_a_job_does_not_take_the_settings_of_another_sweep(tmp_path: Path) -> None:
    """Its command was killed while it started, and another sweep took the folder."""
    read = f"from pathlib import Path; from qk_sniffer.jobs import sweep; sweep.submitted(Path({str(tmp_path)!r}), 0)"

    def start(environment: dict[str, str]) -> str:
        return subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True).stderr

    with announced(tmp_path, [job(tmp_path / "a")], outlive=False):
        first = dict(os.environ)
        assert start(first) == ""
    with announced(tmp_path, [job(tmp_path / "b")], outlive=False):
        second = dict(os.environ)
        assert start(second) == ""
        said = "sweep.json was removed or is that of another sweep: the settings of job 0 are gone"
        assert said in start(first)
        (tmp_path / sweep.SWEEP_FILE).unlink()
        assert said in start(second)
    assert dict(os.environ) == {name: value for name, value in second.items() if second.get(name) == first.get(name)}


def test_an_odd_sweep_ends_its_jobs_with_its_name(tmp_path: Path) -> None:
    with announced(tmp_path, [job(tmp_path / "a")], outlive=False):
        pass
    assert sweep.submitted(tmp_path, 0) == job(tmp_path / "a").config
    assert sweep.submitted(tmp_path, 1) is None
    assert sweep.submitted(tmp_path / "none", 0) is None
    file = tmp_path / sweep.SWEEP_FILE
    facts = json.loads(file.read_text())
    for key, value in (("seed", "${oc.env:HF_TOKEN}"), ("unknown", 1)):
        facts["jobs"][0]["config"]["sampler"] = {key: value}
        file.write_text(json.dumps(facts))
        with pytest.raises(
            StoreError, match=r"sweep\.json is not understood \(config of job 0: .*start the sweep again"
        ):
            sweep.submitted(tmp_path, 0)
    file.write_text("{")
    with pytest.raises(StoreError, match=r"sweep\.json is not JSON"):
        sweep.submitted(tmp_path, 0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1e99, "host": 1, "slurm_job_id": {}}', '{"pid": 1, "host": "a"}']
)
def test_an_odd_lock_file_names_no_holder(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    file.write_text(text)
    assert holder(file) is None
    file.write_text('{"pid": 1, "host": "a", "slurm_job_id": null}')
    assert holder(file) == Holder(1, "a", None)
    assert holder(tmp_path / "none.lock") is None and holder(tmp_path) is None


def test_an_odd_snapshot_matches_nothing_and_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout, branch = Layout(tmp_path), Branch("me/my", "b", "c" * 40)
    hub_resume.write_snapshot(layout, branch)
    assert hub_resume.matches_snapshot(layout, branch)
    for text in ("", "[]", "[" * 100_000, '{"repo_id": 1}', "null"):
        layout.snapshot.write_text(text)
        assert not hub_resume.matches_snapshot(layout, branch)
        assert ".sniff_snapshot.json is not" in caplog.text
        hub_resume.write_snapshot(layout, branch)
        assert hub_resume.matches_snapshot(layout, branch)


def test_there_is_a_largest_number_of_shards() -> None:
    good = Config(model=ModelConfig(name="org/m"), dataset=DatasetConfig(path="org/texts"))
    assert problems(replace(good, shard=ShardConfig(0, MOST_SHARDS))) == []
    assert problems(replace(good, shard=ShardConfig(0, 10**9))) == ["shard.count is 1000000000; it must be 1 to 100000"]
