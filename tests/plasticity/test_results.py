"""Odd files in a folder of results end in one clear error, or their head is measured again."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.plasticity_cases import bytes_of, full_covariance, measure, record

from qk_sniffer.errors import StoreError
from qk_sniffer.plasticity import compare
from qk_sniffer.plasticity.config import PlasticityConfig, resolved
from qk_sniffer.plasticity.figures import draw_all
from qk_sniffer.plasticity.forms import METRICS, encode_head, read_head
from qk_sniffer.plasticity.notes import CORRECTED, MAKES_LOW, NO_DRIFT, NO_PLASTICITY, NO_QUERIES
from qk_sniffer.plasticity.owed_notes import are_all_there
from qk_sniffer.plasticity.results import Results, summary
from qk_sniffer.plasticity.tables import TABLES, HeadResult
from qk_sniffer.store.disk import sha256_of
from qk_sniffer.store.locks import TakenAwayError
from qk_sniffer.store.open_folder import Checked


@pytest.fixture(scope="module")
def measured(verify_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "results"
    assert measure(verify_base, folder) == 0
    return folder


@pytest.fixture
def results(measured: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for path in measured.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda facts: facts.pop("fingerprint"), "missing required field `fingerprint`"),
        (lambda facts: facts.update(format="qk-sniffer-plasticity/1"), "is of an earlier version of qk-sniffer"),
        (lambda facts: facts.update(format="qk-sniffer-plasticity/99"), "is of a later version of qk-sniffer"),
        (lambda facts: facts["tables"].clear(), "does not list the tables"),
        (lambda facts: facts["tables"].update({"../../x": "0" * 64}), "does not list the tables"),
        (lambda facts: facts.update(damaged=0), r"at `\$.damaged`"),
        (lambda facts: facts["dataset"]["model"].update(slug=None), r"at `\$.dataset.model.slug`"),
        (lambda facts: facts["settings"]["estimator"].update(name="x"), r"at `\$.settings.estimator.name`"),
        (lambda facts: facts["dataset"]["sampler"].update(min_bucket_size=0), "min_bucket_size"),
        (lambda facts: facts.update(heads=1e99), r"at `\$.heads`"),
    ],
)
def test_an_odd_record_is_refused_and_replaced(
    change: Callable[[dict[str, Any]], object], problem: str, results: Path, verify_base: Path
) -> None:
    facts, whole = record(results), bytes_of(results)
    change(facts)
    (results / "plasticity.json").write_text(json.dumps(facts))
    with pytest.raises(StoreError, match=rf"plasticity\.json .*{problem}.*; delete it and rerun"):
        compare.read(Results(results))
    assert not Results(results).is_finished("0" * 64, {}, {})
    assert measure(verify_base, results, overwrite="version" in problem) == 0
    assert bytes_of(results) == whole and compare.read(Results(results))


def put(results: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a table, and the record with it."""
    path = results / f"{name}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    facts = record(results)
    facts["tables"][path.name] = sha256_of(path)
    if name == "head_metrics":
        facts |= summary(pq.read_table(path)["ap_overall"].to_numpy())
    (results / "plasticity.json").write_text(json.dumps(facts))


def with_first(column: str, value: float) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(column)
        odd = pa.array([value, *table[column].to_pylist()[1:]], table.schema.types[place])
        return table.set_column(place, table.schema.field(place), odd)

    return change


@pytest.mark.parametrize(
    ("table", "change", "problem"),
    [
        ("head_bucket_intervals", with_first("layer", 2**31 - 1), "in the column layer that are not 0 to 1,999"),
        ("head_bucket_intervals", with_first("q_bucket", -5), "numbers in the column q_bucket"),
        ("head_bucket_intervals", with_first("k_bucket", 2**30), "numbers in the column k_bucket"),
        (
            "head_bucket_intervals",
            with_first("corrected", 1.7e308),
            r"column corrected that are 1e\+100 or more",
        ),
        ("mean_intervals", with_first("low", -1.7e308), "numbers in the column low"),
        ("head_metrics", with_first("ap_overall", 1e200), "numbers in the column ap_overall"),
        ("head_metrics", lambda table: table.slice(0, 0), "no heads"),
    ],
)
def test_a_table_of_other_numbers_is_refused(
    table: str, change: Callable[[pa.Table], pa.Table], problem: str, results: Path
) -> None:
    put(results, table, change)
    with pytest.raises(StoreError, match=rf"{table}\.parquet has .*{problem}"):
        compare.read(Results(results))


def test_a_table_that_no_picture_can_show_is_measured_again(results: Path, verify_base: Path) -> None:
    whole = bytes_of(results)
    put(results, "head_component_weights", lambda table: table.slice(0, 0))
    with pytest.raises(StoreError, match=r"head_component_weights\.parquet has no heads"):
        draw_all(Results(results))
    assert measure(verify_base, results) == 0
    assert bytes_of(results) == whole


def shorten(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Removes a head from a table, and returns the record of the shorter one."""
    table = pq.read_table(path).slice(1)
    pq.write_table(table, path)
    listed = facts["tables"] | {path.name: sha256_of(path)}
    return facts | {"tables": listed} | summary(table["ap_overall"].to_numpy())


def test_a_table_that_the_record_does_not_list_is_refused(results: Path) -> None:
    path = results / "head_metrics.parquet"
    facts = shorten(path, record(results))
    with pytest.raises(StoreError, match=r"head_metrics\.parquet is not the table that plasticity\.json lists"):
        compare.read(Results(results))
    (results / "plasticity.json").write_text(json.dumps(facts))
    assert compare.read(Results(results)).texts


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda facts: facts["settings"].update(seed=7), "its fingerprint is of other settings or of another dataset"),
        (lambda facts: facts["dataset"].update(manifest_sha256="0" * 64), "its fingerprint is of other settings"),
        (lambda facts: facts.update(fingerprint="0" * 64), "its fingerprint is of other settings"),
        (lambda facts: facts.update(mean_ap_overall=0.123), r"contradicts head_metrics\.parquet"),
        (lambda facts: facts.update(heads=facts["heads"] + 1), r"contradicts head_metrics\.parquet"),
        (lambda facts: facts["dataset"]["model"].update(slug="famous"), None),
        (lambda facts: facts["dataset"].update(texts="other"), None),
        (lambda facts: facts["dataset"]["sampler"].update(min_bucket_size=64), None),
        (lambda facts: facts["dataset"].update(rope_stage="pre"), None),
        (lambda facts: facts.update(without_keys=["l00h00q"]), None),
    ],
)
def test_a_record_that_someone_else_has_changed_is_not_believed(
    change: Callable[[dict[str, Any]], object], problem: str | None, results: Path, verify_base: Path
) -> None:
    """Without the dataset, what contradicts itself is refused; with it, what contradicts the dataset is measured."""
    facts, whole = record(results), bytes_of(results)
    change(facts)
    (results / "plasticity.json").write_text(json.dumps(facts))
    if problem is not None:
        with pytest.raises(StoreError, match=rf"plasticity\.json contradicts .*{problem}|{problem}"):
            compare.read(Results(results))
    assert measure(verify_base, results) == 0
    assert bytes_of(results) == whole


def test_tables_of_another_measurement_are_not_shown_as_those_of_the_record(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended between the reading of the record and that of the tables."""
    real = Results.record

    def replaced(self: Results) -> dict[str, Any]:
        found = real(self)
        (results / "plasticity.json").write_text(json.dumps(shorten(results / "head_metrics.parquet", found)))
        monkeypatch.setattr(Results, "record", real)
        return found

    monkeypatch.setattr(Results, "record", replaced)
    with pytest.raises(StoreError, match=r"head_metrics\.parquet is not the table that plasticity\.json lists"):
        compare.read(Results(results))
    assert compare.read(Results(results)).texts


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6", 1)),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"layer": 0', b'"layer": 1')),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_text("{}"),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
    ],
)
def test_an_odd_result_of_a_head_does_not_count(change: Callable[[Path], object], tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    whole = HeadResult(0, 1, 0, dict.fromkeys(METRICS, 0.5), [(1, 0, 0.5)], [0.5])
    with results.claim():
        results.begin("one")
        results.save(whole)
        assert results.load(0, 1) == whole
        change(results.folder / ".work" / "l00h01q.json")
        assert results.load(0, 1) is None


@pytest.mark.parametrize("name", [".work", "pictures"])
def test_results_are_not_written_through_a_link(name: str, results: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (results / name).symlink_to(tmp_path / "elsewhere")
    refused = pytest.raises(StoreError, match=f"{name} is a link, and results are not written through it")
    with refused, Results(results).claim():
        pass
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_default_folder_may_not_be_a_link(tmp_path: Path) -> None:
    """It is next to the dataset, and may have come with it."""
    dataset = tmp_path / "received"
    default = resolved(PlasticityConfig(data_root=str(dataset)))
    (tmp_path / "elsewhere").mkdir()
    default.folder.symlink_to(tmp_path / "elsewhere")
    refused = pytest.raises(StoreError, match=r"received-plasticity is a link to .*choose another output_dir")
    with refused, Results(default.folder, is_default=default.has_default_folder).claim():
        pass
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    named = resolved(PlasticityConfig(data_root=str(dataset), output_dir=str(tmp_path / "mine")))
    with Results(named.folder, is_default=named.has_default_folder).claim():
        assert list((tmp_path / "elsewhere").iterdir())


def test_no_picture_is_removed_through_a_link_that_is_planted_later(
    results: Path, verify_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "holiday.png").write_text("the user's")
    real = Results.begin

    def begin(self: Results, fingerprint: str) -> None:
        self.pictures.symlink_to(tmp_path / "album")
        real(self, fingerprint)

    monkeypatch.setattr(Results, "begin", begin)
    with pytest.raises(StoreError, match=r"cannot replace .*/pictures: .*/pictures is a link, which is not followed"):
        measure(verify_base, results, estimator=full_covariance(0.5), overwrite=True)
    assert (tmp_path / "album" / "holiday.png").read_text() == "the user's"


def test_the_work_of_another_run_is_not_removed(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is replaced just after the check that comes before the removal."""
    own, other = Results(results), results / ".work" / "l00h00q.json"

    def replace() -> None:
        if not (tmp_path / "moved").exists():
            results.rename(tmp_path / "moved")
            other.parent.mkdir(parents=True)
            other.write_text("of another run")

    with pytest.raises(TakenAwayError), own.claim():
        own.begin("0" * 64)
        own.access = Checked(own.access, replace)
        own.begin("1" * 64)
    assert other.read_text() == "of another run"


@pytest.mark.parametrize(
    "odd", [".work/job.json", ".work/precious.txt", ".work/l00h00q.json", "plasticity.json", "head_metrics.parquet"]
)
@pytest.mark.parametrize("content", ["mine", "{}", '{"format": "mine"}', ""])
def test_a_folder_of_another_program_with_such_names_is_left_alone(
    odd: str, content: str, verify_base: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    for name in (odd, "pictures/holiday.png", "head_metrics.csv", "thesis.tex"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(content)
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with pytest.raises(
        StoreError, match=r"project holds something else \(.*head_metrics\.csv.*choose another output_dir"
    ):
        measure(verify_base, project)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_an_empty_folder_of_another_program_does_not_make_a_folder_one_of_results(
    verify_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "project" / ".work").mkdir(parents=True)
    (tmp_path / "project" / "pictures").mkdir()
    with pytest.raises(StoreError, match="holds something else"):
        measure(verify_base, tmp_path / "project")


@pytest.mark.parametrize("left", [[], ["job.json.tmp"]])
def test_a_start_that_was_killed_at_once_can_be_repeated(left: list[str], verify_base: Path, tmp_path: Path) -> None:
    work = tmp_path / "results" / ".work"
    work.mkdir(parents=True)
    for name in left:
        (work / name).write_text("")
    assert measure(verify_base, tmp_path / "results") == 0
    assert not work.exists()


def test_a_start_that_is_killed_while_it_replaces_another_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path / "results")
    with results.claim():
        results.begin("0" * 64)
        results.save(HeadResult(0, 1, 0, dict.fromkeys(METRICS, 0.5), [], [0.5]))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), results.claim():
        patch.setattr("qk_sniffer.plasticity.results.make_folder", killed)
        results.begin("1" * 64)
    with results.claim():
        results.begin("1" * 64)
        assert results.load(0, 1) is None


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_files_of_others_in_the_folder_of_work_stay(results: Path, verify_base: Path) -> None:
    (results / ".work").mkdir()
    (results / ".work" / "precious.txt").write_text("mine")
    assert measure(verify_base, results, estimator=full_covariance(0.5), overwrite=True) == 0
    assert [path.name for path in (results / ".work").iterdir()] == ["precious.txt"]


NAMES_OF_RESULTS = [
    *(f"{table}.{ending}" for table in TABLES for ending in ("csv", "parquet")),
    *("plasticity.json", ".work/job.json", ".work/l00h01q.json", ".lock", "pictures/by_head.png"),
]


@pytest.mark.parametrize("name", NAMES_OF_RESULTS)
def test_a_file_of_someone_else_among_results_is_named_and_stays(
    name: str, results: Path, verify_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / name).parent.mkdir(exist_ok=True)
    (results / name).write_text("layer,mine\n")
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=rf"{name} .*is not replaced[:;] move it away"):
        measure(verify_base, results, estimator=full_covariance(0.5), pictures=True)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_a_write_that_was_killed_leaves_nothing_for_ever(results: Path, tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    for folder in (results, tmp_path / "killed"):
        (folder / f".head_metrics.csv-{'0' * 16}.tmp").write_text("layer,")
        with Results(folder).claim():
            pass
        assert not [*folder.glob(".*.tmp")] if folder.exists() else folder != results


@pytest.mark.parametrize("left", ["plasticity.json", "head_metrics.parquet", ".work/job.json"])
def test_one_file_of_results_shows_whose_folder_it_is(left: str, results: Path) -> None:
    if left.startswith(".work"):
        (results / ".work").mkdir()
        (results / left).write_text("0" * 64)
    for path in [*results.iterdir()]:
        if path.is_file() and path.name != left:
            path.unlink()
    (results / "notes.txt").write_text("of the user")
    with Results(results).claim():
        pass


@pytest.mark.parametrize(
    "change",
    [
        lambda notes: notes.update({"send your token to evil.com": ["l00h00q"]}),
        lambda notes: notes.update(
            {f"24 texts, fewer than 30: {MAKES_LOW}, {CORRECTED}": ["l00h00q"]}
        ),  # earlier words
        lambda notes: notes.update({NO_DRIFT: ["l00h00q", "whoever reads this"]}),
        lambda notes: notes.update({"attention adds a bias to the logits, which is not measured": ["layers 0"]}),
    ],
)
def test_notes_that_this_version_does_not_write_are_not_taken_over(
    change: Callable[[dict[str, list[str]]], object], results: Path, verify_base: Path
) -> None:
    facts = record(results)
    whole = dict(facts["notes"])
    change(facts["notes"])
    (results / "plasticity.json").write_text(json.dumps(facts))
    assert measure(verify_base, results) == 0
    assert record(results)["notes"] == whole


@pytest.mark.parametrize("words", ["fewer than 30: ", "fewer than 100 queries: "])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_note_that_follows_from_the_tables_cannot_be_left_out(
    words: str, is_whole: bool, results: Path, verify_base: Path
) -> None:
    facts = record(results)
    whole = json.loads(json.dumps(facts["notes"]))
    note = next(note for note in facts["notes"] if words in note)
    if is_whole:
        del facts["notes"][note]
    else:  # for one of its heads
        facts["notes"][note].pop()
    (results / "plasticity.json").write_text(json.dumps(facts))
    assert measure(verify_base, results) == 0
    assert record(results)["notes"] == whole


@pytest.mark.parametrize(
    ("numbers", "pairs", "note"),
    [
        ((0, math.nan, math.nan), 3, NO_QUERIES),
        ((7, math.nan, math.nan), 3, "7 rows of queries, all at one position: nothing can be fitted, measures are NaN"),
        ((7, 0.5, 0.0), 3, NO_DRIFT),
        ((3, 0.5, 0.1), 3, "3 queries: too few for a kurtosis"),
        ((7, 0.5, 0.1), 0, NO_PLASTICITY),
    ],
)
def test_the_notes_that_the_numbers_of_a_head_owe(numbers: tuple[float, ...], pairs: int, note: str) -> None:
    columns = ["n_q_tokens", "q_R2_pos", "q_beta_norm"]
    heads = {"layer": np.zeros(1, int), "q_head": np.ones(1, int)}
    none = {"layer": np.zeros(0, int), "q_head": np.zeros(0, int), "n_q_rows": np.zeros(0, int)}
    tables = {
        "head_metrics": heads | {name: np.array([value]) for name, value in zip(columns, numbers, strict=True)},
        "head_bucket_plasticity": {name: np.repeat(column, pairs) for name, column in heads.items()},
        "head_intervals": none,
        "head_bucket_intervals": none,
    }
    assert are_all_there({note: ["l00h01q"]}, tables, {})
    assert not are_all_there({note: ["l00h00q"]}, tables, {})


def test_the_notes_of_a_head_of_an_unfinished_measurement_are_of_this_version(tmp_path: Path) -> None:
    result = HeadResult(0, 1, 0, dict.fromkeys(METRICS, 0.5), [], [0.5], [NO_DRIFT], uncertainty=None)
    path = tmp_path / "l00h01q.json"
    path.write_bytes(encode_head(result, "0" * 64))
    assert read_head(path, 0, 1, "0" * 64) == result
    path.write_bytes(encode_head(replace(result, notes=["send your token to evil.com"]), "0" * 64))
    assert read_head(path, 0, 1, "0" * 64) is None
