"""Examples that are parts of one text: in the journal, in a compaction, and in segments of earlier versions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.store_cases import HEADS, SAMPLER, Captured, Piece, captured_journal, put

from qk_sniffer.errors import StoreError
from qk_sniffer.store.compact import compact
from qk_sniffer.store.compact_examples import numbered
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import Head, Layout
from qk_sniffer.store.rows import MOST_INDEX, MOST_PARTS, RUN_COLUMNS, example_key, index_of, keys_of, with_parts
from qk_sniffer.store.segment import Tensor, read_array, read_header, whole_segment

HEAD = Head(0, 0, "q", 0, 4, None, 0)


def record(index: int, part: int, *, is_last: bool = True) -> ExampleRecord:
    of_part = {"part": part, "first_token": 9 * part, "is_last": is_last}
    return ExampleRecord(index, 50 + index, f"doc-{index}", 9, False, "00", **of_part)


def rows(parts: list[tuple[int, int]], positions: list[int]) -> Piece:
    """Rows of examples at the same positions. A vector holds index, part and position."""
    of_row = [(index, part, position) for index, part in parts for position in positions]
    index, part, position = np.array(of_row, np.int64).T
    vectors = torch.tensor([[[float(i), float(p), float(at), 0.0] for i, p, at in of_row]])
    piece = Piece.of(0, "q", vectors, index, position)
    tokens = replace(piece.rows.tokens, part=part)
    return replace(piece, rows=replace(piece.rows, tokens=tokens))


def write(folder: Path, *batches: list[tuple[int, int]]) -> Journal:
    with JournalWriter(Journal(folder), queue_bytes=1 << 20, segment_bytes=1 << 20) as writer:
        for batch in batches:
            put(writer, rows(batch, [0, 3, 7]))
            writer.complete([record(*example) for example in batch])
    return Journal(folder)


@given(st.integers(0, MOST_INDEX - 1), st.integers(0, MOST_PARTS - 1), st.integers(0, 3))
def test_keys_ascend_by_index_and_then_by_part(index: int, part: int, more: int) -> None:
    key = example_key(index, part)
    assert index_of(key) == index and key < example_key(index + 1, 0) and 0 <= key < 2**63
    assert example_key(index, part + more) - key == more
    runs = np.zeros((1, len(RUN_COLUMNS)), np.int64)
    runs[0, [1, -1]] = index, part
    assert keys_of(runs).tolist() == [key]


def test_the_rows_of_parts_are_ordered_and_numbered(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    journal = write(layout.journal(0, 1), [(5, 2), (2, 1)], [(2, 0), (5, 0), (3, 0)], [(5, 1)])
    order = [(2, 0), (2, 1), (3, 0), (5, 0), (5, 1), (5, 2)]
    assert sorted(journal.records) == [example_key(*each) for each in order]
    assert all(journal.records[example_key(*each)] == record(*each) for each in order)
    written = compact(layout, [journal], [HEAD], SAMPLER, split=True)
    table = pq.read_table(layout.staging.root / HEAD.file)
    numbers = [52, -1, 53, 55, -2, -3]
    assert table["example_id"].to_pylist() == np.repeat(numbers, 3).tolist()
    assert table["position"].to_pylist() == [0, 3, 7] * 6
    assert [vector[:3] for vector in table["vector"].to_pylist()] == [[*each, at] for each in order for at in (0, 3, 7)]
    listed = pq.read_table(layout.staging.examples)
    assert listed["example_id"].to_pylist() == numbers
    assert listed["part"].to_pylist() == [part for _, part in order]
    assert listed["first_token"].to_pylist() == [9 * part for _, part in order]
    assert listed["source_id"].to_pylist() == [f"doc-{index}" for index, _ in order]
    assert (written.num_examples, written.num_texts) == (6, 3)


def test_journals_of_shards_name_a_part_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    journals = [write(layout.journal(0, 2), [(2, 0), (2, 1)]), write(layout.journal(1, 2), [(3, 0)], [(2, 1)])]
    with pytest.raises(StoreError, match=r"examples \[2\] are in .* and in another shard's journal"):
        compact(layout, journals, [HEAD], SAMPLER, split=True)


def test_a_part_is_complete_once(tmp_path: Path) -> None:
    with JournalWriter(Journal(tmp_path), queue_bytes=1 << 20, segment_bytes=1) as writer:
        put(writer, rows([(2, 1)], [0]))
        with pytest.raises(ValueError, match=r"rows of examples \[2\] were committed"):
            writer.complete([record(2, 0)])
        writer.complete([record(2, 1)])
        with pytest.raises(ValueError, match=r"examples \[2\] are complete already"):
            writer.complete([record(2, 1)])
        writer.complete([record(2, 0)])


def test_rows_of_a_part_that_no_batch_lists_are_damage(tmp_path: Path) -> None:
    journal = write(tmp_path, [(2, 0), (2, 1)])
    (path,) = journal.segments
    header = read_header(path)
    metadata = dict(header.metadata)
    metadata["ended"] = metadata["ended"].replace(", 1, 9, true, 0]", ", 2, 9, true, 0]")
    assert metadata != header.metadata
    rewrite(path, metadata, len(RUN_COLUMNS))
    assert len(Journal(tmp_path).damaged) == 1


def test_records_of_earlier_versions_begin_at_the_first_token(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [(2, 0)]).segments
    metadata = dict(read_header(path).metadata)
    metadata["ended"] = metadata["ended"].replace("true, 0]]", "true]]")
    rewrite(path, metadata, len(RUN_COLUMNS))
    assert Journal(tmp_path).records == {example_key(2, 0): record(2, 0)}


def rewrite(path: Path, metadata: dict[str, str], columns: int) -> None:
    """Writes a segment again with other metadata, and the first `columns` of its runs."""
    tensors = []
    types = {"I64": np.int64, "I32": np.int32, "BF16": np.uint16, "F32": np.float32}
    header = read_header(path)
    with path.open("rb") as file:
        for name, place in header.tensors.items():
            array = read_array(file, place, types[place.dtype])  # type: ignore[arg-type]
            if name.endswith(".runs"):
                array = array[:, :columns]
            tensors.append(Tensor(name, place.dtype, array.shape, lambda array=array: [array]))  # type: ignore[misc]
    path.unlink()
    with whole_segment(path.parent, int(path.name.split("-")[0]), tensors, metadata) as (_, _, publish):
        publish()


@pytest.mark.parametrize("fields", [6, 9, 10])
def test_a_journal_of_an_earlier_version_is_read(fields: int, tmp_path: Path) -> None:
    corpus, layout = Captured(), Layout(tmp_path)
    whole = captured_journal(layout.journal(0, 1), corpus)
    for path in whole.segments:
        metadata = dict(read_header(path).metadata)
        ended = json.loads(metadata["ended"])
        for end in ended:
            end["records"] = [values[:fields] for values in end["records"]]
        rewrite(path, metadata | {"ended": json.dumps(ended)}, 6)
    journal = Journal(layout.journal(0, 1))
    assert journal.is_whole and journal.records == whole.records
    compact(layout, [journal], HEADS, SAMPLER)
    for head in HEADS:
        table = pq.read_table(layout.staging.root / head.file)
        assert table["example_id"].to_pylist() == corpus.expected(head)["example_id"].tolist()


def test_runs_of_earlier_versions_are_of_first_parts() -> None:
    assert with_parts(np.ones((2, 6), np.int64)).tolist() == [[1] * 6 + [0]] * 2
    assert with_parts(np.ones((2, 7), np.int64)).tolist() == [[1] * 7] * 2


@given(st.lists(st.integers(1, 4), max_size=12), st.integers(0, 12))
def test_numbers_of_parts_stay_when_texts_are_added(parts: list[int], cut: int) -> None:
    whole = [record(index, part) for index, number in enumerate(parts) for part in range(number)]
    found = numbered(whole, 0)
    ids = [each.example_id for each in found]
    assert len({*ids}) == len(ids)
    assert [each for each in ids if each >= 0] == [50 + index for index in range(len(parts))]
    assert [each for each in ids if each < 0] == [-1 - number for number in range(len(whole) - len(parts))]
    old = [each for each in whole if each.index < cut]
    before = sum(each.part > 0 for each in old)
    assert numbered(old, 0) + numbered(whole[len(old) :], before) == found
    assert [replace(each, example_id=0) for each in found] == [replace(each, example_id=0) for each in whole]
