"""Tests that a filter compares values in the types of their files, and explains why no row passes it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.data_files import both_ways, csv, jsonl, message, opened, parquet, texts, write, write_parquet


@both_ways
def test_a_filter_value_is_compared_in_the_columns_type(tmp_path: Path, streaming: bool) -> None:
    import datetime
    from decimal import Decimal

    columns = {
        "text": ["a", "b"],
        "string": ["7", "x"],
        "float": pa.array([0.1, 7.0], pa.float32()),
        "int": [7, 8],
        "bool": [True, False],
        "date": [datetime.date(2023, 5, 1), None],
        "time": [datetime.datetime(2023, 5, 1), None],
        "decimal": [Decimal("1.10"), Decimal("2.00")],
    }
    file = write_parquet(tmp_path / "rows.parquet", columns)

    def kept(column: str, value: Any) -> list[str]:
        return [text for _, text in texts(opened(file, filter={column: value}, streaming=streaming).examples())]

    for column, value in (
        ("string", 7), ("float", 0.1), ("int", "7"), ("int", 7.0), ("bool", True), ("bool", "true"),
        ("date", "2023-05-01"), ("time", "2023-05-01"), ("time", "2023-05-01 00:00:00"), ("decimal", 1.1),
    ):  # fmt: skip
        assert kept(column, value) == ["a"], (column, value)
    for column, value in (("date", None), ("float", 7), ("string", "x"), ("bool", False)):
        assert kept(column, value) == ["b"], (column, value)
    csv = write(tmp_path / "rows.csv", "text,n,flag\na,7.0,True\nb,,false\nc,007,x\nd,0_7,x\n")
    for column, value, expected in (
        ("n", 7, "ac"), ("n", "007", "c"), ("n", "7", ""), ("flag", True, "a"), ("n", None, "b"), ("n", "", "b"),
    ):  # fmt: skip
        if expected:
            corpus = opened(csv, filter={column: value}, streaming=streaming)
            assert "".join(text for _, text in texts(corpus.examples())) == expected
        else:
            message(csv, filter={column: value}, streaming=streaming)


@both_ways
def test_a_filter_value_is_compared_in_the_type_of_each_file(tmp_path: Path, streaming: bool) -> None:
    kinds = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}
    for number, order in enumerate([["float32", "float64"], ["float64", "float32"], ["float16", "float32", "float64"]]):
        for place, kind in enumerate(order):
            values = pa.array(np.array([0.1, 0.2], kind), kinds[kind])
            write_parquet(tmp_path / f"{number}" / f"{place}.parquet", {"text": ["a", "b"], "x": values})
        corpus = opened(tmp_path / f"{number}", filter={"x": 0.1}, streaming=streaming)
        assert texts(corpus.examples()) == [(2 * place, "a") for place in range(len(order))]
        for huge in (1e39, 10**400):
            message(tmp_path / f"{number}", filter={"x": huge}, streaming=streaming)


@both_ways
def test_a_filter_value_that_the_first_file_cannot_hold_is_looked_for_in_later_ones(
    tmp_path: Path, streaming: bool
) -> None:
    write_parquet(tmp_path / "0.parquet", {"text": ["a"], "x": [1]})
    write_parquet(tmp_path / "1.parquet", {"text": ["b"], "x": [1.5]})
    assert texts(opened(tmp_path, filter={"x": 1.5}, streaming=streaming).examples()) == [(1, "b")]
    assert "column 'x' (int64) has 1, 1.5" in message(tmp_path, filter={"x": "y"}, streaming=streaming)


@both_ways
def test_the_texts_of_rows_that_a_filter_leaves_out_do_not_matter(tmp_path: Path, streaming: bool) -> None:
    rows = [{"text": "a", "k": 1}, {"text": 5, "k": 2}, {"text": "c", "k": 1}]
    file = write(tmp_path / "rows.jsonl", jsonl(rows))
    assert texts(opened(file, filter={"k": 1}, streaming=streaming).examples()) == [(0, "a"), (2, "c")]
    assert "example 1 holds int, not text" in message(file, filter={"k": 2}, streaming=streaming)


@both_ways
def test_a_filter_that_nothing_passes_names_the_type_and_some_values(tmp_path: Path, streaming: bool) -> None:
    columns = {"text": ["a", "b"], "n": [7, 8], "kind": ["long", "short"]}
    file = write_parquet(tmp_path / "rows.parquet", columns)
    for value in ("seven", True, 7.5, 9):
        text = message(file, filter={"n": value}, streaming=streaming)
        assert f"no examples that pass dataset.filter={{'n': {value!r}}}: column 'n' (int64)" in text
        assert "has 7, 8" in text
    assert "column 'kind' (string) has 'long', 'short'" in message(file, filter={"kind": "x"}, streaming=streaming)
    both = message(file, filter={"n": 7, "kind": "short"}, streaming=streaming)
    assert "each value is there, but no example has all of them" in both
    moments = pa.array([0, None], pa.timestamp("s", "UTC"))
    moment = write_parquet(tmp_path / "moments.parquet", {"text": ["a", "b"], "at": moments})
    assert "tz=UTC]) has 1970-01-01 00:00:00+00:00, null" in message(
        moment, filter={"at": "1970-01-01"}, streaming=streaming
    )
    many = write(tmp_path / "rows.csv", "text,n\n" + "".join(f"a,{'x' * 50}{number}\n" for number in range(99)))
    text = message(many, filter={"n": 1}, streaming=streaming)
    assert "column 'n' (text) has 'xxx" in text and len(text) < 1_000


@both_ways
def test_a_column_that_comes_late_is_null_before(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"text": f"text {number}"} for number in range(1_500)]
    late = write(tmp_path / "rows.jsonl", jsonl([*rows, {"text": "late", "k": 0.5}, {"text": "later", "k": 1}]))
    assert texts(opened(late, filter={"k": 1}, streaming=streaming).examples()) == [(1_501, "later")]
    warned = (
        "has no column 'k' in its first examples: those without it do not pass dataset.filter.k=1. "
        "It has: text (string)"
    )
    assert (warned in caplog.text) == streaming
    text = message(late, filter={"k": 7}, streaming=streaming)
    assert "no examples that pass dataset.filter={'k': 7}: column 'k'" in text and "has null, 0.5, 1" in text
    # A wrong name would let all rows pass.
    if streaming:
        assert "has no column 'k' in its first examples" in message(late, filter={"k": None}, streaming=True)
    else:
        assert len(texts(opened(late, filter={"k": None}).examples())) == 1_500


@both_ways
def test_a_column_that_no_row_has_is_an_error(tmp_path: Path, streaming: bool) -> None:
    rows = [{"text": f"text {number}"} for number in range(3)]
    for file in (write(tmp_path / "rows.csv", csv(rows)), write(tmp_path / "rows.parquet", parquet(rows))):
        assert "has no column 'k'. Set dataset.filter.k" in message(file, filter={"k": 1}, streaming=streaming)
    text = message(write(tmp_path / "rows.jsonl", jsonl(rows)), filter={"k": 1}, streaming=streaming)
    assert (
        "column 'k' has no value in any example" if streaming else "has no column 'k'. Set dataset.filter.k"
    ) in text
