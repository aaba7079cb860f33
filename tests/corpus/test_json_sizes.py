"""Tests that JSON whose values would fill the memory is refused before it is parsed."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.data_files import jsonl, message, opened, parquet, texts, write

from qk_sniffer.corpus import json_sizes

HELLO = [{"role": "user", "content": "Hello, [you] {there}: " * 50}]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_sizes, "MOST_VALUES", 100)


@pytest.mark.parametrize(
    "content",
    [
        jsonl([{"text": "a"}, {"text": "b", "more": [[]] * 60}]),
        json.dumps([{"text": "a"}, {"text": "b", "more": [1] * 120}]).encode(),
        json.dumps({"text": "a"}, indent=1).encode() + b"\n" + json.dumps({"more": {"a": [{}] * 60}}).encode(),
    ],
    ids=["lines", "list", "objects"],
)
@pytest.mark.usefixtures("few")
def test_a_value_of_too_many_values_is_named_also_in_a_key_that_is_not_read(tmp_path: Path, content: bytes) -> None:
    said = message(write(tmp_path / "rows.json", content))
    line = 1 if content.startswith(b"[") else 4 if content.startswith(b"{\n") else 2
    assert f"JSON parse error in line {line}: it holds more than 100 values in lists and objects: leave it out" in said


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
@pytest.mark.usefixtures("few")
def test_a_text_of_too_many_values_in_a_column_is_named(tmp_path: Path, name: str) -> None:
    def content(messages: Any) -> bytes | str:
        rows = [{"m": json.dumps(HELLO)}, {"m": json.dumps(messages)}]
        if name.endswith("csv"):
            return "\n".join(["m", *('"' + row["m"].replace('"', '""') + '"' for row in rows)])
        return (parquet if name.endswith("parquet") else jsonl)(rows)

    assert opened(write(tmp_path / name, content(HELLO * 10)), messages_column="m").num_rows == 2
    said = message(write(tmp_path / name, content(HELLO * 40)), messages_column="m")
    assert "example 1 has a text in column 'm' that cannot be read as JSON: it holds more than 100 values" in said


@pytest.mark.usefixtures("few")
def test_signs_in_strings_and_values_that_follow_do_not_count(tmp_path: Path) -> None:
    odd = '"\\,[{:]}' * 300
    rows = [{"text": odd + str(number), odd: [1] * 80} for number in range(5)]
    expected = [(number, odd + str(number)) for number in range(5)]
    one_line = "".join(json.dumps(row) for row in rows)
    for content in (jsonl(rows), json.dumps(rows).encode(), one_line.encode(), json.dumps(rows, indent=1).encode()):
        assert texts(opened(write(tmp_path / "rows.json", content)).examples()) == expected


def test_refusing_takes_no_memory_for_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_sizes, "MOST_VALUES", 1 << 14)
    text = "[" + "[]," * 1_100_000 + "[]]"
    packed = write(tmp_path / "rows.jsonl.gz", gzip.compress(f'{{"text": "a", "more": {text}}}\n'.encode()))
    column = write(tmp_path / "rows.parquet", parquet([{"m": text}]))
    for file, options in ((packed, {}), (column, {"messages_column": "m"})):
        tracemalloc.start()
        assert "more than 16,384 values" in message(file, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * len(text)
