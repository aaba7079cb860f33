"""`python -m qk_sniffer.status` as a program: its table, its settings, and what it cannot read."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.slurm_commands import Commands
from support.status_cases import begin, job_of, planned

from qk_sniffer import status
from qk_sniffer.cli import program
from qk_sniffer.config import ShardConfig
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.jobs import job_status, sweep
from qk_sniffer.jobs.job_status import Status
from qk_sniffer.jobs.status import Line, look, table
from qk_sniffer.jobs.sweep import announced
from qk_sniffer.status import Settings, show


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


def test_a_narrow_table_leaves_out_what_is_least_useful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [tmp_path / "outputs" / name for name in ("pydoc-tiny-pydoc", "qwen3-8b-pydoc")]
    made, running = (Status.here(number, job.config) for number, job in enumerate(planned(*names)))
    made.state, made.seconds, made.host = "done", 4000.0, "login-node-1"
    running.state, running.seconds, running.host = "running", 400.0, "gpu-7"
    done = Line(made, 60, rows=11_968)
    header, _ = table([done], 64).splitlines()
    assert "time" in header and "where" not in header, "the host of a finished dataset is of no more use"
    lines = [done, Line(running, 12, 60, 12_345.0, 3700.0, 96_789)]
    shown = table(lines, 85).splitlines()
    assert len(shown) == 3 and max(map(len, shown)) <= 85 and "time" not in shown[0]
    assert shown[2].endswith("gpu-7") and "login-node-1" not in shown[1]
    assert "login-node-1" in table(lines, 200) and "1:06:40" in table(lines)
    shown = table(lines, 80).splitlines()
    assert shown[2].endswith("gpu-7") and len(shown) == 3 and max(map(len, shown)) <= 80 and "tokens/s" not in shown[0]
    shown = table(lines, 60).splitlines()
    assert shown[-1] == "outputs/qwen3-8b-pydoc: gpu-7" and "login-node-1" not in "".join(shown)


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
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file is not a folder"):
        show(Settings(tmp_path / "file"))
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
