"""`dry_run=measure` tells the time of a job, and leaves no trace."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.jobs import captured_only, settings

from qk_sniffer.capture.capture import Capture
from qk_sniffer.capture.forward_cost import ForwardCost, LayerCost
from qk_sniffer.cli.app import main
from qk_sniffer.config import from_dict
from qk_sniffer.corpus.batches import Window
from qk_sniffer.jobs import dry_run
from qk_sniffer.jobs.estimate import MOST_SAMPLED, Batches, duration, fit, line_through
from qk_sniffer.jobs.measure import Measured, _folder, measure
from qk_sniffer.jobs.signals import Stopped

EVERYTHING: dict[str, Any] = {
    "model": {"tokenizer": {"overlong": "split", "max_length": 32}},
    "capture": {
        "capture_values": True,
        "capture_outputs": True,
        "capture_token_ids": True,
        "attention": {"enabled": True, "top_k": 4},
        "statistics": {"enabled": True, "stages": ["pre", "post"]},
    },
    "sampler": {"type": "uniform", "base_rate": 8},
    "shard": {"index": 1, "count": 2},
    "inference": {"batch_size": 3},
}
COST = ForwardCost(1000, (LayerCost(0, 2, 8, None), LayerCost(1, 2, 8, 16)))


def measured(checkpoint: Path, texts: Path, root: Path, **sections: Any) -> Measured | None:
    """What the dry run measures; None if it measures nothing."""
    found: list[Measured | None] = [None]

    def spy(*given: Any) -> Measured | None:
        found[0] = measure(*given)
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "measure", spy)
        dry_run.show_plan(from_dict(settings(checkpoint, texts, root, **sections) | {"dry_run": "measure"}))
    return found[0]


def files_in(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, EVERYTHING], ids=["rows", "everything"])
def test_it_tells_each_stage_and_leaves_nothing(
    sections: dict[str, Any], checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(tmp_path)
    found = measured(checkpoint, texts, tmp_path / "root", **sections)
    assert files_in(tmp_path) == before
    assert found is not None and found.batches >= 1
    assert all(found.seconds[name] > 0 for name in ("tokenize", "capture", "compact", "verify", "others"))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first one has the path
    assert f"{found.batches} of {found.batches} batches" in " ".join(out.split())  # the job has few
    assert [line.split()[0] for line in lines if line.endswith(duration(found.total))] == ["together"]
    assert ("left out" in out) == ("shard" in sections)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_either(
    number: signal.Signals, checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = files_in(tmp_path), Capture.run
    during: list[Path] = []

    def interrupted(self: Capture, plan: Any) -> None:
        real(self, plan)
        during.extend(tmp_path.glob(".qk-sniffer-measure-*/*"))
        signal.raise_signal(number)

    monkeypatch.setattr(Capture, "run", interrupted)
    with pytest.raises(Stopped):
        measured(checkpoint, texts, tmp_path / "root")
    assert during and files_in(tmp_path) == before


def test_a_folder_that_takes_the_place_of_the_measured_one_keeps_its_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    with _folder(tmp_path / "root") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "one").mkdir()
        folder.rename(tmp_path / "aside")
        mine.rename(folder)
    assert (folder / "thesis").read_text() == "mine" and not (tmp_path / "aside" / "one").exists()


def test_a_job_with_no_text_left(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    captured_only(checkpoint, texts, tmp_path / "root", monkeypatch)
    assert measured(checkpoint, texts, tmp_path / "root") is None
    assert "none: all texts are captured" in capsys.readouterr().out


@pytest.mark.slow
def test_each_job_of_a_sweep_is_measured(
    checkpoint: Path, texts: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model=hf", f"model.name={checkpoint}", "model.dtype=float32", "dataset=hf", f"dataset.path={texts}"]
    names = "output.data_root=${model.slug}-${sampler.seed}"
    before = files_in(in_tmp)
    monkeypatch.setattr("sys.argv", ["qk_sniffer", "-m", *given, "sampler.seed=0,1", "dry_run=measure", names])
    assert main() == 0
    assert capsys.readouterr().out.count("measured ") == 2
    assert files_in(in_tmp) == before


def batch_of(*lengths: int) -> Any:
    return [SimpleNamespace(num_tokens=length) for length in lengths]


def test_the_terms_of_a_batch_have_its_padding() -> None:
    batches = Batches(COST)
    attention = 5 * 4 * 2 * 8 * (40 * 20 + 16 * 32)
    assert batches.terms_of(batch_of(40, 38, 37, 36, 35)) == pytest.approx((1, 200, attention / 1e9))
    assert batches.flops_of(batches.terms_of(batch_of(40))) == pytest.approx(float(COST.flops(40)))


def test_the_sample_has_the_largest_batch_and_spaced_ones() -> None:
    batches = Batches(COST)
    lengths = [1 + at % 50 for at in range(1000)]
    lengths[777] = 90
    list(batches.noted([Window([1], [batch_of(length) for length in lengths], 1)]))
    sample = [batch[0].num_tokens for batch in batches.sample()]
    assert sample[0] == 90 and sample[1] == 1 and MOST_SAMPLED // 2 < len(sample) <= MOST_SAMPLED
    assert batches.terms[:, 1].tolist() == lengths
    assert np.mean(sample) == pytest.approx(np.mean(lengths), rel=0.1)


def test_the_fit_finds_the_seconds_of_each_term() -> None:
    terms = np.array([[1, tokens, tokens**2 / 1e6] for tokens in (50, 400, 1000, 3000, 8000)], np.float64)
    for seconds in ([0.1, 1e-4, 0.03], [0.0, 2e-4, 0.0], [0.2, 0.0, 0.01]):
        assert fit(terms, (terms @ seconds).tolist()) == pytest.approx(seconds, abs=1e-9)
    falling = fit(terms, [5.0, 4.0, 3.0, 2.0, 1.0])
    assert (falling >= 0).all() and falling.any()


def test_the_line_through_two_sizes() -> None:
    assert line_through((100, 2.0), (300, 3.0), 1000) == pytest.approx(6.5)
    assert line_through((100, 2.0), (300, 1.0), 1000) == 1.0
    assert line_through((100, 2.0), (100, 3.0), 1000) == 3.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.21, "4.2 s"), (85, "85 s"), (700, "12 min"), (12_240, "3.4 h"), (400_000, "4.6 days")],
)
def test_a_duration_has_few_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
