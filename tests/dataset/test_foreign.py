"""Tests that a dataset of someone else is read within its folder and the machine's memory, or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO
from support.plasticity_cases import measure
from support.surroundings import unchanged
from support.verify_cases import FILE, edit, restate, with_values, wrong

import qk_sniffer
from qk_sniffer.dataset.verify import verify
from qk_sniffer.errors import HubError, StoreError
from qk_sniffer.hub import branch as hub_branch
from qk_sniffer.hub.branch import Branch
from qk_sniffer.store import parquet_tables
from qk_sniffer.store.files import open_inside
from qk_sniffer.store.parquet_pages import PageError, read_pages
from qk_sniffer.store.stored import UnreadableError

pytestmark = pytest.mark.floor


def as_type(column: str, kind: pa.DataType) -> Callable[[Path], None]:
    """Returns a change of a column's type in the file at a path."""

    def change(path: Path) -> None:
        table = pq.read_table(path)
        place = table.schema.get_field_index(column)
        if pa.types.is_fixed_size_list(kind):
            values = pa.FixedSizeListArray.from_arrays(table[column].combine_chunks().flatten()[::2], kind.list_size)
        elif pa.types.is_struct(kind):
            values = pa.StructArray.from_arrays([table[column].combine_chunks()], ["a"])
        elif pa.types.is_dictionary(kind):
            values = table[column].cast(kind.value_type).dictionary_encode()
        else:
            values = table[column].cast(kind)
        pq.write_table(table.set_column(place, pa.field(column, kind, nullable=False), values), path)

    return change


def expand(path: Path) -> None:
    """Writes many equal rows, which take next to no bytes."""
    table = pq.read_table(path).slice(0, 1)
    pq.write_table(table.take(np.zeros(600_000, np.int64)), path, row_group_size=600_000, compression="zstd")


def no_parquet(path: Path) -> None:
    path.write_bytes(b"no Parquet at all")


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "message", "check"),
    [
        (as_type("vector", pa.list_(pa.float32(), 8)), r"vector is fixed_size_list<.*\[8\] instead of", "schema"),
        (as_type("position", pa.string()), "position is string instead of int32", "schema"),
        (as_type("bucket", pa.dictionary(pa.int32(), pa.string())), "bucket is dictionary<", "schema"),
        (as_type("position", pa.struct({"a": pa.int32()})), "position is struct<", "schema"),
        (expand, "claims 600,000 rows of", "parquet"),
        (no_parquet, "is missing or damaged", "parquet"),
    ],
)
def test_a_file_of_another_form_is_not_read(
    change: Callable[[Path], None], message: str, check: str, root: Path
) -> None:
    change(root / FILE)
    restate(root) if change is not expand else _list(root)
    with pytest.raises(StoreError, match=f"{FILE} .*{message}.*; restore the file, or fetch the dataset again"):
        qk_sniffer.open_dataset(root).vectors(0, 1, "q")
    assert check in wrong(str(verify(root)))


def _list(root: Path) -> None:
    from support.plasticity_cases import list_in_manifest

    list_in_manifest(root, root / FILE)


def test_other_numbers_of_rows_and_bytes_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = qk_sniffer.open_dataset(root)
    rows = dataset.manifest["files"][FILE]["rows"]
    monkeypatch.setattr(parquet_tables, "available_memory", lambda: 1000)
    with pytest.raises(StoreError, match=r"does not fit in memory: its rows take .* and 0\.0 MB are available"):
        dataset.vectors(0, 1, "q")
    assert "does not fit in memory" in wrong(str(verify(root)))["parquet"]
    monkeypatch.undo()
    edit(root, lambda manifest: manifest["files"][FILE].update(rows=rows + 1))
    with pytest.raises(StoreError, match=f"has {rows:,} rows, and manifest.json lists {rows + 1:,}"):
        qk_sniffer.open_dataset(root).vectors(0, 1, "q")
    with (root / FILE).open("ab") as file:
        file.write(b"more")
    for read in (dataset.is_intact, dataset.vectors):
        with pytest.raises(StoreError, match=r"missing or damaged \(it has [\d,]+ bytes instead of"):
            read(0, 1, "q")


def test_repeated_long_texts_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": pa.array(["a" * 1000] * 1000)})
    pq.write_table(table, tmp_path / "texts.parquet")
    assert parquet_tables.read_table(tmp_path / "texts.parquet", table.schema, way_out="").equals(table)
    monkeypatch.setattr(parquet_tables, "available_memory", lambda: 500_000)
    with pytest.raises(StoreError, match=r"its rows take 1\.0 MB"):
        parquet_tables.read_table(tmp_path / "texts.parquet", table.schema, way_out="")


def varint(number: int) -> bytes:
    """Returns an i32 of Thrift's compact protocol."""
    number, data = number << 1, b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def page(values: int, unpacked: int, content: bytes) -> bytes:
    """Returns a data page with its header."""
    inner = b"\x15" + varint(values) + b"\x15" + varint(0) + b"\x15" + varint(0) + b"\x15" + varint(0) + b"\0"
    header = b"\x15" + varint(0) + b"\x15" + varint(unpacked) + b"\x15" + varint(len(content)) + b"\x2c" + inner
    return header + b"\0" + content


def test_the_claims_of_pages_are_added_up(tmp_path: Path) -> None:
    path = tmp_path / "column"
    bomb = page(2**31 - 1, 2**31 - 1, b"x" * 20)
    path.write_bytes(page(5, 100, b"x" * 10) + bomb)
    size = path.stat().st_size
    with path.open("rb") as file:
        pages = read_pages(file, 0, size)
        assert (pages.values, pages.largest, pages.size) == (2**31 + 4, 2**31 - 1, 2**31 + 99)
        with pytest.raises(PageError, match="do not end where the file claims"):
            read_pages(file, 0, size - 1)
    for content in (
        b"\x15",
        b"\xff" * 100,
        b"\x1c" * 100,
        b"\x19\xf5" + b"\xff" * 8 + b"\x01" * 50,
        b"\0",
        b"\x15\x01",
    ):
        path.write_bytes(content)
        with path.open("rb") as file, pytest.raises(PageError):
            read_pages(file, 0, len(content))


def test_many_small_pages_and_long_headers(tmp_path: Path) -> None:
    path = tmp_path / "column"
    small = page(0, 0, b"")
    path.write_bytes(small * 10_001)
    with path.open("rb") as file:
        assert read_pages(file, 0, 10_000 * len(small)).values == 0
        with pytest.raises(PageError, match="more than 10,000 pages"):
            read_pages(file, 0, 10_001 * len(small))
    header, statistics = page(5, 100, b"")[:-2], b"\x1c\x18" + varint(15_000) + b"s" * 30_000 + b"\0"
    path.write_bytes(header + statistics + b"\0\0")
    with path.open("rb") as file:
        assert read_pages(file, 0, path.stat().st_size).values == 5


def test_columns_that_overlap_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (root / "l00h01q" / "data.parquet").stat().st_size
    monkeypatch.setattr(parquet_tables, "_compressed_bytes", lambda row_groups: size + 1)
    with pytest.raises(StoreError, match="its columns claim more bytes than it has"):
        qk_sniffer.open_dataset(root).vectors(0, 1, "q")


def test_pages_with_more_values_than_rows_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of one row may claim billions of numbers, which pyarrow would read to find its end."""
    real = parquet_tables.read_pages
    more = lambda *place: type(real(*place))(real(*place).values + 1, 0, 0)  # noqa: E731
    monkeypatch.setattr(parquet_tables, "read_pages", more)
    with pytest.raises(StoreError, match="the pages of the column vector have another number of values than it claims"):
        qk_sniffer.open_dataset(root).vectors(0, 1, "q")
    assert "cannot be read as Parquet" in wrong(str(verify(root)))["parquet"]


@pytest.mark.parametrize("key", ["examples", "tokens", "longest_example"])
def test_examples_that_the_manifest_does_not_describe(key: str, root: Path) -> None:
    edit(root, lambda manifest: manifest.update({key: manifest[key] + 1}))
    with pytest.raises(StoreError, match=r"examples/data\.parquet has .* manifest\.json lists"):
        _ = qk_sniffer.open_dataset(root).examples
    assert f"{key}: " in wrong(str(verify(root)))["examples"]


def test_nothing_outside_is_opened_and_nothing_hangs(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(root / "l00h00q", outside)
    files = [f"l00h0{head}q/data.parquet" for head in range(4)]
    shutil.rmtree(root / "l00h00q")
    (root / "l00h00q").symlink_to(outside)
    for name in files[1:]:
        (root / name).unlink()
    (root / files[1]).symlink_to(outside / "data.parquet")
    (root / files[2]).symlink_to("/dev/zero")
    os.mkfifo(root / files[3])
    found = wrong(str(verify(root)))["files"]
    assert "a link leads out of the dataset" in found and "cannot be read: Not a regular file" in found
    dataset = qk_sniffer.open_dataset(root)
    for head in range(4):
        message = "is not a regular file" if head == 3 else "leads out of the dataset"
        for read in (dataset.vectors, dataset.is_intact):
            with pytest.raises(StoreError, match=message):
                read(0, head, "q")


def test_plasticity_of_hostile_heads(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each head is measured with a note, or named with the reason why not."""
    changes: list[Callable[[pa.Table], pa.Table]] = [
        lambda table: with_values(table, "position", {0: -5}),
        lambda table: with_values(table, "position", {0: 2**31 - 1}),
        lambda table: table.take([3, 3, *range(len(table))][::-1]),
        lambda table: with_values(table, "vector", {row: [float("nan")] * 16 for row in range(len(table))}),
    ]
    for head, change in enumerate(changes):
        path = root / f"l00h0{head}q/data.parquet"
        pq.write_table(change(pq.read_table(path)), path)
    no_parquet(root / "l01h00k/data.parquet")
    restate(root)
    with unchanged(tmp_path, tmp_path / "results"):
        assert measure(root, tmp_path / "results") == 1
    shown = capsys.readouterr().out
    assert "l00h00q is NOT measured" in shown and "has negative positions" in shown
    assert "l00h01q is NOT measured" in shown and "of which plasticity compares all pairs" in shown
    assert "2 queries repeat an example and position (qk_sniffer.verify): l00h02q" in shown
    assert "queries left out, with NaN or infinite numbers: l00h03q" in shown
    assert "l01h00q is NOT measured" in shown and "Traceback" not in shown


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../b", "refs/../x", "-x", "a\nb", ".."])
def test_a_revision_is_no_path(revision: str, hub: FakeHub, tmp_path: Path) -> None:
    with unchanged(tmp_path), pytest.raises(HubError, match="it must be a branch, a tag or a commit"):
        qk_sniffer.open_dataset(REPO, revision=revision)
    assert hub.log == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("../x", BRANCH, "a" * 40), "is not the name of a repository"),
        ((REPO, "../x", "a" * 40), "is not a revision"),
        ((REPO, BRANCH, "../../x"), "is not a commit"),
        ((REPO, BRANCH, "main"), "is not a commit"),
    ],
)
def test_a_place_on_the_hub_is_no_path(place: tuple[str, str, str], message: str) -> None:
    with pytest.raises(HubError, match=message):
        Branch(*place)


@pytest.mark.parametrize("commit", ["main", "../../x", "a" * 39, "sha256:abc", "a" * 40 + "\n"])
def test_a_commit_in_a_manifest_is_one(commit: str, root: Path) -> None:
    edit(root, lambda manifest: manifest["commits"].update(model=commit))
    with pytest.raises(StoreError, match=r"manifest\.json is not understood .*commits\.model"):
        qk_sniffer.open_dataset(root)


@pytest.mark.usefixtures("endpoint")
def test_a_manifest_that_is_too_large_is_not_fetched(
    hub: FakeHub, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPO, {"manifest.json": b" " * 2_000_000}, BRANCH)
    monkeypatch.setattr("qk_sniffer.hub.branch.LARGE", 1 << 20)
    with pytest.raises(HubError, match="is larger than 1 MB: it is not fetched"):
        qk_sniffer.open_dataset(REPO, revision=BRANCH)
    assert hub.count("GET", "/manifest.json") == 0


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].update({"../../x": {"bytes": 1, "sha256": "0" * 64}}),
        lambda manifest: manifest["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda manifest: manifest["model"]["layers"][0].update(head_dim=10**9),
    ],
)
def test_a_hostile_manifest_on_a_branch(change: Any, hub: FakeHub, root: Path, tmp_path: Path) -> None:
    edit(root, change)
    hub.commit(REPO, {"manifest.json": (root / "manifest.json").read_bytes()}, BRANCH)
    with unchanged(tmp_path, tmp_path / "hub"), pytest.raises(UnreadableError):
        qk_sniffer.open_dataset(REPO, revision=BRANCH)


@pytest.mark.usefixtures("endpoint")
def test_a_hostile_file_on_a_branch(hub: FakeHub, root: Path, tmp_path: Path) -> None:
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.commit(REPO, files | {FILE: b"PAR1 nothing"}, BRANCH)
    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    with unchanged(tmp_path, tmp_path / "hub"), pytest.raises(StoreError, match="12 bytes instead of"):
        dataset.vectors(0, 1, "q")
    assert len(dataset.examples) == dataset.manifest["examples"]


@pytest.mark.usefixtures("endpoint")
def test_a_link_in_a_cache_of_someone_else_leads_nowhere(hub: FakeHub, root: Path, tmp_path: Path) -> None:
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.commit(REPO, files, BRANCH)
    dataset = qk_sniffer.open_dataset(REPO, revision=BRANCH)
    rows = len(dataset.vectors(0, 1, "q").vectors)
    cached = dataset._files.path(FILE)
    elsewhere = tmp_path / "elsewhere.parquet"
    elsewhere.write_bytes(files[FILE])
    cached.unlink()
    cached.symlink_to(elsewhere)
    with pytest.raises(StoreError, match=rf"leads out of the dataset, to {elsewhere}: it is not read"):
        dataset.vectors(0, 1, "q")
    cached.unlink()
    assert len(dataset.vectors(0, 1, "q").vectors) == rows


def test_no_commit_is_recorded_through_a_link_in_a_cache(tmp_path: Path) -> None:
    snapshot, mine = tmp_path / "datasets--a--b" / "snapshots" / ("a" * 40), tmp_path / "mine"
    snapshot.mkdir(parents=True)
    mine.mkdir()
    refs = snapshot.parent.parent / "refs"
    refs.symlink_to(mine)
    hub_branch._remember(snapshot, "main")
    assert list(mine.iterdir()) == []
    refs.unlink()
    hub_branch._remember(snapshot, "by/name")
    assert (refs / "by" / "name").read_text() == "a" * 40


@pytest.mark.parametrize(("name", "is_read"), [("ab/" + "ab" * 32, True), ("ab/id_rsa", False), ("ab" * 32, False)])
def test_a_file_of_the_cache_may_be_among_the_blobs_of_the_whole_cache(
    name: str, is_read: bool, tmp_path: Path
) -> None:
    """Where huggingface_hub keeps the files that came by Xet."""
    blob = tmp_path / "blobs" / name
    snapshot = tmp_path / "datasets--org--vectors" / "snapshots" / ("0" * 40)
    for folder in (blob.parent, snapshot, snapshot.parent.parent / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    blob.write_text("content")
    of_repository = snapshot.parent.parent / "blobs" / "etag"
    of_repository.symlink_to(blob)
    (snapshot / "file").symlink_to(of_repository)
    if is_read:
        with open_inside(snapshot, "file") as file:
            assert file.read() == b"content"
    else:
        with pytest.raises(StoreError, match="leads out of the dataset"):
            open_inside(snapshot, "file")
