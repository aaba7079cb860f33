"""Rows that are chosen by bucket, example, position and segment: those of the whole table, from fewer bytes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import run
from support.segmented import COLUMNS, write
from support.verify_cases import restate

import qk_sniffer
from qk_sniffer.errors import StoreError
from qk_sniffer.store import parquet_tables

ROWS = 16
"""The rows of a row group in these tests."""

HEAD = (0, 3, "q")
FILE = "l00h03q/data.parquet"


@pytest.fixture(scope="module")
def root(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with every column, whose files have many row groups."""
    folder = tmp_path_factory.mktemp("filters")
    capture: dict[str, Any] = {
        **dict.fromkeys(("capture_segments", "capture_token_ids", "capture_token_strings"), True),
        "layers": [0],
        "heads": [0, 3],
        "attention": {"enabled": True},
    }
    made = run(checkpoint, write(folder / "texts.jsonl", 8), folder / "made", dataset=COLUMNS, capture=capture)
    for path in made.glob("l*/data.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=ROWS)
    restate(made)
    return made


@pytest.fixture
def dataset(root: Path) -> qk_sniffer.Dataset:
    return qk_sniffer.open_dataset(root)


FILTERS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"bucket": 2}, lambda row: row["bucket"] == 2),
    ({"bucket": [0, 3]}, lambda row: row["bucket"] in (0, 3)),
    ({"example_id": 5}, lambda row: row["example_id"] == 5),
    ({"example_id": np.array([1, 6, 900])}, lambda row: row["example_id"] in (1, 6)),
    ({"position": range(10, 20)}, lambda row: 10 <= row["position"] < 20),
    ({"position": range(90, -1, -7)}, lambda row: row["position"] % 7 == 6 and row["position"] <= 90),
    ({"position": range(-5, 10**15, 10**14)}, lambda row: False),
    ({"position": range(0, 10**15, 10**14)}, lambda row: row["position"] == 0),
    ({"position": {np.int64(3), 4}}, lambda row: row["position"] in (3, 4)),
    ({"segment": "assistant"}, lambda row: row["segment"] == "assistant"),
    ({"segment": ["user", "system"]}, lambda row: row["segment"] != "assistant"),
    (
        {"segment": "user", "example_id": range(2, 6), "position": range(8, 60), "bucket": (0, 1)},
        lambda row: row["segment"] == "user" and 2 <= row["example_id"] < 6 and 8 <= row["position"] < 32,
    ),
    ({"position": []}, lambda row: False),
    ({"example_id": 2**40}, lambda row: False),
    ({}, lambda row: True),
]


@pytest.mark.few(3)
@pytest.mark.parametrize(("rows", "wanted"), FILTERS, ids=[str(rows) for rows, _ in FILTERS])
def test_the_rows_are_those_of_the_whole_table(
    rows: Any, wanted: Callable[[dict[str, Any]], bool], dataset: qk_sniffer.Dataset
) -> None:
    whole = dataset.table(*HEAD)
    kept = np.array([wanted(row) for row in whole.to_pylist()])
    found = dataset.table(*HEAD, **rows)
    assert found.schema.equals(whole.schema, check_metadata=True)
    assert found.equals(whole.filter(pa.array(kept)))
    assert dataset.table(*HEAD, ["token_str"], **rows).to_pydict() == {"token_str": found["token_str"].to_pylist()}
    every, some = dataset.vectors(*HEAD), dataset.vectors(*HEAD, intact=True, **rows)
    for all_rows, some_rows in zip(every, some, strict=True):
        np.testing.assert_array_equal(some_rows, all_rows[kept])
        assert some_rows.dtype == all_rows.dtype
    np.testing.assert_array_equal(dataset.segments(*HEAD, **rows), dataset.segments(*HEAD)[kept])
    if "segment" not in rows:
        summaries, chosen = dataset.attention_summary(0, 3), dataset.attention_summary(0, 3, **rows)
        for name in ("positions", "logsumexp", "distance_mass", "top_position"):
            np.testing.assert_array_equal(getattr(chosen, name), getattr(summaries, name)[kept])


def damage(root: Path, column: str, groups: range) -> None:
    """Overwrites the pages of a column in some row groups; the file keeps its size."""
    metadata = pq.read_metadata(root / FILE)
    data = bytearray((root / FILE).read_bytes())
    for number in groups:
        group = metadata.row_group(number)
        found = [group.column(index) for index in range(group.num_columns)]
        (chunk,) = [each for each in found if each.path_in_schema.split(".")[0] == column]
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    (root / FILE).write_bytes(data)


def test_row_groups_without_wanted_rows_are_not_read(root: Path, tmp_path: Path) -> None:
    """Pages that are overwritten cannot be read: neither to choose rows, nor to return them."""
    copy = shutil.copytree(root, tmp_path / "copy")
    dataset = qk_sniffer.open_dataset(copy)
    ids = dataset.table(*HEAD, ["example_id"])["example_id"].to_numpy()
    (rows,) = np.nonzero(ids == 4)
    first, last = int(rows[0]) // ROWS, int(rows[-1]) // ROWS
    assert 1 < first < last < (len(ids) - 1) // ROWS - 1
    expected = dataset.vectors(*HEAD, example_id=4)
    for column in ("vector", "position", "example_id"):
        damage(copy, column, range(first))
        damage(copy, column, range(last + 1, pq.read_metadata(copy / FILE).num_row_groups))
    for part, other in zip(dataset.vectors(*HEAD, example_id=4), expected, strict=True):
        np.testing.assert_array_equal(part, other)
    for unreadable in ({}, {"position": 3}, {"example_id": [0, 4]}):
        with pytest.raises(StoreError, match="is missing or damaged"):
            dataset.vectors(*HEAD, **unreadable)


def test_vectors_of_row_groups_are_read_only_where_a_row_is_wanted(root: Path, tmp_path: Path) -> None:
    """The statistics of a row group cannot say that it lacks a position between its smallest and its largest."""
    copy = shutil.copytree(root, tmp_path / "copy")
    dataset = qk_sniffer.open_dataset(copy)
    positions = dataset.vectors(*HEAD).positions.tolist()
    groups = [positions[start : start + ROWS] for start in range(0, len(positions), ROWS)]
    number, position = next(
        (number, each)
        for number, group in enumerate(groups)
        for each in range(min(group) + 1, max(group))
        if each not in group
    )
    expected = dataset.vectors(*HEAD, position=position)
    assert len(expected.positions) > 3
    damage(copy, "vector", range(number, number + 1))
    np.testing.assert_array_equal(dataset.vectors(*HEAD, position=position).vectors, expected.vectors)
    with pytest.raises(StoreError, match="is missing or damaged"):
        dataset.vectors(*HEAD, position=groups[number][0])


def test_a_file_larger_than_the_memory_is_read_in_parts(
    dataset: qk_sniffer.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = dataset.table(*HEAD).nbytes
    monkeypatch.setattr(parquet_tables, "available_memory", lambda: size // 3)
    with pytest.raises(StoreError, match="does not fit in memory"):
        dataset.table(*HEAD)
    with pytest.raises(StoreError, match="does not fit in memory"):
        dataset.table(*HEAD, position=range(1, 1000))
    assert len(dataset.table(*HEAD, example_id=4)) > 10


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({"position": 1.5}, "rows are chosen by position=1.5; give an integer, several, or a range"),
        ({"position": "3"}, "rows are chosen by position='3'"),
        ({"position": [True, False]}, r"rows are chosen by position=\[True, False\]"),
        ({"bucket": None}, "rows are chosen by bucket=None"),
        ({"position": slice(3)}, r"rows are chosen by position=slice\(None, 3, None\)"),
        ({"position": range(0, 10**30)}, "rows are chosen by position=range"),
        ({"segment": 3}, "rows are chosen by segment=3; give a name, or several"),
        ({"segment": ["user", 3]}, "rows are chosen by segment="),
        ({"segment": "asistant"}, "no segment 'asistant', did you mean assistant.; it has assistant, system, user"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_of_other_types_are_refused(rows: Any, problem: str, dataset: qk_sniffer.Dataset) -> None:
    with pytest.raises(StoreError, match=problem):
        dataset.vectors(*HEAD, **rows)


def test_other_columns_are_refused(dataset: qk_sniffer.Dataset) -> None:
    message = "rows cannot be chosen by 'positions', did you mean position?; use bucket, example_id, position, segment"
    with pytest.raises(TypeError, match=re.escape(message)):
        dataset.vectors(*HEAD, positions=3)  # type: ignore[call-arg]
    with pytest.raises(StoreError, match=r"attention summaries have no segments; .*segments\(0, 3, 'q'\)"):
        dataset.attention_summary(0, 3, segment="user")


def test_a_dataset_without_segments_says_so(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    capture = {"layers": [0], "heads": [0], "capture_offsets": True}
    dataset = qk_sniffer.open_dataset(
        run(checkpoint, texts, tmp_path / "made", capture=capture, verify={"examples": 0})
    )
    with pytest.raises(StoreError, match=r"has no segments of rows: capture\.capture_segments=true adds them"):
        dataset.vectors(0, 0, "q", segment="user")
    ids = dataset.vectors(0, 0, "q").example_ids
    offsets = dataset.offsets(0, 0, "q", example_id=[2, 9])
    np.testing.assert_array_equal(offsets, dataset.offsets(0, 0, "q")[np.isin(ids, [2, 9])])
    assert offsets.flags.writeable and len(offsets) > 20
