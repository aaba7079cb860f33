"""`python -m qk_sniffer.report` writes one page with the facts of a dataset, and replaces no file of someone else."""

import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.hostile import TERMINAL
from support.jobs import heads_of, vectors
from support.plasticity_cases import measure
from support.verify_cases import edit

import qk_sniffer
from qk_sniffer.dataset.head_vectors import HeadVectors
from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.plasticity import tables
from qk_sniffer.report import cli
from qk_sniffer.report import facts as facts_module
from qk_sniffer.report import page as pages
from qk_sniffer.report import vectors as measures
from qk_sniffer.report.coverage import coverage
from qk_sniffer.report.facts import report_facts
from qk_sniffer.report.heads import measured_heads
from qk_sniffer.report.page import MOST_BYTES, page
from qk_sniffer.report.unchanged import Unchanged
from qk_sniffer.report.vectors import Sample
from qk_sniffer.store.layout import HeadKey

DENSE: dict[str, Any] = {
    "capture": {
        "attention": {"enabled": True, "top_k": 4, "sink_tokens": 2},
        "statistics": {"enabled": True, "stages": ["pre", "post"]},
    },
    "verify": {"examples": 1},
}
SAMPLED: dict[str, Any] = {"sampler": {"type": "uniform", "base_rate": 6.0}, "verify": {"examples": 0}}


@pytest.fixture
def dense(undisturbed: Callable[..., Path]) -> Dataset:
    """A dataset with all rows, attention summaries and statistics."""
    return qk_sniffer.open_dataset(undisturbed(**DENSE))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["qk_sniffer.report", *arguments])
    return cli.main()


def rows_of(x: np.ndarray, positions: np.ndarray) -> HeadVectors:
    return HeadVectors(x, positions, np.zeros(len(x), np.int32))


def facts_of(text: str) -> dict[str, Any]:
    """Returns the facts in the block of data of a page, as a browser finds it."""
    (block,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script', text, flags=re.DOTALL)
    facts: dict[str, Any] = json.loads(block)
    return facts


def test_a_page_is_written_next_to_the_dataset(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"data_root={root}") == 0
    path = root.with_name(f"{root.name}-report.html")
    assert capsys.readouterr().out == f"Report: {path} ({path.stat().st_size / 1e6:.1f} MB)\n"
    facts = facts_of(path.read_text())
    assert (facts["place"], facts["rows"]) == (root.name, json.loads((root / "manifest.json").read_text())["rows"])
    assert "whole:" in str(verify(root))
    assert run(monkeypatch, f"data_root={root}") == 0, "its own page is replaced"
    assert [each.name for each in root.parent.iterdir() if each.is_file()] == [path.name]


@pytest.mark.parametrize("other", ["<html>mine</html>", "a link"])
def test_a_file_of_someone_else_stays(
    other: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.html"
    if other == "a link":
        (tmp_path / "target").write_text(other)
        path.symlink_to(tmp_path / "target")
    else:
        path.write_text(other)
    monkeypatch.setattr(cli, "report_facts", None)  # it is refused before the work
    assert run(monkeypatch, f"data_root={root}", f"output={path}") == 1
    assert "is not replaced" in capsys.readouterr().err
    assert path.read_text() == other


def test_a_page_next_to_a_dataset_that_others_own_may_go_elsewhere(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "report_facts", None)  # it is refused before the work
    monkeypatch.setattr(cli.os, "access", lambda folder, mode: folder != root.parent)
    assert run(monkeypatch, f"data_root={root}") == 1
    page = root.with_name(f"{root.name}-report.html")
    assert f"cannot write {page}: Permission denied. Name a file" in (said := capsys.readouterr().err)
    assert "output=report.html" in said


def test_no_page_is_written_into_a_dataset(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"data_root={root}", f"output={root}/examples/report.html") == 1
    assert "choose another output" in capsys.readouterr().err
    assert run(monkeypatch, f"data_root={root}", "output=..") == 2


def test_a_page_of_hostile_names_has_the_blocks_of_this_package_alone(root: Path) -> None:
    name = f"</script><script>alert(1)</script><!--{TERMINAL}\u2028@@style@@"

    def rename(manifest: dict[str, Any]) -> None:
        manifest["config"]["model"]["attn_implementation"] = name
        manifest["model"]["attn_implementation"] = name
        manifest["versions"] = {name: name}
        manifest["timings"] = {name: 1.0}

    edit(root, rename)
    text = page(report_facts(qk_sniffer.open_dataset(root), None)).decode()
    blocks = re.findall(r"<script([^>]*)>(.*?)</script", text, flags=re.DOTALL)
    assert [attributes for attributes, _ in blocks] == [' type="application/json" id="facts"', ""]
    assert not set("<>&\u2028") & set(blocks[0][1])
    facts = json.loads(blocks[0][1])
    (shown,) = [value for label, value in facts["about"] if label == "Attention kernel"]
    assert shown.isprintable() and shown.startswith("</script><script>alert(1)")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    for kind, content in (("style", style), ("script", blocks[1][1])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")


def test_the_rows_of_each_bucket_are_held_against_the_expected_ones(undisturbed: Callable[..., Path]) -> None:
    root = undisturbed(**SAMPLED)
    lengths = pq.read_table(root / "examples/data.parquet")["num_tokens"].to_pylist()
    queries = [table for name, table in heads_of(root).items() if name.endswith("q")]
    found = {one["kind"]: one for one in coverage(qk_sniffer.open_dataset(root))}
    for number, line in enumerate(found["q"]["buckets"]):
        tokens = sum(position // 16 == number for length in lengths for position in range(length))
        assert line["bucket"] == str(number)
        assert line["rows"] == sum(table["bucket"].to_pylist().count(number) for table in queries)
        assert line["expected"] == pytest.approx(12 * tokens * 6 / 16, rel=1e-3)
        # The four heads of a layer have the same rows.
        assert line["sd"] == pytest.approx((3 * 4**2 * tokens * 6 / 16 * 10 / 16) ** 0.5, rel=1e-3)
        assert line["is_telling"] and abs(line["rows"] - line["expected"]) < 5 * line["sd"]
    assert "limit" not in found["q"]


def test_a_bucket_of_hardly_any_expected_rows_is_not_held_against_chance(undisturbed: Callable[..., Path]) -> None:
    """One draw in a bucket where 0.02 are expected is nine standard deviations off, and no fault."""
    sampler = {"type": "uniform", "min_bucket_size": 16, "base_rate": 0.01}
    for one in coverage(qk_sniffer.open_dataset(undisturbed(sampler=sampler, verify={"examples": 0}))):
        heads_of_a_layer = 4 if one["kind"] == "q" else 2
        draws = [line["expected"] / heads_of_a_layer for line in one["buckets"]]
        assert min(draws) < 1
        assert not any(line["is_telling"] for line, number in zip(one["buckets"], draws, strict=True) if number < 9.9)


def test_all_rows_are_exactly_the_expected_ones(dense: Dataset) -> None:
    for one in coverage(dense):
        assert [line["rows"] for line in one["buckets"]] == [line["expected"] for line in one["buckets"]]
        assert {line["sd"] for line in one["buckets"]} == {0}


def test_measures_follow_from_the_rows(dense: Dataset) -> None:
    heads = measured_heads(dense, Unchanged(dense))
    tables = heads_of(dense.folder) if dense.folder is not None else {}
    assert [key.name for key in heads.measures] == [key.name for key in dense.heads]
    for key in (HeadKey(0, 1, "q"), HeadKey(2, 0, "k")):
        one, table = heads.measures[key], tables[key.name]
        x, positions = vectors(table).astype(np.float64), table["position"].to_numpy()
        norms = np.linalg.norm(x, axis=1)
        assert (one.rows, one.norm) == (len(x), pytest.approx(norms.mean()))
        assert one.norm_deviation == pytest.approx(norms.std())
        for number, (rows, mean, deviation) in enumerate(one.by_position):
            inside = norms[(positions >= 2**number - 1) & (positions < 2 ** (number + 1) - 1)]
            assert rows == len(inside)
            assert (mean, deviation) == (pytest.approx(inside.mean()), pytest.approx(inside.std(), abs=1e-9))
        assert one.rms == pytest.approx(np.sqrt((x**2).mean(axis=0)))
        assert one.largest == pytest.approx(np.abs(x).max(axis=0))
        assert one.outlier_ratio == pytest.approx(one.rms.max() / np.median(one.rms))


def test_principal_directions_are_those_of_a_singular_value_decomposition() -> None:
    random = np.random.default_rng(3)
    spread = np.array([9.0, 4.0, 1.0, 0.5])
    x = (random.standard_normal((400, 4)) * spread).astype(np.float32) + 5
    positions = np.arange(400, dtype=np.int32)
    one = measures.measured(HeadKey(0, 0, "q"), rows_of(x, positions), bins=9, points=100)
    centered = x - x.mean(axis=0)
    _, values, directions = np.linalg.svd(centered.astype(np.float64), full_matrices=False)
    assert one.direction_shares == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist())
    chosen = np.linspace(0, 399, 100).round().astype(int)
    assert one.positions.tolist() == positions[chosen].tolist()
    assert np.abs(one.places) == pytest.approx(np.abs(centered[chosen] @ directions[:2].T), abs=1e-4)
    time = np.log2(positions + 1.0)
    explained = sum(np.corrcoef(time, x[:, column])[0, 1] ** 2 * x[:, column].var() for column in range(4))
    assert one.position_share == pytest.approx(explained / x.var(axis=0).sum(), rel=1e-4)


def test_rows_with_nan_count_in_nothing_and_equal_rows_have_no_direction() -> None:
    x = np.ones((6, 3), np.float32)
    x[2, 1], x[4, 0] = np.nan, np.inf
    one = measures.measured(HeadKey(0, 0, "q"), rows_of(x, np.arange(6, dtype=np.int32)), bins=3, points=9)
    assert (one.rows, one.norm, one.largest.tolist()) == (4, pytest.approx(3**0.5), [1, 1, 1])
    assert np.isnan(one.direction_shares).all() and not one.places.any()
    none = measures.measured(HeadKey(0, 0, "q"), rows_of(x[:0], np.empty(0, np.int32)), bins=3, points=9)
    assert none.rows == 0 and np.isnan(none.outlier_ratio)


def test_attention_maps_and_scores_are_those_of_the_dataset(dense: Dataset) -> None:
    heads = measured_heads(dense, Unchanged(dense))
    assert heads.has_maps and heads.example is not None
    key = HeadKey(1, 2, "q")
    drawn = heads.details[key]["attention"]
    attention = dense.attention(1, 2, heads.example)
    weights = (np.frombuffer(base64.b64decode(drawn["weights"]), np.uint8) / 255) ** 2
    assert drawn["positions"] == attention.query_positions.tolist()
    expected = attention.weights[:, : drawn["tokens"]]
    assert weights.reshape(expected.shape) == pytest.approx(expected, abs=0.01)
    maps = {(one["kind"], one["name"]): one for one in report_facts(dense, None)["maps"]}
    queries = [each for each in dense.heads if each.kind == "q"]
    entropy = maps["q", "entropy"]["values"][queries.index(key)]
    assert entropy == pytest.approx(heads.attention[key]["entropy"], rel=1e-3)
    statistics = dense.statistics(1, "q", "post")
    assert maps["q", "norm_post"]["values"][queries.index(key)] == pytest.approx(
        float(statistics.norm_mean[2]), rel=1e-3
    )


def test_a_dataset_that_is_replaced_meanwhile_has_no_report(
    undisturbed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(undisturbed(), tmp_path / "dataset"))
    real = facts_module.outliers

    def meanwhile(heads: Any) -> Any:
        edit(root, lambda manifest: manifest["timings"].update(capture=1e9))
        return real(heads)

    monkeypatch.setattr(facts_module, "outliers", meanwhile)
    with pytest.raises(StoreError, match="another dataset has replaced the one in"):
        report_facts(qk_sniffer.open_dataset(root), None)


def test_a_file_of_another_dataset_with_the_same_size_has_no_report(
    undisturbed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(undisturbed(**SAMPLED), tmp_path / "dataset"))
    for name in ("l01h01k/data.parquet", "examples/data.parquet"):
        data = (root / name).read_bytes()
        assert data.count(b"parquet-cpp") == 1
        (root / name).write_bytes(data.replace(b"parquet-cpp", b"PARQUET-cpp"))
        with pytest.raises(StoreError, match=rf"{name} is damaged, or of another dataset: its sha256 differs"):
            report_facts(qk_sniffer.open_dataset(root), None)
        (root / name).write_bytes(data)

    monkeypatch.setattr(measures, "READ_BYTES", 1)  # few rows of each file are read
    path, real = root / "l01h01k" / "data.parquet", facts_module.coverage

    def meanwhile(dataset: Dataset) -> Any:
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)
        return real(dataset)

    assert report_facts(qk_sniffer.open_dataset(root), None)["sampled_rows"]
    monkeypatch.setattr(facts_module, "coverage", meanwhile)
    with pytest.raises(StoreError, match=r"l01h01k/data.parquet of the dataset in .* was replaced or written"):
        report_facts(qk_sniffer.open_dataset(root), None)


def test_a_dataset_without_all_keys_has_no_attention_maps(undisturbed: Callable[..., Path]) -> None:
    dataset = qk_sniffer.open_dataset(undisturbed(**SAMPLED))
    heads = measured_heads(dataset, Unchanged(dataset))
    assert not heads.has_maps and heads.attention == {}


def test_few_examples_of_all_parts_are_read_of_a_large_dataset(dense: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "READ_BYTES", 300 * 4 * 16 * len(dense.heads))
    sample = Sample(dense, Unchanged(dense))
    rows = sample.vectors(HeadKey(0, 0, "q"), 16)
    ids = dense.examples["example_id"].to_pylist()
    found = [ids.index(one) for one in dict.fromkeys(rows.example_ids.tolist())]
    assert 100 < len(rows.positions) <= 300
    assert found[0] == 0 and found[-1] > len(ids) / 2 and len(found) < len(ids)
    assert report_facts(dense, None)["sampled_rows"] < dense.manifest["rows"]


def test_plasticity_joins_the_page(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = root.with_name(f"{root.name}-plasticity")
    assert measure(root, folder) == 0
    assert run(monkeypatch, f"data_root={root}", f"output={tmp_path}/page.html") == 0
    facts = facts_of((tmp_path / "page.html").read_text())
    (shown,) = [one for one in facts["maps"] if one["name"] == "ap_overall"]
    assert len(shown["values"]) == 12 and any(shown["values"])
    shown_intervals = {one["name"]: one["values"] for one in facts["maps"] if one["group"] == "plasticity"}
    table = tables.read(folder, "head_intervals")
    for name, quantity, column in (
        ("ap_corrected", "ap_overall", "corrected"),
        ("ap_low", "ap_overall", "low"),
        ("ap_high", "ap_overall", "high"),
        ("ap_null", "ap_null", "corrected"),
        ("ap_drift", "ap_drift", "corrected"),
    ):
        expected = table[column][table["quantity"] == quantity]
        found = np.array(shown_intervals[name], float)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    about = dict(facts["plasticity"])
    assert "95 % interval over texts" in about["Corrected"] and {"Without drift", "Lost to drift"} <= {*about}
    edit(root, lambda manifest: manifest["timings"].clear())
    assert run(monkeypatch, f"data_root={root}", f"output={tmp_path}/page.html", f"plasticity={folder}") == 1
    assert "results of another dataset" in capsys.readouterr().err
    assert run(monkeypatch, f"data_root={root}", f"output={tmp_path}/page.html") == 0, "only named results must fit"
    assert "ap_overall" not in (tmp_path / "page.html").read_text().partition("</script")[0]


def test_a_page_that_would_be_too_large_leaves_out_details_first(
    dense: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = report_facts(dense, None)
    whole = page(facts)
    assert len(whole) < MOST_BYTES
    monkeypatch.setattr(pages, "MOST_BYTES", len(whole) - 1)
    details = facts_of(page(facts).decode())["details"]
    assert all("points" not in detail and "by_position" in detail for detail in details.values())
    monkeypatch.setattr(pages, "MOST_BYTES", 10_000)
    with pytest.raises(QkSnifferError, match="too many heads for one page"):
        page(facts)


def test_a_dataset_of_statistics_alone_has_a_report(
    undisturbed: Callable[..., Path],
) -> None:
    root = undisturbed(sampler={"type": "none"}, capture={"statistics": {"enabled": True}}, verify={"examples": 0})
    facts = facts_of(page(report_facts(qk_sniffer.open_dataset(root), None)).decode())
    assert facts["coverage"] == [] and facts["all_norms"]
    assert {one["name"] for one in facts["maps"] if any(one["values"])} >= {"norm_post", "largest_post"}


def test_the_committed_picture_is_small() -> None:
    picture = Path(__file__).parents[2] / "docs" / "report.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 400_000
