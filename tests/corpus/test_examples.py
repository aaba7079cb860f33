"""Tests the selection, the order and the ids of examples, streamed and not."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, IterableDataset, Value
from support.data_files import ROWS, TEXTS, both_ways, jsonl, message, opened, parquet, texts, write

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.examples import Corpus
from qk_sniffer.corpus.ids import preferred_number
from qk_sniffer.corpus.rows import FileRows, LibraryRows
from qk_sniffer.corpus.sources import Source
from qk_sniffer.errors import SourceError

# ---- which rows


@both_ways
def test_max_samples_counts_rows_with_and_without_text(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "rows.jsonl", jsonl(ROWS))
    for count, expected in ((1, TEXTS[:1]), (3, TEXTS[:2]), (5, TEXTS[:2]), (6, TEXTS), (99, TEXTS)):
        corpus = opened(file, max_samples=count, streaming=streaming)
        assert texts(corpus.examples()) == expected
        assert corpus.num_rows == (None if streaming else min(count, 6))


@both_ways
def test_a_filter_keeps_rows_and_their_indices(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "rows.parquet", parquet(ROWS))
    long = opened(file, filter={"length": "long"}, streaming=streaming)
    assert texts(long.examples()) == [TEXTS[0], TEXTS[1]]
    assert long.skipped == 1
    assert long.num_rows == (None if streaming else 3)
    both = opened(file, filter={"length": "long", "n": -9}, streaming=streaming)
    assert texts(both.examples()) == [TEXTS[1]]
    first = opened(file, filter={"length": "short"}, max_samples=2, streaming=streaming)
    with pytest.raises(SourceError, match="no example has text"):
        list(first.examples())
    assert "no examples that pass dataset.filter={'length': 'huge'}" in message(
        file, filter={"length": "huge"}, streaming=streaming
    )
    assert "no column 'size'. Set dataset.filter.size" in message(file, filter={"size": 1}, streaming=streaming)


@both_ways
def test_shards_share_out_the_rows(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "rows.jsonl", jsonl(ROWS))
    corpus = opened(file, streaming=streaming)
    shards, skipped = [], []
    for index in range(4):
        shards.append(texts(corpus.examples(shard_index=index, shard_count=4)))
        skipped.append(corpus.skipped)
    assert shards == [[TEXTS[0]], [TEXTS[2]], [TEXTS[1]], []], "no error for a shard that has no text"
    assert skipped == [1, 1, 0, 1]


# ---- ids


def test_example_ids_are_frozen() -> None:
    assert [preferred_number(value) for value in (0, 7, -9, 2**31 - 1, -(2**31))] == [0, 7, -9, 2**31 - 1, -(2**31)]
    # printf '%s' a | b2sum -l 32, with the highest bit cleared
    frozen = {"a": 0x4A234C55, "row-78153": 0x3C8CCB96}
    assert {value: preferred_number(value) for value in frozen} == frozen
    for value in (2**31, -(2**31) - 1, True, 1.5, "7", "漢"):
        digest = hashlib.blake2b(str(value).encode("utf-8"), digest_size=4).hexdigest()
        assert preferred_number(value) == int(digest, 16) % 2**31


@both_ways
def test_ids_of_every_type(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "rows.parquet", parquet([row for row in ROWS if row["text"] and row["text"].strip()]))

    def ids(column: str | None) -> list[tuple[int, str]]:
        examples = opened(file, id_column=column, streaming=streaming).examples()
        return [(example.example_id, example.source_id) for example in examples]

    assert ids(None) == [(0, "0"), (1, "1"), (2, "2")]
    assert ids("id") == [(preferred_number(name), name) for name in "acf"]
    assert ids("n") == [(7, "7"), (-9, "-9"), (preferred_number(2**31), str(2**31))]


@both_ways
def test_two_rows_of_one_id_are_refused(tmp_path: Path, streaming: bool) -> None:
    rows = [{"id": f"row {i}", "text": "text"} for i in range(50)]
    rows[7]["id"] = rows[41]["id"] = "twice"
    text = message(write(tmp_path / "rows.jsonl", jsonl(rows)), id_column="id", streaming=streaming)
    assert "examples 7 and 41 have the same id 'twice'" in text and "dataset.id_column=null" in text


@both_ways
def test_an_id_whose_number_is_taken_gets_the_next_free_one(tmp_path: Path, streaming: bool) -> None:
    # Two strings, found by search, with the same digest; then an integer that is the digest of another.
    assert preferred_number("row-78153") == preferred_number("row-85955") == 1015860118
    big = 2**31 + 5
    digest = preferred_number(big)
    for one, other, number in (("row-78153", "row-85955", 1015860118), (big, digest, digest)):
        rows = [{"id": one, "text": " "}, {"id": 1, "text": "text"}, {"id": one, "text": "text"}]
        rows += [{"id": other, "text": "text"}]
        if isinstance(one, str):
            rows[1]["id"] = "x"
        file = write(tmp_path / f"{number}.parquet", parquet(rows))
        corpus = opened(file, id_column="id", streaming=streaming)
        found = [(example.source_id, example.example_id) for example in corpus.examples()]
        assert found[1:] == [(str(one), number), (str(other), number + 1)]
        assert [each.example_id for each in corpus.examples(shard_index=3, shard_count=4)] == [number + 1]
        assert [each.example_id for each in corpus.examples(after=3)] == [number + 1]
        alone = opened(file, id_column="id", streaming=streaming, filter={"id": other})
        assert [each.example_id for each in alone.examples()] == [number]


def test_clashes_are_found_before_the_first_text_and_across_shards(tmp_path: Path) -> None:
    rows = [{"id": "same", "text": "text"}, {"id": "same", "text": "text"}]
    file = write(tmp_path / "rows.jsonl", jsonl(rows))
    with pytest.raises(SourceError, match="same id"):
        opened(file, id_column="id")
    with pytest.raises(SourceError, match="same id"):
        list(opened(file, id_column="id", streaming=True).examples(shard_index=0, shard_count=2))


@both_ways
def test_unused_rows_are_ignored(tmp_path: Path, streaming: bool) -> None:
    rows = [
        {"id": "a", "text": "one", "keep": True},
        {"id": "a", "text": " ", "keep": True},
        {"id": None, "text": None, "keep": True},
        {"id": "a", "text": "filtered", "keep": False},
        {"id": "b", "text": "two", "keep": True},
        {"id": "a", "text": "beyond max_samples", "keep": True},
    ]
    file = write(tmp_path / "rows.jsonl", jsonl(rows))
    corpus = opened(file, id_column="id", filter={"keep": True}, max_samples=4, streaming=streaming)
    assert texts(corpus.examples()) == [(0, "one"), (4, "two")]
    assert "examples 0 and 5 have the same id" in message(
        file, id_column="id", filter={"keep": True}, streaming=streaming
    )


@both_ways
def test_a_row_without_an_id_is_refused(tmp_path: Path, streaming: bool) -> None:
    rows = [{"id": 1, "text": "a"}, {"id": None, "text": "b"}]
    file = write(tmp_path / "rows.jsonl", jsonl(rows))
    text = message(file, id_column="id", streaming=streaming)
    assert "example 1 has no id" in text and "dataset.id_column=null" in text
    if not streaming:
        with pytest.raises(SourceError, match="example 1 has no id"):
            opened(file, id_column="id")


@both_ways
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("lines.jsonl", '{"id": 1, "text": "a"}\n\n{"text": "b"}\n', 3),
        ("document.json", '[{"id": 1,\n"text": "a"},\n\n{"text": "b"}]', 4),
        ("cells.csv", 'id,text\n1,"a\nb"\n,c\n', 4),
    ],
)
def test_a_bad_example_of_a_file_with_lines_is_named_by_its_line(
    name: str, content: str, line: int, tmp_path: Path, streaming: bool
) -> None:
    file = write(tmp_path / name, content)
    assert f"{name}, line {line}: example 1 has no id" in message(file, id_column="id", streaming=streaming)
    part = message(file, id_column="id", streaming=streaming, split="train[1:]") if not streaming else ""
    assert streaming or f"{name}, line {line}: example 0 has no id" in part


def test_the_check_of_ids_reads_one_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["t"] * 1000, "id": range(0, 3000, 3)}), tmp_path / "rows.parquet")
    columns_read = []
    read = FileRows.read

    def noted(self: FileRows, columns: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        columns_read.append([*columns])
        return read(self, columns, start)

    monkeypatch.setattr(FileRows, "read", noted)
    corpus = opened(tmp_path / "rows.parquet", id_column="id")
    assert (corpus.num_rows, columns_read) == (1000, [["id"]])


FAULTS = {
    "bad line": ('{"text": "a", "id": "x"}\n{"text": \n', "b.jsonl cannot be read: JSON parse error in line 2", 6),
    "no id": ('{"text": "a"}\n', ", line 1 of b.jsonl: example 5 has no id", 5),
    "repeated id": ('{"text": "a", "id": "1"}\n', "examples 1 and 5 have the same id", 5),
    "type": (
        '\n{"text": ["a"], "id": "x"}\n',
        ", line 2 of b.jsonl: example 5 holds list, not text, in column 'text'",
        5,
    ),
    "encoding": ('{"text": "\\ud800", "id": "x"}\n', "b.jsonl cannot be read: JSON parse error in line 1", 5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_late_fault_of_a_stream_names_the_rows_before_it(fault: str, tmp_path: Path) -> None:
    content, expected, sound = FAULTS[fault]
    rows = [{"text": "text", "id": id_} for id_ in ("0", "1", "filtered", "row-78153", "4")]
    write(tmp_path / "a.jsonl", jsonl(rows))
    write(tmp_path / "b.jsonl", content)
    options = {"id_column": "id", "streaming": True}
    text = message(tmp_path, **options)
    assert expected in text
    assert text.endswith(
        f"To make the dataset of the {sound} examples before it, which keeps the captured examples, rerun the command "
        f"with dataset.max_samples={sound}"
    )
    assert len(list(opened(tmp_path, **options, max_samples=sound).examples())) == sound


def test_a_stream_of_the_hub_that_breaks_off_may_have_lost_its_connection() -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": "one"}, {"text": "two"})
        raise ConnectionError("reset by peer")

    features = Features({"text": Value("string")})
    stream = LibraryRows("dataset org/texts", IterableDataset.from_generator(rows, features=features))
    source = Source("dataset org/texts", stream, commit="0" * 40)
    corpus = Corpus(DatasetConfig(path="org/texts", streaming=True), source)
    with pytest.raises(
        SourceError, match=r"reset by peer\. If the connection was lost, rerun the same command\. To make"
    ):
        list(corpus.examples())
