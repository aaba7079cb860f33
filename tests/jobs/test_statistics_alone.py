"""A dataset of statistics without rows: what the programs say of it."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.jobs import TEXTS, captured_only, run
from support.plasticity_cases import measure
from support.verify_cases import verified, wrong

from qk_sniffer.errors import StoreError
from qk_sniffer.jobs.finalize import finalize
from qk_sniffer.status import Settings, show

SECTIONS: dict[str, Any] = {
    "sampler": {"type": "none"},
    "capture": {"statistics": {"enabled": True, "stages": ["pre"]}},
}


def test_the_job_says_how_to_read_them(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(checkpoint, texts, tmp_path / "out", **SECTIONS)
    said = capsys.readouterr().out
    assert "sampler=none keeps no rows: the dataset has statistics.\n" in said
    assert "base_rate" not in said and "pandas" not in said
    code = re.sub("^  ", "", said.partition("Read them in Python:\n")[2], flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    assert set(names["statistics"].count) == {sum(map(len, TEXTS))}


def test_status_finalize_and_verify_say_that_it_is_done(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    captured_only(checkpoint, texts, root, monkeypatch, **SECTIONS)
    assert show(Settings(root)) == 0 and "24" in capsys.readouterr().out
    assert finalize(root, prove=False) == 0
    assert finalize(root, prove=False) == 0
    assert "Nothing to do: the dataset is finished." in capsys.readouterr().out
    assert show(Settings(root)) == 0 and re.search(r" done +24 ", capsys.readouterr().out)
    report = verified(root)
    assert wrong(report) == {} and "expected" not in report
    assert report.splitlines()[-1].startswith("whole: 18 heads, 0 rows, ")


def test_statistics_without_a_token_are_told(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = {"layers": [0], "statistics": {"enabled": True, "skip_tokens": 1000}}
    root = run(checkpoint, texts, tmp_path / "out", sampler={"type": "none"}, capture=capture)
    said = capsys.readouterr().out
    assert "\nThe statistics have no token: set a smaller capture.statistics.skip_tokens.\n" in said
    assert "Not proven: the statistics have no token; " in said
    assert wrong(verified(root)) == {}


@pytest.mark.parametrize("sampler", [{"type": "none"}, {"type": "none", "keys": {"type": "all"}}])
def test_plasticity_needs_rows(sampler: dict[str, Any], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    root = run(checkpoint, texts, tmp_path / "out", **SECTIONS | {"sampler": sampler, "verify": {"examples": 0}})
    with pytest.raises(StoreError, match="captured with sampler=none, which keeps no rows: plasticity needs queries"):
        measure(root, tmp_path / "results")
