"""`python -m qk_sniffer.heads` ranks heads by means over the rows of attention summaries, and draws a map of them."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

import qk_sniffer
from qk_sniffer import heads
from qk_sniffer.dataset.head_scores import RANKED, SCORES, Ranges, head_scores, ranges_of
from qk_sniffer.drawing.draw import draw, drawable
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.plasticity.results import Results

SECTIONS: dict[str, Any] = {
    "capture": {"attention": {"enabled": True, "top_k": 5, "sink_tokens": 3}, "heads": [0, 1, 3]},
    "sampler": {"type": "uniform", "base_rate": 4.0},
    "inference": {"batch_size": 1},
    "verify": {"examples": 0},
}
RANGES = Ranges(local_distance=3, far_distance=15, sink_tokens=3)


@pytest.fixture(scope="module")
def whole(undisturbed: Callable[..., Path]) -> Path:
    """The dataset of a job with attention summaries; read-only."""
    return undisturbed(**SECTIONS)


def by_hand(root: Path, layer: int, head: int) -> dict[str, tuple[float, float]]:
    """The mean and standard error of each score, from the rows of the file."""
    rows = pq.read_table(root / f"l{layer:02d}h{head:02d}a/data.parquet").to_pylist()
    values: dict[str, list[tuple[int, float]]] = {name: [] for name in SCORES}
    for row in rows:
        if row["position"] < 17:  # the first tokens are those at 0, 1 and 2, and distant ones are 15 tokens away
            continue
        listed = dict(zip(row["top_position"], row["top_weight"], strict=True))
        of_row = {
            "sink": row["first_mass"],
            "local": sum(row["distance_mass"][:2]),  # distances 0, and 1 and 2
            "long_range": sum(row["distance_mass"][4:]) - row["first_mass"],
            "previous": listed.get(row["position"] - 1, 0.0),
            "learned_sink": row["sink_weight"],
            "entropy": row["entropy"],
            "effective_keys": row["effective_keys"],
        }
        for name, value in of_row.items():
            values[name].append((row["example_id"], max(value, 0.0)))
    found = {}
    for name, pairs in values.items():
        middle = mean(value for _, value in pairs)
        sums: dict[int, float] = {}
        for example, value in pairs:
            sums[example] = sums.get(example, 0.0) + value - middle
        groups = len(sums)
        variance = groups / (groups - 1) * sum(each**2 for each in sums.values())
        found[name] = middle, math.sqrt(variance) / len(pairs)
    return found


@pytest.mark.slow
def test_scores_are_means_over_rows_with_errors_by_example(whole: Path) -> None:
    table = head_scores(qk_sniffer.open_dataset(whole), RANGES)
    rows = table.to_pylist()
    assert [(row["layer"], row["head"], row["key_head"]) for row in rows] == [
        (layer, head, head // 2) for layer in range(3) for head in (0, 1, 3)
    ]
    assert [row["sliding_window"] for row in rows[::3]] == [12, None, 12]
    for row in rows:
        if row["sliding_window"] is not None:
            assert row["sink"] == row["long_range"] == 0, "keys that a window hides"
            continue
        for name, (middle, error) in by_hand(whole, row["layer"], row["head"]).items():
            assert row[name] == pytest.approx(middle, rel=1e-5, abs=1e-6)
            assert row[f"{name}_error"] == pytest.approx(error, rel=1e-4, abs=1e-6)
    for name in RANKED:
        ordered = sorted(rows, key=lambda row: row[f"{name}_rank"])
        assert [row[f"{name}_rank"] for row in ordered] == list(range(1, 10))
        assert [row[name] for row in ordered] == sorted((row[name] for row in rows), reverse=True)


def test_distances_that_the_summaries_do_not_have_are_refused(whole: Path) -> None:
    dataset = qk_sniffer.open_dataset(whole)
    with pytest.raises(ConfigError) as refused:
        head_scores(dataset, Ranges(64, 0, 3))
    assert ["local_distance is 64" in refused.value.problems[0], "set it to 63" in refused.value.problems[0]] == [
        True
    ] * 2
    assert "far_distance is 0" in refused.value.problems[1] and "set it to 1" in refused.value.problems[1]
    with pytest.raises(ConfigError, match="local_distance is 31, above far_distance, 15"):
        head_scores(dataset, Ranges(31, 15, 3))
    with pytest.raises(StoreError, match="no query at a position from 513 on: lower far_distance"):
        head_scores(dataset, Ranges(63, 511, 3))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["heads", *arguments])
    return heads.main()


@pytest.mark.slow
def test_the_program_writes_tables_and_a_map(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    arguments = [f"data_root={whole}", f"output_dir={out}", "local_distance=3", "far_distance=15"]
    assert run(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "9 query heads; queries at positions from 17 on." in said
    assert f"Written: {out}/heads.csv, heads.parquet, heads.png, heads.svg" in said
    table = pq.read_table(out / "heads.parquet")
    assert table.equals(head_scores(qk_sniffer.open_dataset(whole), RANGES))
    (first,) = (row for row in table.to_pylist() if row["sink_rank"] == 1)
    assert f"weight of the first tokens: l{first['layer']:02d}h{first['head']:02d} {first['sink']:.3f}, " in said
    csv = pa_csv.read_csv(out / "heads.csv")
    assert csv.column_names == table.column_names and csv["sink"].to_pylist() == table["sink"].to_pylist()
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "not captured" in before["heads.svg"].decode() and "weight of close keys" in before["heads.svg"].decode()
    assert run(monkeypatch, *arguments) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_cannot_be_ranked_is_an_error_with_the_way_out(
    whole: Path, verify_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"data_root={verify_base}") == 1
    assert "has no attention summaries: capture.attention.enabled=true makes them" in capsys.readouterr().err
    assert run(monkeypatch, f"data_root={whole}", "far_distance=500") == 2
    assert "far_distance is 500" in capsys.readouterr().err
    assert run(monkeypatch, f"data_root={whole}", f"output_dir={whole}", "far_distance=15", "local_distance=3") == 1
    assert "holds something else (" in (said := capsys.readouterr().err) and "choose another output_dir" in said


@pytest.mark.slow
def test_files_of_others_are_not_replaced_and_two_programs_do_not_meet(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"data_root={whole}", "local_distance=3", "far_distance=15"]
    for number, (name, text) in enumerate({"heads.csv": "name,size\n", "heads.png": "mine", "notes.txt": ""}.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(text)
        assert run(monkeypatch, *arguments, f"output_dir={folder}") == 1
        assert f"{folder} holds something else ({name}); choose another output_dir" in capsys.readouterr().err
        assert {path.name: path.read_text() for path in folder.iterdir()} == {name: text}
    out = tmp_path / "out"
    out.mkdir()
    (out / f".heads.csv-{'0' * 16}.tmp").write_text('"layer"')  # of a start that was killed
    assert run(monkeypatch, *arguments, f"output_dir={out}") == 0
    (out / "notes.txt").write_text("mine")
    assert run(monkeypatch, *arguments, f"output_dir={out}") == 0 and (out / "notes.txt").read_text() == "mine"
    for name in ("heads.parquet", "heads.svg", ".lock"):
        own = (out / name).read_bytes() if name != ".lock" else None
        (out / name).write_text("mine")
        assert run(monkeypatch, *arguments, f"output_dir={out}") == 1
        assert f"{out / name} " in (said := capsys.readouterr().err) and "is not replaced" in said
        assert (out / name).read_text() == "mine"
        (out / name).write_bytes(own) if own is not None else (out / name).unlink()
    with Results(tmp_path / "claimed").claim():
        assert run(monkeypatch, *arguments, f"output_dir={tmp_path / 'claimed'}") == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'claimed'} is in use: " in said and "is ranking heads. Two programs cannot write one" in said
    for place in (whole / "l00h00q" / "x", whole / "pictures"):
        assert run(monkeypatch, *arguments, f"output_dir={place}") == 1
        assert f"where the dataset at {whole} has its own files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_draws_the_maps_with_distances_that_fit_its_texts(whole: Path, tmp_path: Path) -> None:
    """The longest text has 112 tokens: queries of its second half see distant keys, 31 tokens away and more."""
    dataset = qk_sniffer.open_dataset(whole)
    assert dataset.manifest["longest_example"] == 112
    assert ranges_of(dataset) == Ranges(local_distance=3, far_distance=31, sink_tokens=3)
    pictures = drawable(dataset)
    assert [*pictures] == ["attention"] and draw(pictures, tmp_path) == ["attention"]
    assert {path.name for path in tmp_path.iterdir()} == {"attention.png", "attention.svg"}
    assert "close: below 3; distant: 31 and more" in (tmp_path / "attention.svg").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qk_sniffer.drawing.head_scores.ranges_of", lambda _: Ranges(63, 511, 3))
        assert draw(pictures, tmp_path / "of-short-texts") == [], "no query is far enough from the start"
