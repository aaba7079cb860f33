"""Checks the program: its files and messages, damaged or incomplete datasets, and restarts."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_hub import FakeHub
from support.jobs import heads_of, run, vectors
from support.plasticity_cases import buckets, bytes_of, environment_of, measure, metrics, program, record, rewrite
from support.verify_cases import edit

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.plasticity import run as run_module
from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.forms import METRICS
from qk_sniffer.plasticity.measure import KeyHead
from qk_sniffer.plasticity.results import Results
from qk_sniffer.plasticity.run import portions
from qk_sniffer.plasticity.tables import HeadResult
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import TakenAwayError
from qk_sniffer.store.manifest import read as read_manifest
from qk_sniffer.store.manifest import write as write_manifest

ESTIMATE = "value,corrected,se,low,high"
WEIGHT = ",".join(f"weight_{name}" for name in ESTIMATE.split(","))


def test_the_columns_are_the_contract(verify_base: Path, tmp_path: Path) -> None:
    """Plots and notebooks of users read these columns."""
    measure(verify_base, tmp_path / "results")
    head = "layer,q_head,k_head,"
    measured = "q_R2_pos,q_beta_norm,q_R2_scalar,q_mae_baseline,q_mae_proj,q_mae_ratio,q_resid0_skew,q_resid0_kurt,"
    measured += "q_resid0_ks_p,q_noise_med_abs_skew,q_noise_med_abs_kurt,q_noise_med_ks_p,q_noise_frac_ks_p_lt_alpha,"
    expected = {
        "head_metrics": f"{head}n_q_tokens,n_k_tokens,d_model,{measured}ap_overall",
        "head_bucket_plasticity": f"{head}q_bucket,k_bucket,ap_bucket",
        "head_component_weights": f"{head}component,component_r2,component_weight",
        "head_intervals": f"{head}n_texts,quantity,{ESTIMATE}",
        "head_bucket_intervals": f"{head}q_bucket,k_bucket,n_q_rows,n_q_texts,n_pairs,n_pair_texts,{ESTIMATE},null",
        "head_component_intervals": f"{head}component,{ESTIMATE},{WEIGHT}",
        "mean_intervals": f"attention,n_heads,quantity,{ESTIMATE}",
        "mean_bucket_intervals": f"attention,n_heads,quantity,q_bucket,{ESTIMATE}",
    }
    for name, columns in expected.items():
        lines = (tmp_path / "results" / f"{name}.csv").read_text().splitlines()
        assert lines[0] == columns
        parquet = tables.read(tmp_path / "results", name)
        assert ",".join(parquet) == columns
        for line, row in zip(lines[1:], zip(*parquet.values(), strict=True), strict=True):
            for text, value in zip(line.split(","), row, strict=True):
                np.testing.assert_equal(text if isinstance(value, str) else float(text or "nan"), value)


@pytest.mark.slow
def test_the_program_from_its_start_to_pictures(
    verify_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(verify_base, tmp_path / "data"))
    first = program(tmp_path, f"data_root={root.name}", "num_pairs_per_bucket=8", "replicates=20")
    assert first.returncode == 0, first.stderr
    assert "12 heads measured, mean plasticity 0.9" in first.stdout
    folder = tmp_path / "data-plasticity"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{name}.{ending}" for name in sorted(tables.TABLES) for ending in ("csv", "parquet")),
        "pictures",
        "plasticity.json",
    ]
    pictures = sorted((folder / "pictures").iterdir())
    names = ["by_bucket_pair", "by_head", "by_query_bucket", "component_weights", "heads_in_order"]
    starts = {".pdf": b"%PDF", ".png": b"\x89PNG", ".svg": b"<?xml"}
    assert [path.name for path in pictures] == [f"{name}{suffix}" for name in names for suffix in starts]
    for path in pictures:
        assert path.read_bytes().startswith(starts[path.suffix]) and path.stat().st_size < 300_000
    assert "by_query_bucket, by_bucket_pair, heads_in_order, by_head, component_weights (.png, .svg, .pdf)" in (
        first.stdout
    )
    assert "corrected for the size of the sample: 0.9" in first.stdout and "lost to positional drift: " in first.stdout
    before = bytes_of(folder)
    caplog.set_level("INFO")
    assert measure(root, folder, num_pairs_per_bucket=8) == 0
    assert "Nothing to do" in caplog.text and bytes_of(folder) == before
    refused = r"holds results of other settings.*\n  - num_pairs_per_bucket: 8 there, 9 now\n.*overwrite=true"
    with pytest.raises(StoreError, match=refused):
        measure(root, folder, num_pairs_per_bucket=9)
    assert bytes_of(folder) == before
    assert measure(root, folder, num_pairs_per_bucket=9, overwrite=True) == 0
    assert "they are replaced" in caplog.text
    assert bytes_of(folder).keys() == before.keys() and bytes_of(folder) != before


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(verify_base: Path, tmp_path: Path) -> None:
    settings = (f"data_root={verify_base}", "pictures=false", "num_pairs_per_bucket=20")
    command = [sys.executable, "-m", "qk_sniffer.plasticity", *settings, "output_dir=killed"]
    # Each head takes long enough for the test to kill the program halfway.
    code = "import time, qk_sniffer.plasticity.measure as m; real = m._QueryHead.result\n"
    code += "m._QueryHead.result = lambda self: (time.sleep(0.3), real(self))[1]\n"
    command[1:3] = ["-c", code + "import sys; from qk_sniffer.plasticity.cli import main; sys.exit(main())"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment_of(), stderr=subprocess.DEVNULL)
    work = tmp_path / "killed" / ".work"
    deadline = time.monotonic() + 60
    while len(list(work.glob("l*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("l*.json")}
    assert 3 <= len(kept) < 12 and not (tmp_path / "killed" / "plasticity.json").exists()
    again = program(tmp_path, *settings, "output_dir=killed")
    assert again.returncode == 0 and f"{len(kept)} of 12 heads were measured by an earlier start" in again.stderr
    whole = program(tmp_path, *settings, "output_dir=whole")
    assert whole.returncode == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert not work.exists()


def test_the_number_of_threads_changes_nothing(
    verify_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (1, 6):
        monkeypatch.setattr("qk_sniffer.plasticity.run.num_threads", lambda count=workers: count)
        measure(verify_base, tmp_path / str(workers), num_pairs_per_bucket=20, normality_max_dims=5)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "6")


def columns_of(root: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = heads_of(root)[name]
    return vectors(table).copy(), table["position"].to_numpy(), table["example_id"].to_numpy()


def test_rows_that_are_not_finite_are_left_out_and_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    values, positions, examples = columns_of(root, "l01h02q")
    rewrite(root, 1, 2, "q", values[5:], positions[5:], examples[5:])
    measure(root, tmp_path / "without")
    values[:3, 4], values[3:5, 0] = np.nan, np.inf
    rewrite(root, 1, 2, "q", values, positions, examples)
    assert measure(root, tmp_path / "with") == 0
    assert "5 queries left out, with NaN or infinite numbers: l01h02q" in capsys.readouterr().out
    assert bytes_of(tmp_path / "with") == bytes_of(tmp_path / "without")


def test_keys_that_are_not_finite_are_left_out_for_all_their_query_heads(root: Path, tmp_path: Path) -> None:
    values, positions, examples = columns_of(root, "l01h01k")
    values[0] = np.nan
    rewrite(root, 1, 1, "k", values, positions, examples)
    measure(root, tmp_path / "results")
    assert record(tmp_path / "results")["notes"]["1 keys left out, with NaN or infinite numbers"] == [
        "l01h02q",
        "l01h03q",
    ]
    assert metrics(tmp_path / "results")[1, 2]["n_k_tokens"] == len(values) - 1


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_heads_of_few_rows_say_what_they_lack(rows: int, root: Path, tmp_path: Path, capsys: Any) -> None:
    values, _, examples = columns_of(root, "l01h00q")
    rewrite(root, 1, 0, "q", values[:rows], np.arange(rows) * 20, examples[:rows])
    assert measure(root, tmp_path / "results") == 0
    printed = capsys.readouterr().out
    row = metrics(tmp_path / "results")[1, 0]
    assert row["n_q_tokens"] == rows
    if rows < 2:
        assert "nothing can be fitted, measures are NaN: l01h00q" in printed
        of_a_constant = {"q_mae_baseline": 0.0, "q_mae_proj": 0.0, "q_mae_ratio": 1.0} if rows else {}
        for name in (*tables.QUERY_METRICS, "ap_overall"):
            np.testing.assert_equal(row[name], of_a_constant.get(name, np.nan), name)
    else:
        assert np.isfinite(row["q_R2_pos"]) and np.isnan(row["q_resid0_kurt"])
        assert f"{rows} queries: too few for " in printed
    assert len(metrics(tmp_path / "results")) == 12, "the head remains in the table"


def test_queries_at_one_position(root: Path, tmp_path: Path) -> None:
    values, positions, examples = columns_of(root, "l01h00q")
    rewrite(root, 1, 0, "q", values, np.full(len(positions), 40), examples)
    measure(root, tmp_path / "results")
    note = f"{len(values)} rows of queries, all at one position: nothing can be fitted, measures are NaN"
    assert record(tmp_path / "results")["notes"][note] == ["l01h00q"]
    assert {key: np.isnan(value) for key, value in buckets(tmp_path / "results")[1, 0].items()} == {
        (1, 0): True,
        (2, 0): True,
        (2, 1): True,
    }


def test_empty_buckets_have_rows_of_nan_and_a_note(root: Path, tmp_path: Path) -> None:
    values, positions, examples = columns_of(root, "l01h00q")
    kept = positions // 16 != 2
    rewrite(root, 1, 0, "q", values[kept], positions[kept], examples[kept])
    values, positions, examples = columns_of(root, "l01h00k")
    kept = positions // 16 != 1
    rewrite(root, 1, 0, "k", values[kept], positions[kept], examples[kept])
    measure(root, tmp_path / "results")
    found = buckets(tmp_path / "results")[1, 0]
    empty = {key for key, value in found.items() if np.isnan(value)}
    assert empty == {(2, 0), (2, 1), *((b, 1) for b in range(3, 7))}
    known = [value for key, value in found.items() if key not in empty]
    assert metrics(tmp_path / "results")[1, 0]["ap_overall"] == pytest.approx(np.mean(known))
    notes = record(tmp_path / "results")["notes"]
    assert "l01h00q" in notes["no queries in bucket 2: its plasticity is NaN"]
    assert notes["no two keys of an example in bucket 1: NaN for it"] == ["l01h00q", "l01h01q"]


@pytest.mark.slow
def test_a_missing_file_is_named_and_measured_once_it_exists(root: Path, tmp_path: Path, capsys: Any) -> None:
    measure(root, tmp_path / "whole")
    key_file, query_file = Layout(root).head_file(1, 1, "k"), Layout(root).head_file(0, 3, "q")
    keys, query = key_file.read_bytes(), query_file.read_bytes()
    key_file.unlink()
    query_file.write_bytes(query[:100])
    assert measure(root, tmp_path / "results") == 1
    printed = capsys.readouterr().out
    for name in ("l00h03q", "l01h02q", "l01h03q"):
        assert re.search(rf"{name} is NOT measured: .* is missing or damaged", printed), printed
    assert len(metrics(tmp_path / "results")) == 9
    key_file.write_bytes(keys)
    query_file.write_bytes(query)
    assert measure(root, tmp_path / "results") == 0
    assert bytes_of(tmp_path / "results") == bytes_of(tmp_path / "whole")


def test_queries_and_keys_that_do_not_fit_together_are_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    rewrite(root, 1, 0, "q", np.ones((40, 8)), np.arange(40), np.zeros(40))
    assert measure(root, tmp_path / "results") == 1
    printed = capsys.readouterr().out
    assert re.search(r"l01h00q is NOT measured: .*vector is fixed_size_list<.*\[8\] instead of .*\[16\]", printed), (
        printed
    )


@pytest.mark.parametrize(("kind", "missing"), [("capture_keys", "keys"), ("capture_queries", "queries")])
def test_one_kind_alone_cannot_be_measured(
    kind: str, missing: str, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    root = run(checkpoint, texts, tmp_path / "data", capture={kind: False, "layers": [0]}, verify={"examples": 0})
    with pytest.raises(StoreError, match=rf"has no {missing} \(capture.{kind}=false\)"):
        measure(root, tmp_path / "results")


def test_query_heads_whose_keys_were_not_captured_are_named(root: Path, tmp_path: Path, capsys: Any) -> None:
    manifest = read_manifest(root)
    del manifest["files"]["l01h01k/data.parquet"]
    write_manifest(Layout(root), manifest)
    assert measure(root, tmp_path / "results") == 0
    assert "their keys were not captured: l01h02q, l01h03q" in capsys.readouterr().out


@pytest.mark.slow
def test_a_branch_of_the_hub(verify_base: Path, tmp_path: Path) -> None:
    files = {path.relative_to(verify_base).as_posix(): path.read_bytes() for path in verify_base.rglob("*.*")}
    with FakeHub() as hub:
        hub.commit("me/vectors", {name: data for name, data in files.items() if name[0] != "."}, "tiny")
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        done = program(tmp_path, "data_root=me/vectors", "revision=tiny", "pictures=false", **online)
        wrong = program(tmp_path, "data_root=me/vectors", "revision=other", "pictures=false", **online)
    assert done.returncode == 0, done.stderr
    settings = ["pictures=false", "output_dir=folder"]
    assert program(tmp_path, f"data_root={verify_base}", *settings).returncode == 0
    assert bytes_of(tmp_path / "outputs" / "tiny-plasticity") == bytes_of(tmp_path / "folder")
    assert wrong.returncode == 1 and "no dataset of qk-sniffer at the revision 'other'" in wrong.stderr


def test_facts_of_the_manifest_about_layers_become_notes(root: Path, tmp_path: Path) -> None:
    manifest = read_manifest(root)
    manifest["model"]["rope_stage"] = "pre"
    manifest["model"]["layers"][1] |= {"position_bias": True, "sliding_window": None, "attention_chunk": 32}
    manifest["model"]["layers"][0] |= {"sparse_attention": True}
    manifest["model"]["layers"][2] |= {"full_attention": False, "sliding_window": None}
    write_manifest(Layout(root), manifest)
    measure(root, tmp_path / "results")
    notes = record(tmp_path / "results")["notes"]
    for note, where in (
        ("captured before RoPE: the vectors carry no position of the rotary embedding", "all heads"),
        ("attention adds a bias to the logits, which is not measured", "layers 1"),
        ("a query sees only some of the keys, and the dataset does not store which", "layers 0"),
        ("a query does not see all earlier keys, and the dataset does not say which", "layers 2"),
    ):
        assert notes[note] == [where]
    assert set(buckets(tmp_path / "results")[1, 0]) == {(1, 0), (3, 2), (5, 4)}, "buckets of 16 in chunks of 32"


def test_results_need_a_folder_of_their_own(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds something else"):
        measure(root, tmp_path / "other")
    with Results(tmp_path / "results").claim(), pytest.raises(StoreError, match="measuring plasticity"):
        measure(root, tmp_path / "results")


def test_a_run_whose_folder_is_taken_writes_nothing_there(tmp_path: Path) -> None:
    mine, theirs = Results(tmp_path / "results"), Results(tmp_path / "results")
    result = HeadResult(0, 0, 0, dict.fromkeys(METRICS, 0.5), [], [0.5])
    writes: list[Callable[[], object]] = [
        lambda: mine.begin("mine"),
        lambda: mine.save(result),
        lambda: mine.finish([result], {"damaged": {}, "dataset": {"limited_layers": []}}),
        mine.check,
    ]
    for write in writes:
        with pytest.raises(TakenAwayError, match="was removed, moved or replaced"), mine.claim():
            mine.begin("mine")
            mine.save(result)
            assert mine.load(0, 0) == result
            shutil.rmtree(mine.folder)
            with theirs.claim():
                theirs.begin("theirs")
                assert theirs.load(0, 0) is None
                left = {path: path.read_bytes() for path in mine.folder.rglob("*") if path.is_file()}
                write()
        left = {path: data for path, data in left.items() if path.name != ".lock"}
        assert {path: path.read_bytes() for path in mine.folder.rglob("*") if path.is_file()} == left
        shutil.rmtree(mine.folder)


def test_the_result_of_a_head_belongs_to_its_settings(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    with results.claim():
        results.begin("one")
        results.save(HeadResult(0, 0, 0, dict.fromkeys(METRICS, 0.5), [], [0.5]))
        (results.folder / ".work" / "job.json").write_text("two", encoding="utf-8")
        results.begin("two")
        assert results.load(0, 0) is None


def test_unfinished_results_and_those_of_another_dataset_or_version_are_not_replaced(
    root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    results = Results(folder)
    with results.claim():
        results.begin("0" * 64)
    unfinished = bytes_of(folder)
    with pytest.raises(StoreError, match="holds results of other settings"):
        measure(root, folder)
    assert bytes_of(folder) == unfinished
    assert measure(root, folder, overwrite=True) == 0
    finished = bytes_of(folder)
    write_manifest(Layout(root), read_manifest(root) | {"timings": {}})  # another dataset
    with pytest.raises(StoreError, match="the dataset has changed"):
        measure(root, folder)
    assert bytes_of(folder) == finished
    old = (folder / "plasticity.json").read_text().replace("qk-sniffer-plasticity/", "qk-sniffer-plasticity/9")
    (folder / "plasticity.json").write_text(old)
    with pytest.raises(StoreError, match="of another version"):
        measure(root, folder)
    assert (folder / "plasticity.json").read_text() == old


def test_without_matplotlib_there_are_tables_and_without_scipy_an_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qk_sniffer.plasticity import run as module

    real = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    assert measure(root, tmp_path / "results", pictures=True) == 0
    assert "pip install scipy matplotlib" in caplog.text
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(QkSnifferError, match=r"scipy is not installed.*pip install scipy matplotlib"):
        measure(root, tmp_path / "results")


def test_a_file_that_is_not_the_listed_one_is_not_measured(root: Path, tmp_path: Path, capsys: Any) -> None:
    names = ("l01h00q/data.parquet", "l02h00k/data.parquet")
    edit(root, lambda manifest: [manifest["files"][name].update(sha256="0" * 64) for name in names])
    assert measure(root, tmp_path / "results") == 1
    printed = capsys.readouterr().out
    for head, file in (("l01h00q", "l01h00q"), ("l02h00q", "l02h00k"), ("l02h01q", "l02h00k")):
        assert f"{head} is NOT measured: {root / file / 'data.parquet'} is damaged, or of another dataset" in printed
    assert set(record(tmp_path / "results")["damaged"]) == {"l01h00q", "l02h00q", "l02h01q"}


@pytest.mark.slow
def test_damaged_results_are_recreated(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    measure(root, folder)
    whole = bytes_of(folder)
    (folder / "head_metrics.csv").write_bytes(b"")
    assert measure(root, folder) == 0 and bytes_of(folder) == whole
    (folder / "plasticity.json").write_bytes(b'"format": "qk-sniffer-plasticity/1", {')
    assert measure(root, folder) == 0 and bytes_of(folder) == whole
    # The program measures a head again if a full disk truncated its result.
    query_file = Layout(root).head_file(0, 3, "q")
    query = query_file.read_bytes()
    query_file.unlink()
    assert measure(root, folder, num_pairs_per_bucket=9, overwrite=True) == 1
    (folder / ".work" / "l01h03q.json").write_bytes(b'{"layer": 1')
    query_file.write_bytes(query)
    assert measure(root, folder, num_pairs_per_bucket=9) == 0
    measure(root, tmp_path / "undisturbed", num_pairs_per_bucket=9)
    assert bytes_of(folder) == bytes_of(tmp_path / "undisturbed")


@pytest.mark.slow
def test_pictures_of_replaced_results_are_removed(root: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "results" / "pictures"
    measure(root, tmp_path / "results", pictures=True)
    assert len(list(pictures.iterdir())) == 15
    mine = pictures / "mine.png"
    mine.write_bytes(b"the user's")
    measure(root, tmp_path / "results", num_pairs_per_bucket=9, overwrite=True)
    assert list(pictures.iterdir()) == [mine]
    measure(root, tmp_path / "results", pictures=True, overwrite=True)
    measure(
        root, tmp_path / "results", pictures=True, max_tokens_per_head=1, overwrite=True
    )  # no head has a plasticity
    assert sorted({path.stem for path in pictures.iterdir()}) == ["by_head", "component_weights", "mine"]


def test_threads_share_the_query_heads_of_few_key_heads() -> None:
    keys = [KeyHead(0, number, tuple(range(4)), None, None) for number in range(3)]
    assert list(portions(keys, 2)) == keys
    assert [each.query_heads for each in portions(keys[:1], 2)] == [(0, 1), (2, 3)]
    assert [each.query_heads for each in portions(keys[:1], 16)] == [(0,), (1,), (2,), (3,)]
    assert sum((each.query_heads for each in portions(keys[:2], 16)), ()) == (0, 1, 2, 3) * 2


@pytest.mark.parametrize("is_put_back", [False, True])
def test_rows_of_a_dataset_that_replaces_the_measured_one_are_not_taken(
    is_put_back: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Dataset.table

    def replaced(dataset: Dataset, layer: int, head: int, kind: str, *arguments: Any, **rows: Any) -> Any:
        path = root / f"l{layer:02d}h{head:02d}{kind}" / "data.parquet"
        found = real(dataset, layer, head, kind, *arguments, **rows)
        data = path.read_bytes()
        path.write_bytes(data if is_put_back else data[:-1] + b"?")
        return found

    monkeypatch.setattr(Dataset, "table", replaced)
    with pytest.raises(StoreError, match=r"(?s)no head of .* could be measured.*was changed while it was read"):
        measure(root, tmp_path / "results", num_pairs_per_bucket=8)


@pytest.mark.slow
def test_a_start_reports_its_own_results_after_another_has_replaced_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, other, real = tmp_path / "results", tmp_path / "other", run_module.report
    shutil.copytree(root, other)
    (other / "l00h00q" / "data.parquet").unlink()
    write_manifest(Layout(other), read_manifest(other) | {"timings": {}})  # another dataset

    def delayed(*args: Any) -> None:  # the lock is released
        monkeypatch.setattr(run_module, "report", lambda *_: None)
        assert measure(other, folder, num_pairs_per_bucket=8, overwrite=True) == 1
        real(*args)

    monkeypatch.setattr(run_module, "report", delayed)
    assert measure(root, folder, num_pairs_per_bucket=8) == 0
    assert record(folder)["damaged"] and "NOT measured" not in capsys.readouterr().out
