"""Tests that the right check of verify finds each damage to files, rows and examples."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.jobs import TEXTS, run
from support.verify_cases import (
    FILE,
    HEAD,
    LAYER_0_QUERIES,
    QUERY_1,
    edit,
    flip,
    restate,
    rewrite,
    value,
    verified,
    with_values,
    wrong,
)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: flip(root / FILE, 300),
            f"the file has changed {FILE} way out: fetch the dataset again, or recreate",
        ),
        (
            lambda root: os.truncate(root / FILE, 1000),
            f"the size differs from manifest.json {FILE}: 1,000 bytes instead of ",
        ),
        (lambda root: (root / FILE).unlink(), f"listed in manifest.json, but missing {FILE}"),
        (lambda root: shutil.rmtree(root / HEAD), f"listed in manifest.json, but missing {FILE}"),
        (lambda root: shutil.copytree(root / HEAD, root / "l09h01q"), "does not list it l09h01q/data.parquet way"),
        (lambda root: (root / HEAD / "more.parquet").touch(), f"does not list it {HEAD}/more.parquet way out: remove"),
        (lambda root: flip(root / "README.md", 300), "the file has changed README.md"),
        (
            lambda root: [flip(root / f"l01h0{i}q" / "data.parquet", 300) for i in range(4)],
            "l01h02q/data.parquet (and 1 more)",
        ),
    ],
)
def test_a_damaged_file(damage: Callable[[Path], object], message: str, root: Path) -> None:
    damage(root)
    text = verified(root)
    assert wrong(text).keys() == {"files"} and message in wrong(text)["files"]
    assert "sampler         ok " in text  # the other files were checked


def test_other_files_do_not_matter(root: Path) -> None:
    (root / "notes").mkdir()
    for name in ("notes/data.parquet", "notes.txt", ".gitattributes", f"{HEAD}/.nfs0001"):
        (root / name).write_text("mine")
    assert wrong(verified(root)) == {}


def test_names_in_a_linked_folder_are_not_shown(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a secret").touch()
    (root / "l09h09q").symlink_to(tmp_path / "elsewhere")
    text = verified(root)
    assert "does not list it l09h09q way out: remove" in wrong(text)["files"] and "a secret" not in text


def test_a_file_that_cannot_be_read_says_why(root: Path) -> None:
    (root / FILE).unlink()
    (root / FILE).mkdir()
    size = (root / FILE).stat().st_size
    edit(root, lambda manifest: manifest["files"][FILE].update(bytes=size))
    assert "cannot be read: Is a directory" in wrong(verified(root))["files"]


# Rows: the manifest has the sha256 of the changed file, so that only the named check can find the damage.


def drop(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 5), table.slice(7)])


@pytest.mark.parametrize("characters", [(5, None), (None, 5), (-1, 3), (7, 6)])
def test_impossible_characters_are_found(
    characters: tuple[int | None, int | None], checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    capture = {"capture_offsets": True, "layers": [0], "heads": [1]}
    root = run(checkpoint, texts, tmp_path / "out", capture=capture, dataset={"max_samples": 2}, verify={"examples": 0})
    assert "offsets         ok " in verified(root)
    start, end = characters
    rewrite(root, FILE, lambda table: with_values(with_values(table, "char_start", {4: start}), "char_end", {4: end}))
    found = wrong(verified(root))
    assert {*found} == {"offsets"}
    assert "char_start and char_end are no range of characters (1 row in" in found["offsets"]


def swap(table: pa.Table) -> pa.Table:
    order = np.arange(len(table))
    order[[3, 4]] = 4, 3
    return table.take(order)


def swap_examples(table: pa.Table) -> pa.Table:
    last = pc.equal(table["example_id"], 23)
    return pa.concat_tables([table.filter(last), table.filter(pc.invert(last))])


def unchosen(table: pa.Table) -> pa.Table:
    """Adds a row at a position that the sampler leaves out."""
    here = {value(table, "position", row) for row in range(len(table)) if value(table, "example_id", row) == 0}
    position = min(set(range(len(TEXTS[0]))) - here)
    row = with_values(with_values(table.slice(0, 1), "position", {0: position}), "bucket", {0: position // 16})
    at = sum(other < position for other in here)
    return pa.concat_tables([table.slice(0, at), row, table.slice(at)])


def last_of_example_0(table: pa.Table) -> int:
    return table["example_id"].to_pylist().count(0) - 1


def column_as(column: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(column)
        return table.set_column(place, pa.field(column, kind, nullable=kind == pa.null()), table[column].cast(kind))

    return change


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "checks", "message"),
    [
        (
            drop,
            {"sampler", "alike"},
            f"rows that the sampler chooses are missing (2 rows in {QUERY_1}) {HEAD}: example ",
        ),
        (
            unchosen,
            {"sampler", "alike"},
            f"the head has rows that the sampler does not choose (1 row in {QUERY_1}) {HEAD}: example 0,",
        ),
        (lambda t: t.slice(0, 0), {"sampler", "alike"}, "chooses are missing"),
        (lambda t: t.slice(0, len(t) - 1), {"sampler", "alike"}, "chooses are missing (1 row in"),
        (
            swap,
            {"order", "alike"},
            f"rows are not sorted by example and position (1 row in {QUERY_1}) {HEAD}: row 4, example 0",
        ),
        (swap_examples, {"order", "alike"}, "rows are not sorted by example and position (1 row in"),
        (
            lambda t: t.take([0, *range(len(t))]),
            {"unique", "alike"},
            f"an example and position occurs twice (1 row in {QUERY_1}) {HEAD}: row 1, example 0",
        ),
        (
            lambda t: with_values(t, "bucket", {1: 9}),
            {"bucket"},
            f"buckets do not match the positions (1 row in {QUERY_1}) {HEAD}: row 1,",
        ),
        (
            lambda t: with_values(t, "example_id", {0: 777}),
            {"example_id", "sampler", "alike"},
            "data.parquet does not have (1 row in",
        ),
        (
            lambda t: with_values(with_values(t, "position", {(at := last_of_example_0(t)): 96}), "bucket", {at: 6}),
            {"position", "sampler", "alike"},
            f"example 0, position 96 of {len(TEXTS[0])} tokens",
        ),
        (lambda t: with_values(t, "position", {0: -1}), {"position", "sampler", "alike"}, "position -1 of"),
        (lambda t: with_values(t, "sliding_window", {1: 13, 2: None}), {"sliding_window"}, ": 13 instead of 12"),
        (lambda t: with_values(t, "sliding_window", {2: None}), {"sliding_window"}, ": null instead of 12"),
        (lambda t: with_values(t, "vector", {2: [None] * 16}), {"vector"}, "numbers that are null (16 rows"),
        (lambda t: t.drop(["sliding_window"]), {"schema"}, f"{HEAD}: bucket, example_id, position, vector instead of"),
        (lambda t: t.select(["example_id", "bucket", *t.column_names[2:]]), {"schema"}, "example_id, bucket, position"),
        (lambda t: t.append_column("token_id", t["bucket"]), {"schema"}, "sliding_window, token_id instead of"),
        (column_as("bucket", pa.int64()), {"schema"}, "bucket is int64 without nulls instead of int32 without nulls"),
        (column_as("vector", pa.list_(pa.float32())), {"schema"}, "vector is list<"),
        (column_as("vector", pa.list_(pa.float16(), 16)), {"schema"}, "vector is fixed_size_list<"),
        (
            lambda t: t.set_column(4, pa.field("sliding_window", pa.null()), pa.nulls(len(t))),
            {"schema"},
            "is null instead of int32",
        ),
        (
            lambda t: t.replace_schema_metadata({**t.schema.metadata, b"layer": b"1"}),
            {"metadata"},
            f"{HEAD}: layer is 1 instead of 0",
        ),
        (lambda t: t.replace_schema_metadata(None), {"metadata"}, "model is missing instead of"),
    ],
)
def test_damaged_rows(change: Callable[[pa.Table], pa.Table], checks: set[str], message: str, root: Path) -> None:
    rewrite(root, FILE, change)
    text = verified(root)
    # Some of these changes also show in the sums of the manifest.
    assert wrong(text).keys() - {"manifest"} == checks
    assert any(message in words for words in wrong(text).values()), text


def test_a_window_where_there_is_none(root: Path) -> None:
    name = "l01h00k/data.parquet"
    rewrite(root, name, lambda table: with_values(table, "sliding_window", {3: 12}))
    assert "key head 0 of layer 1) l01h00k: row 3, " in wrong(verified(root))["sliding_window"]
    assert ": 12 instead of null" in wrong(verified(root))["sliding_window"]


def test_rows_that_all_heads_lack(root: Path) -> None:
    for name in LAYER_0_QUERIES:
        rewrite(root, f"{name}/data.parquet", drop)
    text = verified(root)
    assert wrong(text).keys() == {"sampler"}
    assert "(8 rows in query heads 0-3 of layer 0)" in wrong(text)["sampler"]
    assert "l00h02q: example 0, position " in wrong(text)["sampler"] and "(and 1 more)" in wrong(text)["sampler"]


def test_all_of_several_problems_are_reported(root: Path) -> None:
    rewrite(root, FILE, swap)
    rewrite(root, "l02h00k/data.parquet", drop)
    flip(root / "l01h00k" / "data.parquet", 300)
    (root / "l01h01k" / "data.parquet").unlink()
    text = verified(root)
    assert wrong(text).keys() == {"order", "alike", "sampler", "files"}
    assert text.endswith("NOT WHOLE: 5 problems")
    assert "bucket          ok     16 of 18 heads: " in text


@pytest.mark.parametrize("data", [b"not parquet at all", b"PAR1 but then nothing PAR1"])
def test_a_file_that_is_not_parquet(data: bytes, root: Path) -> None:
    (root / FILE).write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][FILE] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit(root, change)
    text = verified(root)
    assert wrong(text).keys() == {"parquet"} and f"({QUERY_1}) {HEAD}: " in wrong(text)["parquet"]


@pytest.mark.parametrize("column", ["vector", "position"])
def test_damage_within_a_parquet_file(column: str, root: Path) -> None:
    metadata = pq.read_metadata(root / FILE).row_group(0)
    (place,) = (n for n in range(metadata.num_columns) if metadata.column(n).path_in_schema.startswith(column))
    chunk = metadata.column(place)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray((root / FILE).read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    (root / FILE).write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][FILE] |= {"sha256": hashlib.sha256(data).hexdigest()}

    edit(root, change)
    text = verified(root)
    assert wrong(text).keys() - {"alike", "manifest"} == {"parquet"}
    assert f"cannot be read as Parquet ({QUERY_1})" in wrong(text)["parquet"]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: with_values(t, "example_id", {3: 2}), "an example_id occurs twice (2 rows) row 2: index 2,"),
        (
            lambda t: with_values(t, "example_id", {3: 99}),
            "example_id is not the index, although dataset.id_column is null (1 row)",
        ),
        (lambda t: t.take([1, 0, *range(2, len(t))]), "the indices do not ascend (1 row) row 1: index 0"),
        (lambda t: t.slice(1), "the numbers differ from manifest.json examples: 23, not 24 tokens: "),
        (lambda t: with_values(t, "truncated", {3: True}), "truncated_examples: 1, not 0"),
        (
            lambda t: with_values(t, "num_tokens", {3: 0}),
            "num_tokens is not 1 to 4,096 (model.tokenizer.max_length) (1 row)",
        ),
        (lambda t: t.drop(["text_hash"]), "the columns differ from the contract example_id int32,"),
        (column_as("num_tokens", pa.int64()), "the columns differ from the contract"),
        (lambda t: t.slice(0, 0), "examples: 0, not 24"),
    ],
)
def test_damaged_examples(change: Callable[[pa.Table], pa.Table], message: str, root: Path) -> None:
    rewrite(root, "examples/data.parquet", change)
    text = verified(root)
    assert message in wrong(text)["examples"], text


def test_rows_cannot_be_checked_without_examples(root: Path) -> None:
    flip(root / "examples" / "data.parquet", 300)
    text = verified(root)
    assert wrong(text).keys() == {"files"}
    assert "sampler         --     the rows were not checked: examples/data.parquet is damaged" in text
    (root / "examples" / "data.parquet").write_bytes(b"no Parquet")
    restate(root)
    assert "cannot be read as Parquet" in wrong(verified(root))["examples"]
    edit(root, lambda manifest: manifest["files"].pop("examples/data.parquet"))
    text = verified(root)
    assert wrong(text).keys() == {"files"}
    assert "but manifest.json does not list it examples/data.parquet way out: fetch" in wrong(text)["files"]
