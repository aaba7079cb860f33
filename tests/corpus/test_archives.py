"""Tests that archives of several files are refused as texts, whatever their names are, and that none is unpacked."""

import gzip
import tarfile
from pathlib import Path

import pytest
from support.archives import tar, zipped
from support.data_files import both_ways, message, opened, texts, write

from qk_sniffer.corpus.archives import archive_problem, nothing_unpacked
from qk_sniffer.errors import SourceError

REFUSED = "an archive of several files (zip, tar, 7z, rar) or lz4, which is not read as texts. Unpack it"
OF_LIBRARY = "---\nconfigs:\n- config_name: default\n  data_files: {name}\n  on_bad_lines: skip\n---\n"
"""A card for which the library `datasets` reads a CSV file."""


ARCHIVES = {
    "zip": zipped("a.jsonl"),
    "empty.zip": zipped(),
    "tar": tar(),
    "old.tar": tar(form=tarfile.USTAR_FORMAT).replace(b"ustar\x0000", b"\0" * 8),
    "tar.gz": gzip.compress(tar()),
    "TGZ": gzip.compress(tar()),
    "7z": b"7z\xbc\xaf\x27\x1cpacked",
    "rar": b"Rar!\x1a\x07\x00packed",
    "lz4": b"\x04\x22\x4d\x18packed",
}


@both_ways
@pytest.mark.parametrize("suffix", ARCHIVES)
def test_an_archive_is_refused_by_its_name(suffix: str, tmp_path: Path, streaming: bool) -> None:
    name = f"a.txt.{suffix}"
    write(tmp_path / name, b"its name is enough")
    found = message(tmp_path, data_files=name, streaming=streaming)
    assert name in found and REFUSED in found
    write(tmp_path / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n")
    found = message(tmp_path, streaming=streaming)
    assert name in found and REFUSED in found


@pytest.mark.few(3)
@both_ways
@pytest.mark.parametrize("suffix", ["zip", "empty.zip", "tar", "tar.gz", "7z", "rar", "lz4"])
def test_an_archive_is_refused_by_its_content(suffix: str, tmp_path: Path, streaming: bool) -> None:
    for name in ("a.csv", "a.jsonl", "a.txt", "a.csv.gz" if suffix == "tar.gz" else "a.json"):
        file = write(tmp_path / name, ARCHIVES[suffix])
        assert REFUSED in message(file, streaming=streaming), name
        assert REFUSED in message(tmp_path, streaming=streaming), name
        file.unlink()
    write(tmp_path / "README.md", OF_LIBRARY.format(name="a.csv"))
    write(tmp_path / "a.csv", ARCHIVES[suffix])
    assert REFUSED in message(tmp_path, streaming=streaming)
    write(tmp_path / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.xml\n---\n")
    write(tmp_path / "a.xml", ARCHIVES[suffix])
    assert REFUSED in message(tmp_path, streaming=streaming)


def test_a_text_is_no_archive() -> None:
    for text in (b"", b"PK", b"Rar!", b"ustar", b" " * 512, b"a" * 512, b"0" * 512, b"7z is a program"):
        assert archive_problem(text) is None
    header = tar()[:512]
    assert archive_problem(header) and not archive_problem(header[:-1]) and not archive_problem(b"b" + header[1:])


@both_ways
@pytest.mark.parametrize("name", ["a.csv", "a.txt.tar"])
def test_a_link_in_an_archive_writes_no_file(name: str, tmp_path: Path, streaming: bool) -> None:
    import datasets

    planted = tmp_path / "home" / ".bashrc"
    planted.parent.mkdir()
    write(tmp_path / "texts" / name, tar(planted))
    if name == "a.csv":
        write(tmp_path / "texts" / "README.md", OF_LIBRARY.format(name=name))
    message(tmp_path / "texts", streaming=streaming, data_files=name if name.endswith("tar") else None)
    assert not planted.exists()
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("extracted/*"))


def test_a_compressed_file_whose_signed_bytes_add_up_to_nothing_is_no_tar() -> None:
    start = gzip.compress(b"a" * 8_000_000, mtime=0)[:512]
    head = start[:4] + (1_796_005_222).to_bytes(4, "little") + start[8:]
    assert tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").chksum == 0
    assert archive_problem(head) is None


def test_the_library_itself_unpacks_nothing(tmp_path: Path) -> None:
    """Of a repository of the Hub, no file is seen before the library has it."""
    import datasets
    from datasets import DownloadConfig, DownloadManager, StreamingDownloadManager

    planted = tmp_path / "home" / ".bashrc"
    planted.parent.mkdir()
    cache = datasets.config.HF_DATASETS_CACHE
    zips = [zipped("a::/b.zip/c.txt"), zipped("a.txt", after=b"text\n")]
    contents = [tar(planted), gzip.compress(tar(planted)), *zips, gzip.compress(b"text")]
    for on_the_fly in (True, False):
        for content in contents:
            file = write(tmp_path / "a.csv", content)
            manager = DownloadManager(download_config=DownloadConfig(cache, extract_on_the_fly=on_the_fly))
            with nothing_unpacked("dataset"), pytest.raises(SourceError, match=r"a\.csv is"):
                manager.extract(str(file))
    for name in ("a.zip", "a.odd"):
        file = write(tmp_path / name, zipped("a.txt"))
        with nothing_unpacked("dataset"), pytest.raises(SourceError, match=r"which is not read as texts"):
            StreamingDownloadManager().extract(str(file))
    assert not planted.exists()
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("extracted/*"))
    plain = write(tmp_path / "plain.csv", "text")
    with nothing_unpacked("dataset"):
        assert DownloadManager().extract(str(plain)) == str(plain)


@both_ways
def test_the_library_decompresses_the_file_that_is_there_now(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path / "README.md", OF_LIBRARY.format(name="a.csv.gz"))
    for text in ("monday", "tuesday"):
        write(tmp_path / "a.csv.gz", gzip.compress(f"text\n{text}\n".encode()))
        assert texts(opened(tmp_path, streaming=streaming).examples()) == [(0, text)]


@both_ways
def test_an_address_in_an_archive_is_refused_before_the_archive_is_opened(tmp_path: Path, streaming: bool) -> None:
    for address in (f"zip://*.csv::{tmp_path}/a.zip", f"tar://a.csv::{tmp_path}/a.csv", "zip://a::http://127.0.0.1:1/"):
        write(tmp_path / "own.csv", "text\nown\n")
        assert REFUSED in message(tmp_path, data_files=address, streaming=streaming)
