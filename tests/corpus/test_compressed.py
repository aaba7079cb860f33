"""Tests that a file of someone else that is compressed, or names a value many times, does not fill the memory."""

import bz2
import gzip
import io
import lzma
import shutil
import zipfile
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


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_an_archive_does_not_expand_out_of_proportion(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n")
    line = write(tmp_path / "line" / "a.jsonl", CONTENT["a.jsonl"])
    form = "zip" if name.endswith("zip") else "gztar"
    Path(shutil.make_archive(str(tmp_path / "made"), form, line.parent)).rename(tmp_path / name)
    shutil.rmtree(line.parent)
    monkeypatch.setattr("qk_sniffer.corpus.data_files.MOST_UNCHECKED_BYTES", 1 << 20)
    for streaming in (True, False):
        found = message(tmp_path, streaming=streaming)
        assert f"/{name}: " in found and "which no texts do" in found


@pytest.mark.parametrize("suffix", ["7z", "rar", "lz4", "LZ4"])
def test_an_archive_that_does_not_tell_the_size_of_its_content_is_refused(suffix: str, tmp_path: Path) -> None:
    refused = "is refused: the size of what is packed in it (7z, rar, lz4) is not known"
    for name, problem in ((f"a.jsonl.{suffix}", refused), (f"a.{suffix}", "with a suffix that datasets reads")):
        write(tmp_path / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n")
        write(tmp_path / name, "packed")
        for streaming in (True, False):
            found = message(tmp_path, streaming=streaming)
            assert name in found and problem in found
        (tmp_path / name).unlink()


@pytest.mark.parametrize("start", [b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07\x00", b"\x04\x22\x4d\x18"])
def test_such_an_archive_is_told_by_its_content_too(start: bytes, tmp_path: Path) -> None:
    write(tmp_path / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.xml\n---\n")
    (tmp_path / "a.xml").write_bytes(start + b"packed")
    for streaming in (True, False):
        assert "a.xml: the size of what is packed in it" in message(tmp_path, streaming=streaming)


def test_a_packed_file_of_any_name_does_not_expand_out_of_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.xml\n---\n")
    monkeypatch.setattr("qk_sniffer.corpus.data_files.MOST_UNCHECKED_BYTES", 1 << 20)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.xml", LONG)
    for content in (gzip.compress(LONG), packed.getvalue()):
        (tmp_path / "a.xml").write_bytes(content)
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


def test_parquet_in_an_archive_or_beside_pictures_is_not_read(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "metadata.parquet", {"file_name": ["a.png"], "text": ["one"]})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(file, "b.parquet")
    (tmp_path / "a.png").write_bytes(b"")
    for data_files in ("a.zip", f"zip://b.parquet::{tmp_path}/a.zip", "*.p*"):
        assert "its Parquet files are in an archive, are of a folder of media" in message(
            tmp_path, data_files=data_files
        )
