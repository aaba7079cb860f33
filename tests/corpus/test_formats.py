"""Tests that values arrive as their files hold them: no reader guesses a type, a null or a column."""

import bz2
import codecs
import gzip
import json
import os
import sys
import tracemalloc
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_files import both_ways, jsonl, message, opened, texts, write, write_parquet

from qk_sniffer.corpus import parquet_files
from qk_sniffer.corpus.examples import Corpus
from qk_sniffer.errors import SourceError


def ids(corpus: Corpus) -> list[str]:
    return [example.source_id for example in corpus.examples()]


# ---- CSV

RAGGED = {
    "longer": ("id,text\n1,Hello, world\n2,No comma here\n3,Also none\n", "Expected 2 fields in line 2, saw 3"),
    "shorter": ('id,text\n1,"one\n\ntwo"\n2\n', "Expected 2 fields in line 5, saw 1"),
    "no end": ('id,text\n1,a\n2,"b\n3,c\n', "the record in line 3 is not CSV"),
    "after a quote": ('id,text\n1,"a"b\n', "the record in line 2 is not CSV"),
    "twice": ("text,text\na,b\n", "its header has several columns 'text'"),
}


@both_ways
@pytest.mark.parametrize("case", RAGGED)
def test_a_csv_row_that_does_not_fit_its_header_is_named_by_its_line(
    tmp_path: Path, case: str, streaming: bool
) -> None:
    content, expected = RAGGED[case]
    file = write(tmp_path / "rows.csv", content)
    text = message(file, streaming=streaming)
    assert f"file {file} cannot be read: {expected}" in text


@both_ways
def test_the_cells_of_a_csv_file_are_texts(tmp_path: Path, streaming: bool) -> None:
    cells = ["None", "null", "NA", "n/a", "nan", "1.0", "007", "True", "2023-05-01", "1e3", " padded "]
    file = write(tmp_path / "rows.csv", "id,text\n" + "".join(f"{cell},{cell}\n" for cell in cells))
    corpus = opened(file, id_column="id", streaming=streaming)
    assert [text for _, text in texts(corpus.examples())] == cells
    assert ids(corpus) == cells


@both_ways
def test_the_ids_of_a_csv_file_stay_as_written(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "rows.csv", "text,id\na,12\n,\nb,-9\nc,012\nd,0\ne,-0\nf,12345678901234567890\ng,x\n")
    examples = list(opened(file, id_column="id", streaming=streaming).examples())
    assert [each.source_id for each in examples] == ["12", "-9", "012", "0", "-0", "12345678901234567890", "x"]
    assert [each.example_id for each in examples[:2]] == [12, -9] and examples[3].example_id == 0
    assert examples[2].example_id > 2**16, "hashed: not the integer 12"
    assert "example 0 has no id" in message(write(file, "text,id\na,\n"), id_column="id", streaming=streaming)


@both_ways
def test_commas_line_breaks_and_quotes_in_csv_texts(tmp_path: Path, streaming: bool) -> None:
    long = "x" * 200_000
    rows = '\ufeff"text",id\r\n"a, ""b""\r\nc",1\r\n   \r\n\r\n5" of rain,2\r\n' + long + ",3\r\n"
    corpus = opened(write(tmp_path / "rows.csv", rows), streaming=streaming)
    assert texts(corpus.examples()) == [(0, 'a, "b"\r\nc'), (1, '5" of rain'), (2, long)]


@both_ways
def test_the_card_of_a_folder_describes_its_csv_files(tmp_path: Path, streaming: bool) -> None:
    card = (
        '---\nconfigs:\n- config_name: tab\n  data_files: a.csv\n  sep: "\\t"\n  quoting: 3\n'
        "- config_name: bare\n  data_files: b.csv\n  header: null\n  names: [id, text]\n---\n"
    )
    write(tmp_path / "README.md", card)
    write(tmp_path / "a.csv", 'id\ttext\nNA\t"a", b\n')
    write(tmp_path / "b.csv", "NA,first\n2,second\n")
    tabs = opened(tmp_path, name="tab", id_column="id", streaming=streaming)
    assert texts(tabs.examples()) == [(0, '"a", b')] and ids(tabs) == ["NA"]
    bare = opened(tmp_path, name="bare", id_column="id", streaming=streaming)
    assert texts(bare.examples()) == [(0, "first"), (1, "second")] and ids(bare) == ["NA", "2"]


@both_ways
def test_options_that_a_reader_does_not_know_are_left_to_the_library(tmp_path: Path, streaming: bool) -> None:
    card = (
        "---\nconfigs:\n- config_name: below\n  data_files: a.csv\n  header: 1\n"
        "- config_name: quoted\n  data_files: b.csv\n  quoting: 2\n---\n"
    )
    write(tmp_path / "README.md", card)
    write(tmp_path / "a.csv", "a title,\nid,text\n1,first\n")
    write(tmp_path / "b.csv", '"id","text"\n1,"first"\n')
    for name in ("below", "quoted"):
        corpus = opened(tmp_path, name=name, id_column="id", streaming=streaming)
        assert texts(corpus.examples()) == [(0, "first")] and ids(corpus) == ["1"]
    write(
        tmp_path / "txt" / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files: c.txt\n  sample_by: paragraph\n---\n",
    )
    write(tmp_path / "txt" / "c.txt", "first\n\nsecond")
    corpus = opened(tmp_path / "txt", streaming=streaming)
    assert texts(corpus.examples()) == [(0, "first"), (1, "second")]


# ---- JSON


@both_ways
def test_json_values_keep_their_types(tmp_path: Path, streaming: bool) -> None:
    values = ["2023-05-01", "12", "2023-05-01T00:00:00Z", "NA", 13, 12345678901234567890, 1.5, 2.0, True]
    file = write(tmp_path / "rows.jsonl", jsonl([{"id": value, "text": "text"} for value in values]))
    corpus = opened(file, id_column="id", streaming=streaming)
    written = ["2023-05-01", "12", "2023-05-01T00:00:00Z", "NA", "13", "12345678901234567890", "1.5", "2", "True"]
    assert ids(corpus) == written
    numbers = [example.example_id for example in corpus.examples()]
    assert (numbers[4], numbers[7]) == (13, 2) and 12 not in numbers


@both_ways
def test_a_record_with_the_columns_of_a_trace_is_a_record(tmp_path: Path, streaming: bool) -> None:
    record = {"type": "user", "id": "a", "version": "1", "cwd": "/", "message": {"role": "user"}, "text": "text"}
    file = write(tmp_path / "rows.jsonl", jsonl([record, record | {"id": "b", "type": "session"}]))
    assert ids(opened(file, id_column="id", streaming=streaming)) == ["a", "b"]


@both_ways
def test_columns_of_json_may_come_late(tmp_path: Path, streaming: bool) -> None:
    early = [{"text": None, "n": 1}] * 1_500
    late = [{"text": "a", "n": {"deep": [1]}, "more": 1}, {"n": "x", "text": "b", "more": [], "id": "late"}]
    file = write(tmp_path / "rows.jsonl", jsonl([*early, *late]))
    assert texts(opened(file, streaming=streaming).examples()) == [(1_500, "a"), (1_501, "b")]
    assert [each.index for each in opened(file, filter={"id": "late"}, streaming=streaming).examples()] == [1_501]
    for options in ({"id_column": "id"}, {"text_column": "id"}) if streaming else ():
        text = message(file, streaming=True, **options)
        assert "has no column 'id' in its first examples, the only ones that dataset.streaming=true looks at." in text
    write(tmp_path / "second" / "a.jsonl", jsonl([{"text": "a"}]))
    write(tmp_path / "second" / "b.jsonl", jsonl([{"text": "b", "id": "x"}]))
    assert "example 0 has no id" in message(tmp_path / "second", id_column="id") or streaming


DOCUMENTS = {
    "one object": '{\n  "text": "a"\n}\n',
    "several objects": '{\n "text": "a"}\n{"text": "b"} {"text": "c"}',
    "a list": '[\n {"text": "a"},\n\n {"text":\n "b"}]',
    "a list in a line": '[{"text": "a"}, {"text": "b"}]\n',
    "a list of texts": '["a", "b"]',
    "with a mark": '\ufeff[{"text": "a"}]',
    "numbers": '{"text": "a", "x": NaN}\n\n{"text": "b", "x": -Infinity}\n',
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_json_documents(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.json", DOCUMENTS[case])
    whole = texts(opened(file).examples())
    assert [text for _, text in whole] == ["a", "b", "c"][: len(whole)] and whole
    monkeypatch.setattr("qk_sniffer.corpus.json_files._CHUNK", 1)
    assert texts(opened(file).examples()) == whole


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a"}\n{"text": "b"\n', 2),
        ('[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', 3),
        ('[\n{"text": "a"},\n', 3),
        ('[\n{"text": "a"},\n]', 3),
        ('[{"text": "a"},\n{"text": oops}, {"text": "' + "b" * 100 + '"}]', 2),
        ('{"text": "a"}\n[1]\n', 2),
        ("[1, 2]", 1),
        ('["id 1", "a"]\n["id 2", "b"]\n', 2),
        ('["a",\n"b"]\n\n{"text": "c"}\n', 4),
        ('{"text": "a", "n": ' + "9" * 5_000 + "}\n", 1),
        ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}\n", 1),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', 2),
    ],
)
def test_broken_json_is_named_by_its_line(tmp_path: Path, content: str, line: int) -> None:
    text = message(write(tmp_path / "rows.json", content))
    assert "JSON parse error" in text and f"line {line}" in text


@both_ways
@pytest.mark.parametrize("layout", ["{}\n{}\n", "[{},\n{}]"], ids=["lines", "a list"])
def test_a_column_that_an_object_has_twice_is_an_error(tmp_path: Path, layout: str, streaming: bool) -> None:
    def rows(second: str) -> Path:
        return write(tmp_path / "rows.json", layout.format('{"text": "a", "id": 1}', second))

    file = rows('{"text": "b", "id": 2, "text": "c"}')
    assert "the object in line 2 has the key 'text' twice" in message(file, streaming=streaming)
    file = rows('{"text": "b", "id": 2, "id": 3, "deep": {"text": 1, "text": 2}}')
    assert texts(opened(file, streaming=streaming).examples()) == [(0, "a"), (1, "b")]
    assert "the object in line 2 has the key 'id' twice" in message(file, id_column="id", streaming=streaming)


def test_a_large_list_is_read_piece_by_piece(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    with file.open("w") as out:
        out.write("[")
        for number in range(400):
            out.write(json.dumps({"text": "x" * 50_000, "n": number}) + (",\n" if number < 399 else "]"))
    tracemalloc.start()
    try:
        assert sum(1 for _ in opened(file).examples()) == 400
        assert tracemalloc.get_traced_memory()[1] < file.stat().st_size / 2
    finally:
        tracemalloc.stop()


# ---- Parquet


@both_ways
def test_integers_that_became_floats_are_integers(tmp_path: Path, streaming: bool) -> None:
    columns = {"id": pa.array([1.0, float("nan"), 3.0, 0.5]), "text": ["a", "", "b", "c"]}
    file = write_parquet(tmp_path / "rows.parquet", columns)
    examples = list(opened(file, id_column="id", streaming=streaming).examples())
    assert [(each.source_id, each.example_id) for each in examples[:2]] == [("1", 1), ("3", 3)]
    assert examples[2].source_id == "0.5"
    assert texts(opened(file, filter={"id": 3}, streaming=streaming).examples()) == [(2, "b")]


@both_ways
def test_a_parquet_text_that_is_not_utf_8_is_named_with_its_column(tmp_path: Path, streaming: bool) -> None:
    wrong = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xe9"]).buffers())
    text = message(write_parquet(tmp_path / "rows.parquet", {"text": wrong}), streaming=streaming)
    assert "its column 'text' holds text that is not UTF-8" in text and "iconv" not in text


@both_ways
def test_strings_and_ids_of_every_arrow_type(tmp_path: Path, streaming: bool) -> None:
    rows = ["a", "b", "a"]
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        file = write_parquet(
            tmp_path / f"{kind}.parquet", {"text": pa.array(rows).cast(kind), "id": pa.array([1, 2, 3])}
        )
        assert [text for _, text in texts(opened(file, streaming=streaming).examples())] == rows
        assert len(ids(opened(file, filter={"text": "a"}, streaming=streaming))) == 2
    numbers = [uuid.UUID(int=number) for number in (1, 2)]
    of_uuid = pa.array([number.bytes for number in numbers], pa.binary(16))
    of_map = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64()))
    columns = {"text": ["a", "b"], "id": pa.ExtensionArray.from_storage(pa.uuid(), of_uuid), "map": of_map}
    file = write_parquet(tmp_path / "odd.parquet", columns)
    assert texts(opened(file, streaming=streaming).examples()) == [(0, "a"), (1, "b")]
    assert ids(opened(file, id_column="id", streaming=streaming)) == [str(number) for number in numbers]
    assert "column 'map' holds map, not text" in message(file, text_column="map", streaming=streaming)


@both_ways
def test_only_the_used_columns_of_parquet_are_read(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    real = pq.ParquetFile.iter_batches

    def iter_batches(self: pq.ParquetFile, *args: Any, **options: Any) -> Iterator[Any]:
        asked.append(options["columns"])
        return iter(real(self, *args, **options))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    columns = {"id": [1, 2], "image": [b"x" * 1000] * 2, "keep": [1, 2], "text": ["a", "b"]}
    file = write_parquet(tmp_path / "rows.parquet", columns)
    assert texts(opened(file, id_column="id", filter={"keep": 2}, streaming=streaming).examples()) == [(1, "b")]
    assert {column for columns in asked for column in columns} == {"id", "keep", "text"}
    if not streaming:
        assert asked[:2] == [["keep"], ["id"]]


def test_large_parquet_files_are_read_in_batches_and_from_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"text {number}" for number in range(1_000)]
    for part in range(2):
        write_parquet(tmp_path / f"{part}.parquet", {"text": rows[part * 500 : part * 500 + 500]}, row_group_size=100)
    monkeypatch.setattr(parquet_files, "_BATCH_BYTES", 500)
    corpus = opened(tmp_path, split="train[100:-50]")
    assert texts(corpus.examples()) == list(enumerate(rows[100:-50]))
    for after in (1, 99, 100, 437, 849):
        assert texts(corpus.examples(after=after)) == list(enumerate(rows[100:-50]))[after:]
    assert corpus.num_rows == 850


@both_ways
def test_a_column_that_is_null_in_the_first_file_has_the_type_of_the_next(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "0.parquet", {"text": pa.nulls(0), "x": pa.nulls(0), "id": pa.nulls(0)})
    write_parquet(tmp_path / "1.parquet", {"text": pa.nulls(2), "x": pa.nulls(2), "id": pa.array([1, 2])})
    write_parquet(tmp_path / "2.parquet", {"text": ["a", "b"], "x": pa.array([0.1, 0.2], pa.float32()), "id": [3, 4]})
    assert texts(opened(tmp_path, streaming=streaming).examples()) == [(2, "a"), (3, "b")]
    corpus = opened(tmp_path, id_column="id", filter={"x": 0.1}, streaming=streaming)
    assert texts(corpus.examples()) == [(2, "a")] and ids(corpus) == ["3"]
    write_parquet(tmp_path / "2.parquet", {"text": [1], "x": [1.0], "id": [3]})
    assert "column 'text' holds int64, not text" in message(tmp_path, streaming=streaming)


@both_ways
def test_several_parquet_columns_of_one_name_are_named(tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    assert "it has several columns 'text'; it has: text, text" in message(file, streaming=streaming)


# ---- text files


@both_ways
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, streaming: bool) -> None:
    content = {"txt": "text", "jsonl": '{"text": "text"}', "csv": "text\ntext\n", "gz": "text"}[name.rpartition(".")[2]]
    data = codecs.BOM_UTF8 + content.encode()
    file = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert texts(opened(file, streaming=streaming).examples()) == [(0, "text")]


@both_ways
def test_the_line_breaks_of_a_text_file_stay(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "a.txt", b"one\r\ntwo\rthree\n")
    assert texts(opened(file, streaming=streaming).examples()) == [(0, "one\r\ntwo\rthree\n")]


@both_ways
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf_16_is_named(tmp_path: Path, name: str, encoding: str, streaming: bool) -> None:
    content = {"txt": "some text\n", "jsonl": '{"text": "text"}\n', "csv": "text\nsome text\n"}[name[2:]]
    file = write(tmp_path / name, content.encode(encoding))
    text = message(file, streaming=streaming)
    assert str(file) in text and f"it is {encoding[:6].upper()}" in text and "iconv -f utf-" in text


@both_ways
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.json"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str, streaming: bool) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n"
    file = write(tmp_path / name, pointer)
    text = message(file, streaming=streaming)
    assert str(file) in text and "Git LFS pointer to a file of 123,456,789 bytes" in text and "git lfs pull" in text


def test_a_compressed_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", gzip.compress(jsonl([{"text": "a"}])))
    assert texts(opened(file).examples()) == [(0, "a")]
    assert texts(opened(write(tmp_path / "a.txt", "BZh4 is a text")).examples()) == [(0, "BZh4 is a text")]
    assert texts(opened(write(tmp_path / "b.txt", bz2.compress(b"a"))).examples()) == [(0, "a")]
    assert "no example has text" in message(write(tmp_path / "c.txt", bz2.compress(b"")))


@both_ways
def test_a_zst_file_that_is_cut_is_named(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package is not installed everywhere. The decompressors of zlib have the same methods.
    package = SimpleNamespace(ZstdDecompressor=lambda: SimpleNamespace(decompressobj=zlib.decompressobj))
    monkeypatch.setitem(sys.modules, "zstandard", package)
    monkeypatch.setattr("qk_sniffer.corpus.data_files._ZSTD_CHUNK", 10)
    rows = [{"text": f"{number}"} for number in range(40)]
    frames = [zlib.compress(jsonl(rows[:20])), zlib.compress(b""), zlib.compress(jsonl(rows[20:]))]
    whole = write(tmp_path / "rows.jsonl.zst", b"".join(frames))
    expected = [(number, f"{number}") for number in range(40)]
    assert texts(opened(whole, streaming=streaming).examples()) == expected
    content = zlib.compressobj()
    cut = content.compress(jsonl(rows)) + content.flush(zlib.Z_SYNC_FLUSH)  # at the end of a line
    for data in (cut, b"".join(frames)[:-1], frames[0] + cut, frames[0] + frames[2][:1]):
        text = message(write(tmp_path / "cut.jsonl.zst", data), streaming=streaming)
        assert "cut.jsonl.zst cannot be read: it ends in the middle of its compressed data" in text


# ---- files that change


@both_ways
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_another_file_of_the_same_name_and_times_is_read(tmp_path: Path, name: str, streaming: bool) -> None:
    # A renamed folder takes its files along with all their times, also with that of the last change of attributes.
    for folder, text in (("now", "one"), ("later", "two")):
        file = write(tmp_path / folder / name, b"")
        if name == "rows.parquet":
            write_parquet(file, {"text": [text]})
        else:
            write(file, f"text\n{text}\n" if name == "rows.csv" else jsonl([{"text": text}]))
        os.utime(file, (10**9, 10**9))
    options = {"data_files": name, "streaming": streaming}
    assert texts(opened(tmp_path / "now", **options).examples()) == [(0, "one")]
    (tmp_path / "now").rename(tmp_path / "before")
    (tmp_path / "later").rename(tmp_path / "now")
    assert texts(opened(tmp_path / "now", **options).examples()) == [(0, "two")]


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", jsonl([{"text": "a"}, {"text": "b"}]))
    corpus = opened(file)
    with file.open("ab") as appended:
        appended.write(jsonl([{"text": "c"}]))
    assert texts(corpus.examples()) == [(0, "a"), (1, "b")], "rows that come later do not matter"
    for rows in ([{"text": "a"}], [{"text": "x"}, {"text": "b"}]):
        write(file, jsonl(rows))
        with pytest.raises(SourceError, match=r"rows\.jsonl was changed while the job read it"):
            list(corpus.examples())


def test_options_that_only_the_library_knows_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "README.md", "---\nconfigs:\n- config_name: x\n  data_files: a.csv\n  skiprows: 1\n---\n")
    write(tmp_path / "a.csv", "# a comment\ntext,id\nNA,1\nb,2\n")
    assert texts(opened(tmp_path).examples()) == [(1, "b")]
    assert "the library datasets reads these csv files with the options skiprows. It guesses types" in caplog.text
