"""Tests what the rows of files hold: messages of conversations, and token ids with their segments."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value
from support.data_files import both_ways, jsonl, message, opened, parquet, write, write_parquet

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.columns import MessagesColumn
from qk_sniffer.corpus.contents import ContentError, Conversation, TokenIds
from qk_sniffer.corpus.examples import Corpus
from qk_sniffer.corpus.rows import LibraryRows
from qk_sniffer.corpus.sources import Source
from qk_sniffer.errors import SourceError

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]}]
NESTED: list[Any] = []
for _ in range(200):
    NESTED = [{"arguments": NESTED}]


def contents(path: Path, **options: Any) -> list[Any]:
    return [example.content for example in opened(path, **options).examples()]


# ---- messages


@both_ways
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "json.parquet", "json.jsonl", "json.csv"])
def test_messages_of_every_format(tmp_path: Path, name: str, streaming: bool) -> None:
    rows: list[dict[str, Any]] = [{"id": 0, "messages": HELLO}, {"id": 1, "messages": None}, {"id": 2, "messages": []}]
    if name.startswith("json"):
        rows = [row | {"messages": "" if row["messages"] is None else json.dumps(row["messages"])} for row in rows]
    if name.endswith("csv"):
        lines = ['"' + row["messages"].replace('"', '""') + '"' for row in rows]
        content = "\n".join(["messages,id", *(f"{line},{row['id']}" for line, row in zip(lines, rows, strict=True))])
        file = write(tmp_path / name, content)
    else:
        file = write(tmp_path / name, (parquet if name.endswith("parquet") else jsonl)(rows))
    corpus = opened(file, messages_column="messages", streaming=streaming)
    assert [(each.index, each.content) for each in corpus.examples()] == [(0, Conversation(HELLO))]
    assert corpus.skipped == 2


def test_fields_that_a_type_fills_up_with_null_are_missing(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    other = {"role": "assistant", "content": "b", "tool_calls": [{"name": "g", "arguments": {"b": None}}]}
    rows = [{"messages": [HELLO[0], call, other]}]
    clean = [HELLO[0], {key: call[key] for key in ("role", "tool_calls")}]
    last = other | {"tool_calls": [{"name": "g", "arguments": {}}]}
    assert contents(write(tmp_path / "a.parquet", parquet(rows)), messages_column="messages") == [
        Conversation([*clean, last])
    ]
    # JSON has fields for the values that it has: a null argument is one.
    for file in (
        write(tmp_path / "b.jsonl", jsonl(rows)),
        write(tmp_path / "c.jsonl", jsonl([{"messages": json.dumps(rows[0]["messages"])}])),
    ):
        assert contents(file, messages_column="messages") == [Conversation([*clean, other])]


@both_ways
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"content": "a"}], "has no text as role in message 0 (from 0) of column 'm', which has the keys 'content'"),
        ([{"from": "human", "value": "a"}], "which has the keys 'from', 'value': the keys are role and content"),
        (["a"], "example 1 has 'a' in message 0 (from 0) of column 'm': a message is a mapping with the keys"),
        ([HELLO[0], {"role": "user", "content": 3}], "example 1 has 3 as content in message 1 (from 0)"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has content of the type 'image' in message 0"),
        ([{"role": "user", "content": ["a"]}], "has content of the type 'a' in message 0"),
        ("[{", "example 1 has a text in column 'm' that cannot be read as JSON"),
        ('[{"role": "user", "role": "system", "content": "a"}]', "an object has the key 'role' twice"),
        ("[{" + "".join(f'"{n}":1,' for n in range(50_000)) + '"7":2}]', "an object has the key '7' twice"),
        ([HELLO[0] | {"tool_calls": NESTED}], "example 1 has values nested deeper than 100 levels in column 'm'"),
        ({"role": "user"}, "example 1 holds dict, not messages, in column 'm'. Set dataset.messages_column to a"),
        ([HELLO[0]] * 10_001, "example 1 has 10,001 messages in column 'm', more than 10,000"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(tmp_path: Path, value: Any, expected: str, streaming: bool) -> None:
    file = write(tmp_path / "rows.jsonl", jsonl([{"m": HELLO}, {"m": value}]))
    assert expected in message(file, messages_column="m", streaming=streaming)


def test_columns_of_other_types_are_refused_before_the_first_row(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", parquet([{"n": 3, "text": "a", "ids": [1]}]))
    assert "column 'n' holds int64, not messages. Set dataset.messages_column" in message(file, messages_column="n")
    assert "column 'n' holds int64, not token ids. Set dataset.tokens_column" in message(file, tokens_column="n")
    assert "no column 'absent'. Set dataset.messages_column" in message(file, messages_column="absent")
    assert "Set dataset.segments_column to one" in message(file, tokens_column="ids", segments_column="absent")


def test_a_row_of_too_many_values_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qk_sniffer.corpus.parquet_files._MOST_NESTED", 100)
    rows = [{"m": HELLO, "ids": [1, 2]} for _ in range(50)]
    file = write(tmp_path / "rows.parquet", parquet(rows))
    assert contents(file, messages_column="m") == [Conversation(HELLO)] * 50
    rows[20]["m"] = HELLO * 20
    assert "an example of it has 120 values in lists, more than 100" in message(
        write(file, parquet(rows)), messages_column="m"
    )
    rows[20]["ids"] = [7] * 1000
    assert len(contents(write(file, parquet(rows)), tokens_column="ids")) == 50
    rows[20]["ids"][3] = None
    assert "an example of it has 1,000 values in lists" in message(write(file, parquet(rows)), tokens_column="ids")


# ---- token ids


@both_ways
@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64()], ids=str)
def test_token_ids_of_every_width(tmp_path: Path, kind: pa.DataType, streaming: bool) -> None:
    ids = [[3, 1, 2], None, [], [7], [0, 127]]
    for list_type in (pa.list_(kind), pa.large_list(kind)):
        write_parquet(tmp_path / "rows.parquet", {"ids": pa.array(ids, list_type)}, row_group_size=2)
        corpus = opened(tmp_path / "rows.parquet", tokens_column="ids", streaming=streaming)
        found = [(each.index, each.content.ids.tolist()) for each in corpus.examples()]  # type: ignore[union-attr]
        assert found == [(0, [3, 1, 2]), (3, [7]), (4, [0, 127])] and corpus.skipped == 2
        assert all(each.content.ids.dtype == np.int32 for each in corpus.examples())  # type: ignore[union-attr]
        assert [each.index for each in corpus.examples(after=3)] == [3, 4]


def test_token_ids_of_json_and_of_texts(tmp_path: Path) -> None:
    for file in (
        write(tmp_path / "a.jsonl", jsonl([{"ids": [3, 1, 2]}, {"ids": None}])),
        write(tmp_path / "b.csv", 'ids\n"[3, 1, 2]"\n'),
    ):
        [content] = contents(file, tokens_column="ids")
        assert isinstance(content, TokenIds) and content.ids.tolist() == [3, 1, 2] and content.segments is None


@both_ways
@pytest.mark.parametrize(
    ("value", "shown"),
    [(-1, "-1"), (None, "null"), (1.5, "1.5"), (True, "True"), ("a", "'a'"), (2**31, "2147483648"), ([1], "[1]")],
)
def test_values_that_are_no_token_ids_are_refused_by_row(
    tmp_path: Path, value: Any, shown: str, streaming: bool
) -> None:
    file = write(tmp_path / "rows.jsonl", jsonl([{"ids": [5]}, {"ids": [4, 5, value]}]))
    text = message(file, tokens_column="ids", streaming=streaming)
    assert f"example 1 has {shown} at place 2 (from 0) of column 'ids': a token id is an integer from 0 to" in text
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        write_parquet(tmp_path / "rows.parquet", {"ids": pa.array([[5], [4, 5, value]], pa.list_(pa.int64()))})
        assert f"example 1 has {shown} at place 2" in message(
            tmp_path / "rows.parquet", tokens_column="ids", streaming=streaming
        )


def test_a_column_of_lists_can_still_be_an_id_or_a_filter(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet", {"text": ["a", "b"], "n": pa.array([[1, 2], [3]], pa.list_(pa.int64()))})
    corpus = opened(tmp_path / "rows.parquet", id_column="n")
    assert [each.source_id for each in corpus.examples()] == ["[1, 2]", "[3]"]
    [example] = opened(tmp_path / "rows.parquet", filter={"n": "[3]"}).examples()
    assert example.content == "b"


# ---- segments of token ids

SEGMENTS: list[Any] = [
    ["prompt", "prompt", "answer"],
    [["prompt", 0], ["answer", 2]],
    [{"name": "prompt", "start": 0}, {"name": "answer", "start": 2}],
]


@both_ways
@pytest.mark.parametrize("value", SEGMENTS, ids=["names", "pairs", "structs"])
def test_segments_by_name_or_by_start(tmp_path: Path, value: Any, streaming: bool) -> None:
    rows = [{"ids": [4, 5, 6], "part": value}, {"ids": None, "part": None}]
    files = [write(tmp_path / "rows.jsonl", jsonl(rows))]
    if not isinstance(value[0], list):  # the elements of a list in Parquet have one type
        files.append(write(tmp_path / "rows.parquet", parquet(rows)))
    for file in files:
        [content] = contents(file, tokens_column="ids", segments_column="part", streaming=streaming)
        assert (content.segments.names, content.segments.codes.tolist()) == (("prompt", "answer"), [0, 0, 1])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a", "b"], "has 2 names of segments in column 'part', and 3 tokens"),
        (None, "has null in column 'part', and token ids: a name for each token is needed"),
        ([], "has [] in column 'part', and token ids"),
        ([["a", 1]], "begin at [1], and 3 tokens: the first begins at 0"),
        ([["a", 0], ["b", 2], ["c", 1]], "begin at [0, 2, 1], and 3 tokens"),
        ([["a", 0], ["b", 0]], "begin at [0, 0], and 3 tokens"),
        ([["a", 0], ["b", 3]], "begin at [0, 3], and 3 tokens"),
        ([["a", 0], "b"], "has 'b' as a segment in column 'part': a pair is [name, start]"),
        ([["a", True]], "has ['a', True] as a segment in column 'part': a pair is [name, start]"),
        ([[3, 0]], "has 3 as a segment in column 'part': a name is a text of 1 to 100 characters"),
        (["a", "a", ""], "has '' as a segment"),
        (["a", "a", "x" * 101], "as a segment in column 'part': a name is a text"),
        (["a", "a", "\ud800"], "as a segment in column 'part': a name is a text"),
    ],
)
def test_segments_that_do_not_fit_the_tokens(tmp_path: Path, value: Any, expected: str) -> None:
    file = write(tmp_path / "rows.jsonl", jsonl([{"ids": [4, 5, 6], "part": value}]))
    text = message(file, tokens_column="ids", segments_column="part")
    assert "example 0 " in text and expected in text


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_messages_are_not_opened(streaming: bool, tmp_path: Path) -> None:
    """Whoever made the texts names their paths and addresses, and a template could call the functions of an image."""
    image = {"path": str(tmp_path / "none.png"), "bytes": None}
    messages = {"role": Value("string"), "content": Value("string"), "image": Image()}
    dataset = Dataset.from_list(
        [{"messages": [HELLO[0] | {"image": image}]}], features=Features({"messages": List(messages)})
    )
    rows = LibraryRows("dataset org/texts", dataset.to_iterable_dataset() if streaming else dataset)
    config = DatasetConfig(path="org/texts", messages_column="messages", streaming=streaming)
    with pytest.raises(
        SourceError, match="column 'messages' holds values of the type Image, which are read from files"
    ):
        list(Corpus(config, Source("dataset org/texts", rows, commit="0" * 40)).examples())


@pytest.mark.parametrize("value", [np.zeros(3), np.int64(3), np.float64(3), np.str_("a"), b"a", object(), Path("a")])
def test_values_with_functions_that_a_template_could_call_are_refused(value: Any) -> None:
    row = {"m": [HELLO[0] | {"extra": [{"inner": value}]}]}
    with pytest.raises(ContentError, match=f"has a value of the type {type(value).__name__} in column 'm'"):
        MessagesColumn("m", drops_nulls=False).read(row)


def test_dates_and_decimals_are_text_for_a_template() -> None:
    row = {"m": [HELLO[0] | {"at": datetime(2026, 1, 2, 3, tzinfo=UTC), "cost": Decimal("1.50")}]}
    found = MessagesColumn("m", drops_nulls=False).read(row)
    assert found is not None
    assert found.messages[0] == HELLO[0] | {"at": "2026-01-02 03:00:00+00:00", "cost": "1.50"}
