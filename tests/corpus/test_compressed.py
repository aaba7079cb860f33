"""Tests that a file of someone else that is compressed, or names a value many times, does not fill the memory."""

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.data_files import message, opened, texts, write, write_parquet

from qk_sniffer.corpus import parquet_files
from qk_sniffer.corpus.data_files import DataFile, FormatError
from qk_sniffer.errors import SourceError

LONG = b"a" * 8_000_000
CONTENT = {"a.txt": LONG, "a.jsonl": b'{"text": "' + LONG + b'"}\n', "a.csv": b'text\n"' + LONG + b'"\n'}
COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.few(3)
@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", CONTENT)
def test_a_file_does_not_expand_out_of_proportion(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{name}.{suffix}"
    file.write_bytes(COMPRESSED[suffix](CONTENT[name]))
    (example,) = opened(file).examples()
    assert len(example.content) == len(LONG)
    monkeypatch.setattr("qk_sniffer.corpus.data_files.MOST_UNCHECKED_BYTES", 1 << 20)
    with pytest.raises(SourceError, match=r"expand to more than .* MB, which no texts do.* decompress it first"):
        list(opened(file).examples())


def test_a_compressed_file_of_any_name_does_not_expand_out_of_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.xml\n---\n")
    monkeypatch.setattr("qk_sniffer.corpus.data_files.MOST_UNCHECKED_BYTES", 1 << 20)
    (tmp_path / "a.xml").write_bytes(gzip.compress(LONG, mtime=0))  # at some times, the library takes it for a tar
    for streaming in (True, False):
        found = message(tmp_path, streaming=streaming)
        assert "/a.xml: " in found and "which no texts do" in found


REPEATED = pa.array(["a" * (1 << 20)] * 64)
MESSAGE = pa.StructArray.from_arrays([pa.array(["user"] * 64), REPEATED], ["role", "content"])


@pytest.mark.parametrize(
    ("column", "options"),
    [
        ({"text": REPEATED}, {}),
        ({"text": REPEATED}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
        ({"messages": pa.ListArray.from_arrays(pa.array(range(65), pa.int32()), MESSAGE)}, {}),
    ],
    ids=["dictionary", "equal starts", "messages"],
)
def test_a_text_that_parquet_stores_once_comes_out_in_small_batches(
    column: dict[str, pa.Array], options: dict[str, Any], tmp_path: Path
) -> None:
    file = write_parquet(tmp_path / "a.parquet", column, **options)
    (name,) = column
    before, most = pa.total_allocated_bytes(), 0
    for number, row in enumerate(parquet_files.ParquetReader({}).read(DataFile(str(file)), [name]), 1):  # noqa: B007
        assert len(row[name] if name == "text" else row[name][0]["content"]) == 1 << 20
        most = max(most, pa.total_allocated_bytes() - before)
    assert number == 64
    assert most < 2.5 * parquet_files._BATCH_BYTES


def test_parquet_does_not_expand_out_of_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000_000, np.int32)), pa.array(["a"]))
    row = pa.ListArray.from_arrays(pa.array([0, len(many)], pa.int32()), many)
    files = [
        write_parquet(tmp_path / "a.parquet", {"text": [LONG.decode()]}, compression="zstd"),
        write_parquet(tmp_path / "b.parquet", {"text": ["a"], "list": row, "a.b": row}, compression="zstd"),
    ]
    assert len(list(opened(files[0]).examples())) == 1
    monkeypatch.setattr("qk_sniffer.corpus.data_files.MOST_UNCHECKED_BYTES", 1 << 20)
    assert "of it expand to more than 8" in message(files[0])
    for column in ("list", "a.b"):
        with pytest.raises(FormatError, match="of it expand to more than 80"):
            list(parquet_files.ParquetReader({}).read(DataFile(str(files[1])), [column]))
    assert len(list(opened(files[1]).examples())) == 1  # the column is not read


def card(options: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: a.parquet\n{options}---\n"


def test_an_option_of_a_card_does_not_have_the_library_read_parquet_as_a_whole(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["one"], "other": ["a"]})
    write(tmp_path / "README.md", card("  columns: [text]\n"))
    assert texts(opened(tmp_path).examples()) == [(0, "one")]
    assert "other" in message(tmp_path, text_column="other")
    for options in ("  filters: [[text, '=', one]]\n", "  on_bad_files: skip\n"):
        write(tmp_path / "README.md", card(options))
        for streaming in (True, False):
            assert "are not read, because the library datasets does not bound" in message(tmp_path, streaming=streaming)


def test_parquet_that_is_compressed_once_more_or_beside_pictures_is_not_read(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "metadata.parquet", {"file_name": ["a.png"], "text": ["one"]})
    (tmp_path / "a.png").write_bytes(b"")
    refused = "its Parquet files are compressed once more, are of a folder of media"
    assert refused in message(tmp_path, data_files="*.p*")
    packed = write(tmp_path / "b.parquet.gz", gzip.compress(file.read_bytes()))
    assert refused in message(tmp_path, data_files=f"gzip://b.parquet::{packed}")
