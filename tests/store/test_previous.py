"""A dataset that a job adds to is compared with its manifest before anything is added; so is a staged version."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.plasticity_cases import list_in_manifest
from support.store_cases import Captured, job_facts, make_dataset

from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest, parquet_tables, promote
from qk_sniffer.store.files import Folder
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.previous import RECORD_BYTES, PreviousVersion, describe
from qk_sniffer.store.promote import finish_promotion
from qk_sniffer.store.record import new_job_id, read_record, write_record


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return make_dataset(tmp_path, Captured(num_examples=4))[0]


def previous(layout: Layout) -> PreviousVersion:
    return PreviousVersion(Folder(layout.root), describe(Folder(layout.root)))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_each_damaged_file_is_noticed(change: Callable[[Path], Any], layout: Layout) -> None:
    before = previous(layout)
    before.check_files(Event())
    change(layout.head_file(3, 1, "q"))
    with pytest.raises(StoreError, match=r"l03h01q/data\.parquet of .* is missing or damaged: .*overwrite=true"):
        before.check_files(Event())


def test_the_comparison_ends_when_it_is_stopped(layout: Layout) -> None:
    path = layout.head_file(3, 1, "q")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    stop = Event()
    stop.set()
    previous(layout).check_files(stop)


def test_a_manifest_that_is_replaced_after_its_check_is_not_used(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = previous(layout), PreviousVersion.check

    def replaced(self: PreviousVersion) -> None:
        real(self)
        manifest.write(layout, manifest.read(layout.root) | {"timings": {}, "tokens": 10**6})

    monkeypatch.setattr(PreviousVersion, "check", replaced)
    with pytest.raises(StoreError, match="is no longer the dataset that this job was adding to"):
        _ = before.manifest


def test_a_manifest_that_contradicts_itself_is_not_added_to(layout: Layout) -> None:
    manifest.write(layout, manifest.read(layout.root) | {"source_rows": 9})
    with pytest.raises(StoreError, match=r"contradicts itself \(source_rows is 9, examples 4 and skipped_rows 0\)"):
        describe(Folder(layout.root))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.drop(["index"]), "index is missing"),
        (
            lambda table: table.set_column(0, "example_id", table["example_id"].cast(pa.string())),
            "example_id is string",
        ),
        (lambda table: table.slice(1), "has 3 rows, and manifest.json lists 4"),
    ],
)
def test_another_list_of_examples_is_refused(
    change: Callable[[pa.Table], pa.Table], problem: str, layout: Layout
) -> None:
    pq.write_table(change(pq.read_table(layout.examples)), layout.examples)
    list_in_manifest(layout.root, layout.examples)
    with pytest.raises(StoreError, match=problem):
        previous(layout).examples()


def test_a_head_with_other_columns_is_refused(layout: Layout) -> None:
    path = layout.head_file(0, 0, "q")
    before = pq.read_schema(path)
    pq.write_table(pq.read_table(path).drop(["position"]), path)
    list_in_manifest(layout.root, path)
    with pytest.raises(StoreError, match=r"l00h00q/data\.parquet has other columns .*overwrite=true"):
        list(previous(layout).tables("l00h00q/data.parquet", before, 10))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_head_that_is_replaced_while_it_is_read_is_not_added_to(
    in_place: bool, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was compared before, and rows of another model became those of the dataset."""
    path = layout.head_file(0, 0, "q")
    table, real = pq.read_table(path), parquet_tables.opened
    other = table.set_column(table.schema.get_field_index("vector"), table.field("vector"), table["vector"][::-1])

    def replaced(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr("qk_sniffer.store.previous.opened", real)
        if not in_place:
            path.unlink()
        pq.write_table(other, path)
        return real(*arguments, **options)

    before = previous(layout)
    monkeypatch.setattr("qk_sniffer.store.previous.opened", replaced)
    with pytest.raises(StoreError, match=r"l00h00q/data\.parquet was changed while it was read; restore the file"):
        list(before.tables("l00h00q/data.parquet", table.schema, 10))
    with pytest.raises(StoreError, match=r"l00h00q/data\.parquet of .* is missing or damaged"):
        list(before.tables("l00h00q/data.parquet", table.schema, 10))


@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_a_staged_file_that_was_damaged_is_not_promoted(
    damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(promote, "_move", crash)
        make_dataset(tmp_path, Captured(num_examples=4))
    layout = Layout(tmp_path)
    staged = layout.staging.head_file(0, 0, "q")
    whole = staged.read_bytes()
    staged.write_bytes(damage + whole[len(damage) :] if damage else damage)
    with pytest.raises(StoreError, match=r"l00h00q/data\.parquet .*has changed; .*overwrite=true"):
        finish_promotion(layout)
    assert not layout.manifest.exists()
    staged.write_bytes(whole)
    assert finish_promotion(layout) and layout.manifest.exists()


def test_a_record_that_was_edited_is_noticed(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.work.mkdir()
    facts = job_facts() | {"base": None}
    record = {key: facts[key] for key in facts if key not in ("skipped_rows", "grown_from", "inclusion", "proof")}
    record["job_id"] = new_job_id(record)
    write_record(layout, record)
    assert read_record(layout) == record
    stored = json.loads(layout.job_file.read_text())
    stored["config"]["sampler"]["min_bucket_size"] += 1
    layout.job_file.write_text(json.dumps(stored))
    with pytest.raises(StoreError, match=r"job\.json has changed since it was written; .*overwrite=true"):
        read_record(layout)


def test_examples_that_do_not_fit_in_memory_as_records_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_dataset(tmp_path, Captured(num_examples=40))[0]
    before, table_bytes = previous(layout), pq.read_table(layout.examples).nbytes
    assert [record.index for record in before.examples()] == [*range(40)]
    monkeypatch.setattr(parquet_tables, "available_memory", lambda: table_bytes + 39 * RECORD_BYTES)
    with pytest.raises(StoreError, match=r"examples/data\.parquet does not fit in memory: its rows take"):
        before.examples()
