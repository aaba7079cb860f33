"""Real datasets, whole and really harmed: each harm is found, under its name, by the check that is there for it."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from jobs import TEXTS, Stopped, run, stop_at

from qk_sniffer import capture as capture_room
from qk_sniffer import verify as verify_room
from qk_sniffer import verify_rows
from qk_sniffer.store.layout import HeadKey, Layout, head_name
from qk_sniffer.store.locks import hold, is_held
from qk_sniffer.verify import verify
from qk_sniffer.verify_report import ANEW, Fault, Report, named

HEAD = "l00h01q"
FILE = f"{HEAD}/data.parquet"
LAYER_0_QUERIES = [f"l00h{head:02d}q" for head in range(4)]
QUERY_1 = "query head 1 of layer 0"


@pytest.fixture(scope="session")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with some of the rows: head_dim 16, layers 0 and 2 with windows of 12, 4 query and 2 key heads."""
    folder = tmp_path_factory.mktemp("verify")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        import datasets.config

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        return run(checkpoint, texts, folder / "out", sampler={"type": "uniform", "base_rate": 6.0})


@pytest.fixture
def root(base: Path, tmp_path: Path) -> Path:
    """A copy of that dataset, to be harmed."""
    return Path(shutil.copytree(base, tmp_path / "out"))


def verified(root: Path) -> str:
    """The report, which must not depend on how much is read at a time."""
    report = verify(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_rows, "BLOCK_TOKENS", 100)
        patch.setattr(verify_rows, "BATCH_ROWS", 20)
        patch.setattr(verify_rows, "BATCH_BYTES", 5000)
        patch.setattr(verify_room, "HEADS_PER_TASK", 3)
        assert str(verify(root)) == str(report)
    text = str(report)
    assert text.endswith(f"NOT WHOLE: {report.problems} problem{'s'[: report.problems != 1]}") == bool(report.problems)
    return text


def wrong(text: str) -> dict[str, str]:
    """What is told of each problem's check, on one line each."""
    found: dict[str, str] = {}
    blocks = re.findall(r"^  (\w+) +WRONG  (.*(?:\n {25}.*)*)", text, flags=re.MULTILINE)
    for check, said in blocks:
        assert "way out: " in said
        found[check] = found.get(check, "") + re.sub(r"\s+", " ", said)
    return found


def rewrite(root: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes the table of a Parquet file, and makes the manifest agree with the new file."""
    path = root / name
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    restate(root)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def restate(root: Path) -> None:
    """Makes what the manifest says of its files true."""

    def change(manifest: dict[str, Any]) -> None:
        buckets: dict[str, Counter[str]] = {"q": Counter(), "k": Counter()}
        for name, entry in manifest["files"].items():
            data = (root / name).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if name.endswith(".parquet") and data.startswith(b"PAR1"):
                entry["rows"] = pq.read_metadata(root / name).num_rows
            if name.startswith("l") and data.startswith(b"PAR1"):
                column = pq.read_table(root / name)
                if "bucket" in column.column_names:
                    buckets[name[6]].update(map(str, column["bucket"].to_pylist()))
        manifest["rows_by_bucket"] = buckets
        manifest["rows"] = sum(counter.total() for counter in buckets.values())

    edit(root, change)


def with_values(table: pa.Table, column: str, values: dict[int, Any]) -> pa.Table:
    """`table` with other values of `column` in some rows."""
    place = table.schema.get_field_index(column)
    there = table[column].to_pylist()
    for row, value in values.items():
        there[row] = value
    return table.set_column(place, table.schema.field(column), pa.array(there, table.schema.field(column).type))


def value(table: pa.Table, column: str, row: int) -> Any:
    return table[column][row].as_py()


# Whole datasets


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"sampler": {"type": "log_uniform", "min_bucket_size": 8, "base_rate": 2.0, "seed": 3}},
        {"sampler": {"type": "uniform", "share": "example", "base_rate": 4.0}},
        {"sampler": {"type": "uniform", "keys": {"type": "all"}, "max_rows_per_example": 5}},
        {"sampler": {"type": "log_uniform", "keys": {"type": "uniform", "base_rate": 7.5}}},
        {"sampler": {"type": "uniform", "base_rate": 1e-9}},
        {"capture": {"capture_token_ids": True, "capture_token_strings": True}},
        {"capture": {"capture_token_strings": True, "layers": [0, 2], "heads": [3]}},
        {"capture": {"capture_pre_rope": True, "capture_queries": False}},
        {"capture": {"full_attention_only": True, "capture_keys": False}},
        {"capture": {"head_sampling": {"count": 5, "seed": 1}}, "dataset": {"id_column": "id", "streaming": True}},
        {"model": {"dtype": "bfloat16", "tokenizer": {"max_length": 30}}, "dataset": {"max_samples": 7}},
        {"verify": {"examples": 0}, "inference": {"batch_size": 2}},
    ],
    ids=str,
)
def test_what_a_job_makes_is_whole(sections: dict[str, Any], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sections = {"verify": {"examples": 0}} | sections
    root = run(checkpoint, texts, tmp_path / "out", **sections)
    text = verified(root)
    assert wrong(text) == {} and re.search(r"\nwhole: \d+ heads?, [\d,]+ rows, [\d.]+ MB$", text)


def test_what_shards_make_is_whole(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for index in (1, 0):
        assert "no manifest.json" in str(verify(tmp_path / "out")) or index == 1
        run(checkpoint, texts, tmp_path / "out", shard={"index": index, "count": 2})
    assert wrong(verified(tmp_path / "out")) == {}


def test_what_was_added_to_is_whole(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    for count in (7, 15):
        run(checkpoint, texts, tmp_path / "out", dataset={"max_samples": count})
    text = verified(tmp_path / "out")
    assert wrong(text) == {} and "examples        ok     15, with " in text


def test_the_report_says_what_was_found(base: Path) -> None:
    text = verified(base)
    manifest = json.loads((base / "manifest.json").read_text())
    rows, size = manifest["rows"], sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    assert text.endswith(f"\n\nwhole: 18 heads, {rows:,} rows, {size:,.1f} MB")
    assert f"sampler         ok     18 heads: {rows:,} rows, exactly those that the sampler chooses" in text
    assert "heads           ok     18: query heads 0-3 of layers 0-2; key heads 0-1 of layers 0-2" in text
    assert f"files           ok     20 files, {size:,.1f} MB: size and sha256" in text
    assert "derived again by the job, differ by" in text
    tokens = np.array([len(text) for text in TEXTS])
    for kind, name, heads in (("q", "query", 12), ("k", "key", 6)):
        for bucket, there in manifest["rows_by_bucket"][kind].items():
            first = 16 * int(bucket)
            expected = heads * 6 / 16 * np.clip(tokens - first, 0, 16).sum()
            last = min(first + 15, tokens.max() - 1)
            assert re.search(rf"  {name} +{bucket} +{first} to {last} +{there:,} +{expected:,.0f}\n", text)


def test_many_buckets_share_lines(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    sampler = {"type": "uniform", "min_bucket_size": 2, "base_rate": 1.0}
    text = verified(run(checkpoint, texts, tmp_path / "out", sampler=sampler))
    table = [line.split() for line in text.split("\n\n")[1].splitlines()[1:]]
    assert 12 < len(table) <= 24
    expected = {
        kind: sum(float(row[-1].replace(",", "")) for row in table if row[0] == kind) for kind in ("query", "key")
    }
    tokens = sum(map(len, TEXTS))
    assert abs(expected["query"] - 12 * tokens / 2) < 12 and abs(expected["key"] - 6 * tokens / 2) < 12


def test_vectors_that_are_not_finite_are_counted(root: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        vector = value(table, "vector", 2)
        return with_values(table, "vector", {2: [*vector[:-1], float("nan")], 5: [float("inf"), *vector[1:]]})

    rewrite(root, FILE, spoil)
    edit(root, lambda manifest: manifest["nonfinite_rows"].update({FILE: 2}))
    text = verified(root)
    assert wrong(text) == {} and f"vector          note   2 vectors with NaN or Inf in {QUERY_1}" in text
    edit(root, lambda manifest: manifest["nonfinite_rows"].clear())
    assert (
        f"NaN or Inf is not that in manifest.json ({QUERY_1}) {HEAD}: 2 instead of 0" in wrong(verified(root))["vector"]
    )


def test_a_file_is_not_kept_in_memory(root: Path) -> None:
    group = pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(np.random.rand(1 << 18)), 16)})
    with pq.ParquetWriter(root / "large.parquet", group.schema) as writer:
        for _ in range(20):
            writer.write_table(group)
    with pq.ParquetFile(root / "large.parquet") as file:
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in verify_rows.batches(file, 1 << 10, ["vector"])]
    assert max(held) < 4 * group.nbytes


def test_a_manifest_of_the_first_days(root: Path) -> None:
    edit(root, lambda manifest: [manifest.pop(key) for key in ("proof", "nonfinite_rows")])
    text = verified(root)
    assert wrong(text) == {} and "proof           note   not proven: manifest.json has no proof" in text


# Harmed files


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root: flip(root / FILE, 300), f"another sha256 {FILE} way out: fetch the dataset again, or make it"),
        (lambda root: os.truncate(root / FILE, 1000), f"not of the size in manifest.json {FILE}: 1,000 bytes, not "),
        (lambda root: (root / FILE).unlink(), f"listed in manifest.json, but not there {FILE}"),
        (lambda root: shutil.rmtree(root / HEAD), f"listed in manifest.json, but not there {FILE}"),
        (lambda root: shutil.copytree(root / HEAD, root / "l09h01q"), "does not list it l09h01q/data.parquet way"),
        (lambda root: (root / HEAD / "more.parquet").touch(), f"does not list it {HEAD}/more.parquet way out: remove"),
        (lambda root: flip(root / "README.md", 300), "another sha256 README.md"),
        (
            lambda root: [flip(root / f"l01h0{i}q" / "data.parquet", 300) for i in range(4)],
            "l01h02q/data.parquet (and 1 more)",
        ),
    ],
)
def test_a_file_that_is_not_the_manifests(harm: Callable[[Path], object], said: str, root: Path) -> None:
    harm(root)
    text = verified(root)
    assert wrong(text).keys() == {"files"} and said in wrong(text)["files"]
    assert "sampler         ok " in text  # the others were looked into


def test_files_of_others_do_not_matter(root: Path) -> None:
    (root / "notes").mkdir()
    for name in ("notes/data.parquet", "notes.txt", ".gitattributes", f"{HEAD}/.nfs0001"):
        (root / name).write_text("mine")
    assert wrong(verified(root)) == {}


def test_a_file_that_cannot_be_read_says_why(root: Path) -> None:
    (root / FILE).unlink()
    (root / FILE).mkdir()
    size = (root / FILE).stat().st_size
    edit(root, lambda manifest: manifest["files"][FILE].update(bytes=size))
    assert "cannot be read: Is a directory" in wrong(verified(root))["files"]


# Harmed rows: the manifest has the file's true sha256, so that only the check that is named can find them


def drop(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 5), table.slice(7)])


def swap(table: pa.Table) -> pa.Table:
    order = np.arange(len(table))
    order[[3, 4]] = 4, 3
    return table.take(order)


def swap_examples(table: pa.Table) -> pa.Table:
    last = pc.equal(table["example_id"], 23)
    return pa.concat_tables([table.filter(last), table.filter(pc.invert(last))])


def unchosen(table: pa.Table) -> pa.Table:
    """A row more, of a position that the sampler leaves out."""
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


@pytest.mark.parametrize(
    ("change", "checks", "said"),
    [
        (
            drop,
            {"sampler", "alike"},
            f"rows that the sampler chooses are missing (2 rows in {QUERY_1}) {HEAD}: example ",
        ),
        (
            unchosen,
            {"sampler", "alike"},
            f"there are rows that the sampler does not choose (1 row in {QUERY_1}) {HEAD}: example 0,",
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
            f"there twice (1 row in {QUERY_1}) {HEAD}: row 1, example 0",
        ),
        (
            lambda t: with_values(t, "bucket", {1: 9}),
            {"bucket"},
            f"buckets are not those of the positions (1 row in {QUERY_1}) {HEAD}: row 1,",
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
def test_rows_that_are_not_the_contracts(
    change: Callable[[pa.Table], pa.Table], checks: set[str], said: str, root: Path
) -> None:
    rewrite(root, FILE, change)
    text = verified(root)
    # A bucket that is left out, or one more, also shows in what the manifest sums up; that is restated here.
    assert wrong(text).keys() - {"manifest"} == checks
    assert any(said in words for words in wrong(text).values()), text


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


def test_several_harms_are_all_told(root: Path) -> None:
    rewrite(root, FILE, swap)
    rewrite(root, "l02h00k/data.parquet", drop)
    flip(root / "l01h00k" / "data.parquet", 300)
    (root / "l01h01k" / "data.parquet").unlink()
    text = verified(root)
    assert wrong(text).keys() == {"order", "alike", "sampler", "files"}
    assert text.endswith("NOT WHOLE: 5 problems")
    assert "bucket          ok     16 of 18 heads: " in text


@pytest.mark.parametrize("data", [b"not parquet at all", b"PAR1 but then nothing PAR1"])
def test_a_file_that_is_no_parquet(data: bytes, root: Path) -> None:
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


# Harmed examples


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: with_values(t, "example_id", {3: 2}), "an example_id is there twice (2 rows) row 2: index 2,"),
        (
            lambda t: with_values(t, "example_id", {3: 99}),
            "example_id is not the index, though dataset.id_column is null (1 row)",
        ),
        (lambda t: t.take([1, 0, *range(2, len(t))]), "the indices do not ascend (1 row) row 1: index 0"),
        (lambda t: t.slice(1), "the numbers are not those in manifest.json examples: 23, not 24 tokens: "),
        (lambda t: with_values(t, "truncated", {3: True}), "truncated_examples: 1, not 0"),
        (
            lambda t: with_values(t, "num_tokens", {3: 0}),
            "num_tokens is not 1 to 4,096 (model.tokenizer.max_length) (1 row)",
        ),
        (lambda t: t.drop(["text_hash"]), "the columns are not those of the contract example_id int32,"),
        (column_as("num_tokens", pa.int64()), "the columns are not those of the contract"),
        (lambda t: t.slice(0, 0), "examples: 0, not 24"),
    ],
)
def test_examples_that_are_not_the_contracts(change: Callable[[pa.Table], pa.Table], said: str, root: Path) -> None:
    rewrite(root, "examples/data.parquet", change)
    text = verified(root)
    assert said in wrong(text)["examples"], text


def test_rows_cannot_be_checked_without_examples(root: Path) -> None:
    flip(root / "examples" / "data.parquet", 300)
    text = verified(root)
    assert wrong(text).keys() == {"files"}
    assert "sampler         --     the rows were not checked: examples/data.parquet is not sound" in text
    (root / "examples" / "data.parquet").write_bytes(b"no Parquet")
    restate(root)
    assert "cannot be read as Parquet" in wrong(verified(root))["examples"]
    edit(root, lambda manifest: manifest["files"].pop("examples/data.parquet"))
    text = verified(root)
    assert wrong(text).keys() == {"files"}
    assert "but manifest.json does not list it examples/data.parquet way out: fetch" in wrong(text)["files"]


# Harmed manifests


def both(section: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Another value of a setting, in config and fingerprint."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"][section][key] = value
        manifest["fingerprint"][f"{section}.{key}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "checks", "said"),
    [
        (
            lambda m: m["config"]["sampler"].update(seed=1),
            {"manifest", "sampler"},
            "sampler.seed is 1 in config, 0 in fingerprint",
        ),
        (lambda m: m["config"]["model"].update(dtype="float16"), {"manifest"}, "model.dtype is 'float16' in config"),
        (both("sampler", "seed", 1), {"sampler"}, "chooses are missing"),
        (both("sampler", "share", "example"), {"sampler"}, "in all 12 query heads; all 6 key heads)"),
        (both("sampler", "base_rate", 8.0), {"sampler", "manifest"}, "inclusion in manifest.json is not"),
        (
            both("sampler", "min_bucket_size", 32),
            {"sampler", "manifest", "bucket"},
            "inclusion in manifest.json is not",
        ),
        (lambda m: m.update(rows=7), {"manifest"}, "contradicts itself rows is 7, those of files are"),
        (lambda m: m["rows_by_bucket"]["q"].update({"0": 5}), {"manifest"}, "is not what the files hold"),
        (lambda m: m["inclusion"].pop("k"), {"manifest"}, "settings give kind k"),
        (
            lambda m: m.update(source_rows=30),
            {"manifest"},
            "source_rows is 30, but there are 24 examples and 0 skipped_rows",
        ),
        (lambda m: m["files"][FILE].update(rows=1), {"manifest", "parquet"}, "instead of 1 way out"),
        (lambda m: m["files"].pop(FILE), {"heads"}, f"does not list the file of a captured head ({QUERY_1})"),
        (
            lambda m: m["model"]["layers"][0]["captured"]["q"].remove(1),
            {"heads", "manifest"},
            f"no layer says to be captured {FILE}",
        ),
        (
            lambda m: m["model"]["layers"][0].update(sliding_window=None),
            {"metadata", "sliding_window"},
            "sliding_window is 12 instead of null",
        ),
        (lambda m: m["model"]["layers"][1].update(head_dim=8), {"schema"}, "instead of fixed_size_list<"),
        (lambda m: m["commits"].update(model="abc"), {"metadata"}, "says (all 12 query heads; all 6 key heads) "),
        (lambda m: m["proof"].update(proven=False), {"proof"}, "vectors are not those of the model rows of 1 example"),
        (lambda m: m.pop("model"), {"manifest"}, "manifest.json is not understood KeyError: 'model'"),
        (lambda m: m.update(files=[1]), {"manifest"}, "is not understood AttributeError"),
        (lambda m: m["config"]["sampler"].update(kind="x"), {"manifest"}, "is not understood Config"),
        (lambda m: m["config"]["sampler"].update(type="x"), {"manifest"}, "is not understood ConfigError"),
        (lambda m: m.update(format="qk-sniffer/9"), {"manifest"}, "format 'qk-sniffer/1' way out: use the version of"),
    ],
)
def test_a_manifest_that_is_not_the_datasets(
    change: Callable[[dict[str, Any]], object], checks: set[str], said: str, root: Path
) -> None:
    edit(root, change)
    text = verified(root)
    assert wrong(text).keys() == checks, text
    assert any(said in words for words in wrong(text).values()), text


def test_a_manifest_that_is_no_json(root: Path) -> None:
    os.truncate(root / "manifest.json", 100)
    assert "manifest.json cannot be read: " in wrong(verified(root))["manifest"]


def test_nonsense_in_a_manifest_is_never_a_traceback(root: Path) -> None:
    whole = json.loads((root / "manifest.json").read_text())
    places = [(key,) for key in whole]
    places += [(key, name) for key in ("config", "model", "proof", "commits") for name in whole[key]]
    places += [("files", FILE), ("files", FILE, "rows"), ("rows_by_bucket", "q"), ("config", "dataset", "path")]
    for place in places:
        for nonsense in (None, float("inf"), []):

            def spoil(manifest: dict[str, Any], place: tuple[str, ...] = place, nonsense: Any = nonsense) -> None:
                *above, last = place
                for key in above:
                    manifest = manifest[key]
                manifest[last] = nonsense

            edit(root, spoil)
            assert str(verify(root)), place
            edit(root, lambda manifest: manifest.update(whole))


# Incomplete datasets


def test_a_folder_without_a_manifest_is_incomplete(root: Path, tmp_path: Path) -> None:
    (root / "manifest.json").unlink()
    said = wrong(verified(root))["manifest"]
    assert said.startswith("the dataset is incomplete: no manifest.json") and "run its job again, or fetch" in said
    for path in (tmp_path / "nothing", root / "README.md"):
        assert f"there is no folder {path}" in wrong(verified(path))["manifest"]


def test_an_unfinished_job_says_how_far_it_is(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    real = capture_room.Capture.run
    monkeypatch.setattr(capture_room.Capture, "run", lambda self, plan: stop_at(20, plan, self, real))
    with pytest.raises(Stopped):
        run(checkpoint, texts, root, inference={"batch_size": 1, "lookahead": 1})
    before = sorted(root.rglob("*"))
    said = wrong(verified(root))["manifest"]
    assert "no manifest.json 20 examples of 24 rows of the source captured" in said
    assert "way out: run the same command again: it goes on" in said
    code = (
        "import sys; from pathlib import Path; from qk_sniffer.store.locks import hold\n"
        "with hold(Path(sys.argv[1]), 'test'): print('held', flush=True); sys.stdin.read()"
    )
    lock = Layout(root).shard_lock(0, 1)
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        said = wrong(verified(root))["manifest"]
        assert f"process {other.pid} on " in said and "is at work; 20 examples" in said
        assert "way out: wait for the job that runs" in said
        other.communicate("")
    assert sorted(root.rglob("*")) == before
    Layout(root).job_file.unlink()
    assert "has captured nothing yet" in wrong(verified(root))["manifest"]


def test_a_version_that_waits_to_be_published(root: Path) -> None:
    staging = Layout(root).staging.root
    staging.mkdir(parents=True)
    shutil.copy(root / "manifest.json", staging)
    assert ".qk_sniffer is there" in verified(root) and wrong(verified(root)) == {}
    (root / "manifest.json").unlink()
    assert "all files are made; they only have to be put" in wrong(verified(root))["manifest"]


def test_whether_a_lock_is_held_can_be_asked(tmp_path: Path) -> None:
    lock = tmp_path / "work" / "a.lock"
    assert not is_held(lock)
    with hold(lock, "test"):
        assert is_held(lock)
        lock.chmod(0o444)
        assert is_held(lock)
    lock.parent.mkdir()
    lock.write_text("{}")
    assert not is_held(lock)


# The program


@pytest.fixture
def light(tmp_path: Path) -> dict[str, str]:
    """An environment in which the libraries of a job end the process."""
    folder = tmp_path / "light"
    folder.mkdir()
    for name in ("torch", "transformers", "datasets", "huggingface_hub", "pandas"):
        (folder / f"{name}.py").write_text(f"import os\nos.write(2, b'imported {name}')\nos._exit(97)\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def called(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qk_sniffer.verify", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_exit_codes(root: Path, light: dict[str, str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = called(light, f"data_root={root}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "") and "\nwhole: 18 heads, " in done.stdout
    # Processor time, as other tests run beside it.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    flip(root / FILE, 300)
    done = called(light, f"data_root={root}")
    assert (done.returncode, done.stderr) == (1, "") and done.stdout.endswith("\nNOT WHOLE: 1 problem\n")
    (root / "manifest.json").unlink()
    done = called(light, f"data_root={root}")
    assert (done.returncode, done.stderr) == (1, "") and "incomplete: no manifest.json" in done.stdout


def test_settings(root: Path, light: dict[str, str]) -> None:
    done = called(light, f"output.data_root={root}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "output.data_root is no key, did you mean data_root?" in done.stderr
    assert "data_root is not given; it is the dataset's folder" in done.stderr
    done = called(light, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m qk_sniffer.verify data_root=..." in done.stdout and "Exit codes: 0 whole" in done.stdout


def test_heads_are_named_in_few_words() -> None:
    def keys(*names: tuple[int, int, str]) -> list[HeadKey]:
        return [HeadKey(*name) for name in names]

    whole = keys(*((layer, head, "q") for layer in range(6) for head in range(4)), (0, 0, "k"), (1, 0, "k"))
    assert named(whole, whole) == "all 24 query heads; all 2 key heads"
    some = keys((0, 0, "q"), (0, 1, "q"), (2, 0, "q"), (2, 1, "q"), (5, 3, "q"), (1, 0, "k"))
    assert named(some, whole) == "query heads 0-1 of layers 0, 2; query head 3 of layer 5; key head 0 of layer 1"
    report = Report(Path("x"), whole)
    report.add(Fault("order", "not sorted", head_name(key.layer, key.head, key.kind), head=key, rows=2) for key in some)
    report.add([Fault("schema", "other", way_out="mend it")])
    assert str(report).splitlines() == [
        "Dataset: x",
        "  schema          WRONG  other",
        "                         way out: mend it",
        f"  order           WRONG  not sorted (12 rows in {named(some, whole)})",
        "                         l00h00q",
        "                         l00h01q",
        "                         l02h00q (and 3 more)",
        f"                         way out: {ANEW}",
        "NOT WHOLE: 2 problems",
    ]
