"""Tests that the file which is read is the one that was checked: within its folder, and that of the last reading."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data_files import FORMATS, both_ways, csv, jsonl, opened, texts, write

from qk_sniffer.corpus.data_files import DataFile, open_bytes
from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.store.open_folder import OpenFolder

ROWS = [{"text": "own"}]
SECRET = [{"text": "secret"}]


def written(name: str, rows: list[dict[str, Any]]) -> bytes:
    return str(rows[0]["text"]).encode() if name.endswith(".txt") else FORMATS[name](rows)


@pytest.mark.few(3)
@both_ways
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json", "rows.csv", "rows.csv.gz", "a.txt"])
def test_a_file_that_becomes_a_link_is_not_read(tmp_path: Path, name: str, streaming: bool) -> None:
    file = write(tmp_path / "texts" / name, written(name, ROWS))
    secret = write(tmp_path / "secret", written(name, SECRET))
    corpus = opened(file.parent, streaming=streaming)
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(SourceError, match=r"leads out of the dataset, to .*secret"):
        list(corpus.examples())


@pytest.mark.parametrize("at", ["file", "folder"])
def test_a_link_that_appears_between_the_check_and_the_opening_is_not_followed(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "texts" / "inner" / "rows.jsonl", jsonl(ROWS))
    secret = write(tmp_path / "secrets" / "rows.jsonl", jsonl(SECRET))
    corpus = opened(tmp_path / "texts")

    def swap(path: Path, to: Path) -> None:
        path.rename(tmp_path / "away")
        path.symlink_to(to)

    method = "open" if at == "file" else "folder"
    real = getattr(OpenFolder, method)

    def late(folder: OpenFolder, name: str, **options: Any) -> Any:
        path, to = (file, secret) if at == "file" else (file.parent, secret.parent)
        if name == path.name and not path.is_symlink():
            swap(path, to)
        return real(folder, name, **options)

    monkeypatch.setattr(OpenFolder, method, late)
    with pytest.raises(SourceError, match=r"rows\.jsonl cannot be read: it is a link, which is not followed"):
        list(corpus.examples())


def test_a_file_of_the_cache_that_becomes_a_link_is_not_read(tmp_path: Path) -> None:
    blob = write(tmp_path / "datasets--a--b" / "blobs" / "1234", "own")
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "a.txt").symlink_to("../../blobs/1234")
    file = DataFile(str(snapshot / "a.txt"), snapshot)
    with open_bytes(file) as content:
        assert content.read() == b"own"
    blob.unlink()
    blob.symlink_to(write(tmp_path / "secret", "xxx"))
    with pytest.raises(StoreError, match="leads out of the dataset"), open_bytes(file):
        pass


def swapped_and_back(path: Path, secret: Path, read: Callable[[], Any]) -> Any:
    path.rename(away := path.with_name("away"))
    path.symlink_to(secret)
    found = read()
    path.unlink()
    away.rename(path)
    return found


@pytest.mark.parametrize("before", ["", "gzip://a.csv::"])
def test_a_file_that_is_another_one_while_the_library_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    from datasets import DatasetBuilder

    (tmp_path / "texts").mkdir()
    file = write(tmp_path / "texts" / "a.csv.gz", gzip.compress(b"text\nown\n"))
    secret = write(tmp_path / "a.csv.gz", gzip.compress(b"text\nsecret\n"))
    write(tmp_path / "texts" / "README.md", "---\nconfigs:\n- config_name: default\n  on_bad_lines: skip\n---\n")
    prepare = DatasetBuilder.download_and_prepare

    def late(builder: DatasetBuilder, *args: Any, **options: Any) -> Any:
        return swapped_and_back(file, secret, lambda: prepare(builder, *args, **options))

    monkeypatch.setattr(DatasetBuilder, "download_and_prepare", late)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # the library takes every address for a remote one
    with pytest.raises(SourceError, match="a file was changed while the job read it"):
        opened(tmp_path / "texts", data_files=f"{before}{file}")


FEW, MORE = [{"text": "a"}, {"text": "b"}], [{"text": "a"}, {"text": "b"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl", jsonl(FEW), jsonl([{"text": "x"}, *MORE])),
        ("a.jsonl", jsonl([*FEW, {"text": "x"}]), jsonl([*MORE, {"text": "d"}])),
        ("a.csv", csv(FEW), csv(FEW) + b"more"),
        ("a.jsonl.gz", gzip.compress(jsonl(FEW)), gzip.compress(jsonl(FEW)) + gzip.compress(jsonl(FEW))),
        ("a.parquet", FORMATS["rows.parquet"](FEW), FORMATS["rows.parquet"](MORE * 99)),
    ],
    ids=["another start", "another end", "half a line", "compressed", "without lines"],
)
def test_a_file_grows_by_whole_lines_alone(tmp_path: Path, name: str, before: bytes, after: bytes) -> None:
    file = write(tmp_path / name, before)
    corpus = opened(file)
    assert len(after) > len(before)
    file.write_bytes(after)
    with pytest.raises(SourceError, match="was changed while the job read it"):
        list(corpus.examples())


def test_a_text_that_grows_is_another_example(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a line\n")
    corpus = opened(file)
    assert texts(corpus.examples()) == [(0, "a line\n")]
    file.write_text("a line\nmore\n")
    with pytest.raises(SourceError, match="was changed while the job read it"):
        list(corpus.examples())


def test_a_file_that_is_another_one_during_a_reading(tmp_path: Path) -> None:
    """Its path has the file of the first reading before and after."""
    file, other = write(tmp_path / "a.jsonl", jsonl(FEW)), write(tmp_path / "other", jsonl([{"text": "x"}, *MORE]))
    corpus = opened(file)
    with pytest.raises(SourceError, match="was changed while the job read it"):
        swapped_and_back(file, other, lambda: list(corpus.examples()))
