"""A Parquet file of other columns, types or content ends in one clear error."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qk_sniffer.errors import StoreError
from qk_sniffer.store.parquet_tables import read_table

SCHEMA = pa.schema([pa.field("id", pa.int32(), nullable=False), pa.field("name", pa.string())])


def test_the_columns_of_the_schema_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"name": ["a", None], "more": [1, 2], "id": pa.array([1, 2], pa.int32())}), path)
    assert read_table(path, SCHEMA, way_out="").to_pydict() == {"id": [1, 2], "name": ["a", None]}


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"id": pa.array([1], pa.int64()), "name": ["a"]}, "id is int64 instead of int32"),
        ({"id": pa.array([1], pa.int32())}, "name is missing"),
        ({"id": pa.array([None], pa.int32()), "name": ["a"]}, "nulls in the column id"),
        ({"id": pa.array([1], pa.int32()), "name": [b"\xff"]}, "name is binary instead of string"),
    ],
)
def test_other_columns_are_refused(columns: dict[str, object], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(StoreError, match=f"data.parquet has .*{problem}.*; fetch it"):
        read_table(path, SCHEMA, way_out="fetch it")


def test_other_things_than_a_parquet_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"id": pa.array([1], pa.int32()), "name": ["a"]}), tmp_path / "folder" / "a.parquet")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_bytes(b"PAR1 no PAR1")
    for name, problem in (
        ("folder", "is not a file"),
        ("pipe", "is not a file"),
        ("text", "is missing or damaged"),
        ("none", "is missing or damaged"),
    ):
        with pytest.raises(StoreError, match=f"{name} {problem}.*; fetch it"):
            read_table(tmp_path / name, SCHEMA, way_out="fetch it")


def test_a_text_that_is_not_utf_8_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"id": pa.array([1], pa.int32()), "name": text}), path)
    with pytest.raises(StoreError, match="is missing or damaged"):
        read_table(path, SCHEMA, way_out="")
