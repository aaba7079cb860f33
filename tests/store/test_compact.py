"""Tests compaction: exactly the captured rows, in the form of the contract, with bytes that no history changes."""

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import List, Value, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.store_cases import (
    ALL_COLUMNS,
    HEAD_DIM,
    HEADS,
    SAMPLER,
    Captured,
    Piece,
    by_index,
    captured_journal,
    file_bytes,
    make_dataset,
    put,
    token_string,
)

from qk_sniffer.config import CaptureConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.store import parquet_writer
from qk_sniffer.store.compact import compact
from qk_sniffer.store.compaction_plan import SegmentFiles, find_blocks, plan_compaction
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import OFFSET_COLUMNS, Head, Layout, schema
from qk_sniffer.store.manifest import FileEntry


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_head_has_its_rows_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    corpus = Captured(dtype=dtype, offsets=True, segments=True)
    layout, written = make_dataset(tmp_path, corpus, **ALL_COLUMNS, threads=2)
    for head in HEADS:
        table = pq.read_table(layout.root / head.file)
        expected = corpus.expected(head)
        for name in ("bucket", "example_id", "position", "token_id"):
            np.testing.assert_array_equal(table[name].to_numpy(), expected[name])
        vectors = np.stack(table["vector"].to_numpy())
        np.testing.assert_array_equal(vectors.view(np.uint32), expected["vector"].view(np.uint32))
        assert table["token_str"].to_pylist() == token_string(expected["token_id"])
        assert table["segment"].to_pylist() == expected["segment"].tolist()
        for name in OFFSET_COLUMNS:
            assert [-1 if each is None else each for each in table[name].to_pylist()] == expected[name].tolist()
            assert table[name].null_count > 0
        assert set(table["sliding_window"].to_pylist()) == {head.sliding_window}
        assert table.schema.metadata == {b"qk_sniffer.kind": head.kind.encode()}
        assert written.files[f"l{head.layer:02d}h{head.head:02d}{head.kind}/data.parquet"].rows == table.num_rows


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    bits = np.array([0x7F80, 0xFF80, 0x7FC1, 0x8000, 0x0001, 0x7F7F], np.uint16)
    vectors = torch.from_numpy(np.tile(bits.view(np.int16), (1, 3, 1))).view(torch.bfloat16)
    journal = Journal(tmp_path / "journal")
    corpus = Captured()
    with JournalWriter(journal, queue_bytes=1 << 20, segment_bytes=1 << 20) as writer:
        put(writer, Piece.of(0, "q", vectors, np.zeros(3, np.int32), np.arange(3, dtype=np.int32)))
        writer.complete([corpus.record(0)])
    written = compact(Layout(tmp_path), [journal], [Head(0, 0, "q", 0, 6, None, 0)], SAMPLER)
    assert written.nonfinite_rows == {"l00h00q/data.parquet": 3}
    table = pq.read_table(Layout(tmp_path).staging.head_file(0, 0, "q"))
    stored = np.stack(table["vector"].to_numpy()).view(np.uint32)
    np.testing.assert_array_equal(stored, np.tile(bits.astype(np.uint32) << 16, (3, 1)))


def test_the_schema_is_the_contract(tmp_path: Path) -> None:
    layout, written = make_dataset(tmp_path, Captured(), threads=2)
    found = pq.read_schema(layout.head_file(0, 0, "q"))
    assert [(field.name, field.type, field.nullable) for field in found] == [
        ("bucket", pa.int32(), False),
        ("example_id", pa.int32(), False),
        ("position", pa.int32(), False),
        ("vector", pa.list_(pa.float32(), HEAD_DIM), False),
        ("sliding_window", pa.int32(), True),
    ]
    asked = schema(HEAD_DIM, ALL_COLUMNS["capture"])
    assert [(field.name, field.type, field.nullable) for field in list(asked)[5:]] == [
        ("segment", pa.dictionary(pa.int32(), pa.string()), False),
        ("token_id", pa.int32(), False),
        ("token_str", pa.string(), False),
        ("char_start", pa.int32(), True),
        ("char_end", pa.int32(), True),
    ]
    examples = pq.read_table(layout.examples)
    assert examples["index"].to_pylist() == list(range(12))
    assert examples["example_id"].to_pylist() == [1000 - index for index in range(12)]
    assert examples["source_id"][3].as_py() == "id-3 é\n"
    assert examples["truncated"].to_pylist()[:6] == [True, False, False, False, False, True]
    assert written.truncated_tokens is None, "the journal is as one of an earlier version"


def test_encodings(tmp_path: Path) -> None:
    layout, _ = make_dataset(tmp_path, Captured(offsets=True, segments=True), **ALL_COLUMNS)
    columns = pq.read_metadata(layout.head_file(0, 0, "q")).row_group(0)
    by_name = {columns.column(i).path_in_schema: columns.column(i) for i in range(columns.num_columns)}
    assert "BYTE_STREAM_SPLIT" in by_name["vector.list.element"].encodings
    assert by_name["vector.list.element"].statistics is None
    for name in set(by_name) - {"vector.list.element"}:
        assert "RLE_DICTIONARY" in by_name[name].encodings
    assert by_name["position"].statistics.min is not None
    assert {column.compression for column in by_name.values()} == {"ZSTD"}
    assert not any(column.has_offset_index for column in by_name.values())


def test_an_encoding_that_pyarrow_ignores_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_writer, "LIST_PATH", ".list.item")
    with pytest.raises(StoreError, match="vector"):
        make_dataset(tmp_path, Captured())


def test_other_readers_see_the_same_rows(tmp_path: Path) -> None:
    corpus = Captured()
    layout, _ = make_dataset(tmp_path, corpus)
    expected = {head: corpus.expected(head) for head in HEADS if head.kind == "q" and head.layer == 3}
    head, path = HEADS[6], layout.head_file(3, 0, "q")
    assert (head.layer, head.head, head.kind) == (3, 0, "q")
    vectors = expected[head]["vector"]
    np.testing.assert_array_equal(np.stack(pd.read_parquet(path)["vector"]), vectors)
    np.testing.assert_array_equal(pl.read_parquet(path)["vector"].to_numpy(), vectors)
    np.testing.assert_array_equal(np.array(duckdb.sql(f"select vector from '{path}'").fetchall())[:, 0], vectors)
    (stored,) = load_dataset("parquet", data_files=str(path)).values()
    assert stored.features["vector"] == List(Value("float32"), length=HEAD_DIM)
    np.testing.assert_array_equal(np.array(stored["vector"], np.float32), vectors)
    rows = sum(len(columns["position"]) for columns in expected.values())
    assert duckdb.sql(f"select count(*) from '{tmp_path}/l03h*q/data.parquet'").fetchall() == [(rows,)]
    assert pl.scan_parquet(tmp_path / "l03h*q/data.parquet").select(pl.len()).collect().item() == rows


def test_a_head_without_rows_is_an_empty_file_that_readers_read(tmp_path: Path) -> None:
    journal = captured_journal(tmp_path / "journal", Captured())
    written = compact(Layout(tmp_path), [journal], [*HEADS, Head(7, 0, "k", 0, 8, None, 0)], SAMPLER)
    path = Layout(tmp_path).staging.head_file(7, 0, "k")
    assert written.files["l07h00k/data.parquet"].rows == 0
    assert pq.read_table(path).schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert len(pd.read_parquet(path)) == len(pl.read_parquet(path)) == 0
    assert duckdb.sql(f"select * from '{path}'").fetchall() == []


def test_row_groups_are_bounded_and_follow_from_the_rows_alone(tmp_path: Path) -> None:
    corpus = Captured(num_examples=30)
    journal = captured_journal(tmp_path / "journal", corpus)
    compact(Layout(tmp_path), [journal], HEADS, SAMPLER, row_group_bytes=10 * HEAD_DIM * 4)
    for head in HEADS:
        metadata = pq.read_metadata(Layout(tmp_path).staging.root / head.file)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        assert len(sizes) > 10
        assert set(sizes[:-1]) == {10} and sizes[-1] <= 10
        table = pq.read_table(Layout(tmp_path).staging.root / head.file)
        np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), corpus.expected(head)["vector"])


def test_a_row_group_reads_hardly_more_than_its_rows(tmp_path: Path) -> None:
    count, corpus = 400, Captured()
    order = np.random.default_rng(0).permutation(count)
    journal = Journal(tmp_path)
    with JournalWriter(journal, queue_bytes=1 << 30, segment_bytes=1 << 30) as writer:
        index = np.repeat(order, 5)
        put(writer, Piece.of(0, "q", torch.zeros(1, len(index), 4), index, np.tile(np.arange(5), count)))
        writer.complete([corpus.record(index) for index in range(count)])
    with SegmentFiles() as files:
        plan = plan_compaction(find_blocks([journal])[0, "q"], files)
    for rows_per_group in (33, 500, 5 * count):
        groups = list(plan.groups(rows_per_group))
        assert sum(len(group.key) for group in groups) == 5 * count
        assert all(group.buffer_rows <= 2 * len(group.key) for group in groups)
    (whole,) = groups
    assert len(whole.spans) == 1 and whole.buffer_rows == 5 * count  # shuffled examples of one block: one read


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    segment_bytes=st.integers(1, 1 << 16),
    batch=st.integers(1, 12),
    shards=st.integers(1, 3),
    threads=st.integers(1, 3),
    stops=st.lists(st.integers(0, 40), max_size=3),
)
def test_the_same_rows_make_the_same_bytes_whatever_the_history(
    tmp_path_factory: pytest.TempPathFactory,
    segment_bytes: int,
    batch: int,
    shards: int,
    threads: int,
    stops: list[int],
) -> None:
    root = tmp_path_factory.mktemp("dataset")
    layout, corpus = Layout(root), Captured(batch=batch)
    folders = [layout.journal(shard, shards) for shard in range(shards)]
    for stop in [*stops, None]:  # jobs that die after `stop` pieces, then one that finishes
        for shard, folder in enumerate(folders):
            journal = Journal(folder)
            others = {index for index in range(12) if index % shards != shard}
            try:
                with JournalWriter(journal, queue_bytes=1 << 16, segment_bytes=segment_bytes) as writer:
                    count = 0
                    for indices in filter(None, corpus.batches(by_index(journal).keys() | others)):
                        for piece in corpus.pieces(indices):
                            put(writer, piece)
                            count += 1
                            if count == stop:
                                raise StoppedError
                        writer.complete([corpus.record(index) for index in indices])
            except StoppedError:
                pass
    compact(layout, [Journal(folder) for folder in folders], HEADS, SAMPLER, threads=threads)
    global _reference
    found = file_bytes(layout.staging.root)
    _reference = _reference or found
    assert found == _reference


class StoppedError(Exception):
    pass


_reference: dict[str, bytes] = {}


def test_entries_are_those_of_the_files(tmp_path: Path) -> None:
    layout, written = make_dataset(tmp_path, Captured())
    assert {name: FileEntry.of(data).sha256 for name, data in file_bytes(tmp_path).items()} == {
        name: entry.sha256 for name, entry in written.files.items()
    } | {name: FileEntry.of((layout.root / name).read_bytes()).sha256 for name in ("README.md", "manifest.json")}
    assert written.rows == sum(entry.rows or 0 for name, entry in written.files.items() if name[0] == "l")
    queries = [pq.read_table(path)["bucket"].to_numpy() for path in sorted(tmp_path.glob("l*h*q/data.parquet"))]
    buckets, counts = np.unique(np.concatenate(queries), return_counts=True)
    assert written.rows_by_bucket["q"] == dict(zip(buckets.tolist(), counts.tolist(), strict=True))


def test_an_example_in_two_journals_is_refused(tmp_path: Path) -> None:
    journals = [captured_journal(tmp_path / name, Captured()) for name in ("one", "two")]
    with pytest.raises(StoreError, match=r"examples .* are in .* another shard"):
        compact(Layout(tmp_path), journals, HEADS, SAMPLER)


def test_rows_captured_twice_are_refused(tmp_path: Path) -> None:
    journal = captured_journal(tmp_path / "journal", Captured())
    journal.segments.append(journal.segments[0])
    with pytest.raises(StoreError, match="captured twice"):
        compact(Layout(tmp_path), [journal], HEADS, SAMPLER)


def test_missing_columns_or_heads_are_an_error(tmp_path: Path) -> None:
    journal = captured_journal(tmp_path / "journal", Captured(token_ids=False))
    with pytest.raises(StoreError, match="captured without token_id, which the columns of the dataset need"):
        compact(Layout(tmp_path), [journal], HEADS, SAMPLER, capture=CaptureConfig(capture_token_ids=True))
    with pytest.raises(StoreError, match="captured without char_end and char_start"):
        compact(Layout(tmp_path), [journal], HEADS, SAMPLER, capture=CaptureConfig(capture_offsets=True))
    with pytest.raises(StoreError, match="example 0 was captured without segments"):
        compact(Layout(tmp_path), [journal], HEADS, SAMPLER, capture=CaptureConfig(capture_segments=True))
    with pytest.raises(StoreError, match="4 heads"):
        compact(Layout(tmp_path), [journal], [Head(0, 4, "q", 2, HEAD_DIM, None, 4)], SAMPLER)


def test_damage_after_the_journal_was_opened_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with JournalWriter(journal, queue_bytes=1 << 20, segment_bytes=1 << 14) as writer:
        Captured().write(writer)
    data = bytearray(journal.segments[1].read_bytes())
    data[-5] ^= 1
    journal.segments[1].write_bytes(data)
    with pytest.raises(StoreError, match=journal.segments[1].name):
        compact(Layout(tmp_path), [journal], HEADS, SAMPLER)


def test_an_error_in_one_thread_ends_the_compaction(tmp_path: Path) -> None:
    journal = captured_journal(tmp_path / "journal", Captured())

    class Broken:
        def bucket(self, kind: str, positions: np.ndarray) -> np.ndarray:
            raise RuntimeError("no buckets")

    with pytest.raises(RuntimeError, match="no buckets"):
        compact(Layout(tmp_path), [journal], HEADS, Broken(), threads=2)
    assert not Layout(tmp_path).staging.manifest.exists()
