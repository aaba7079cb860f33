"""Tests that sources of every kind are read, streamed and not, and that every problem of a source is reported."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import data_files
from support.data_files import FORMATS, ROWS, TEXTS, both_ways, jsonl, message, opened, parquet, texts, write

from qk_sniffer.corpus.home import check_home
from qk_sniffer.errors import ColumnError, SourceError

# ---- what is read


@both_ways
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_every_kind_gives_its_texts(tmp_path: Path, name: str, streaming: bool) -> None:
    corpus = opened(write(tmp_path / name, FORMATS[name](ROWS)), streaming=streaming)
    assert corpus.commit is None
    assert corpus.num_rows == (None if streaming else 6)
    assert texts(corpus.examples()) == TEXTS
    assert corpus.skipped == 3
    assert texts(corpus.examples()) == TEXTS, "a second iteration starts again"
    assert corpus.skipped == 3


@both_ways
@pytest.mark.parametrize("name", ["book.txt", "book.TXT", "book.txt.gz"])
def test_a_text_file_is_one_example(tmp_path: Path, name: str, streaming: bool) -> None:
    content = "one\n\ntwo  \n" * 1000
    file = write(tmp_path / name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    assert texts(opened(file, streaming=streaming).examples()) == [(0, content)]


@both_ways
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.csv", "rows.jsonl.gz"])
def test_a_folder_gives_all_its_files_in_order(tmp_path: Path, name: str, streaming: bool) -> None:
    for folder, part in (("b", ROWS[2:4]), ("a", ROWS[:2]), ("c/deep", ROWS[4:])):
        write(tmp_path / folder / name, FORMATS[name](part))
    write(tmp_path / "README.md", "# no front matter")
    write(tmp_path / ".hidden" / name, FORMATS[name](ROWS))
    assert texts(opened(tmp_path, streaming=streaming).examples()) == TEXTS


@both_ways
def test_in_a_folder_of_text_files_each_is_one_example(tmp_path: Path, streaming: bool) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        write(tmp_path / name, f"I am\n{name}")
    assert texts(opened(tmp_path, streaming=streaming).examples()) == [
        (0, "I am\na.txt"),
        (1, "I am\nb.txt"),
        (2, "I am\nsub/c.txt"),
    ]


@pytest.mark.parametrize("folder", ["plain", "[odd] *"])
def test_no_file_of_a_folder_is_left_out_for_its_name(tmp_path: Path, folder: str) -> None:
    # `datasets` alone takes `my_test.txt` for the test split, and reads no other file.
    for name in ("a.txt", "my_test.txt", "part.json.txt", "z [1].txt"):
        write(tmp_path / folder / name, name)
    assert [text for _, text in texts(opened(tmp_path / folder).examples())] == [
        "a.txt",
        "my_test.txt",
        "part.json.txt",
        "z [1].txt",
    ]


@both_ways
def test_splits_of_a_folder_and_chosen_files(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path / "train.jsonl", jsonl(ROWS[:1]))
    write(tmp_path / "test.jsonl", jsonl(ROWS[2:3]))
    assert texts(opened(tmp_path, streaming=streaming).examples()) == [(0, "first text")]
    assert texts(opened(tmp_path, split="test", streaming=streaming).examples()) == [(0, "third, é and 漢")]
    chosen = opened(tmp_path, data_files="test.jsonl", streaming=streaming)
    assert texts(chosen.examples()) == [(0, "third, é and 漢")]
    mapped = opened(tmp_path, split="odd", data_files={"odd": ["*.jsonl"]}, streaming=streaming)
    assert sorted(text for _, text in texts(mapped.examples())) == ["first text", "third, é and 漢"]
    if not streaming:
        assert len(texts(opened(tmp_path, split="train+test").examples())) == 2


@both_ways
def test_the_configs_of_a_folder_with_a_card(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path / "x" / "1.txt", "one\nline")
    write(tmp_path / "y" / "2.txt", "two")
    card = "---\nconfigs:\n- config_name: x\n  data_files: x/*.txt\n- config_name: y\n  data_files: y/*.txt\n---\n"
    write(tmp_path / "README.md", card)
    assert texts(opened(tmp_path, name="x", streaming=streaming).examples()) == [(0, "one\nline")]
    assert texts(opened(tmp_path, name="y", streaming=streaming).examples()) == [(0, "two")]
    for name in (None, "z"):
        assert "x, y" in message(tmp_path, name=name, streaming=streaming)


@both_ways
def test_the_embedded_documentation(streaming: bool) -> None:
    from pydoc_data.topics import topics

    corpus = opened("pydoc", id_column="id", streaming=streaming)
    examples = list(corpus.examples())
    assert [example.source_id for example in examples] == sorted(topics)
    assert [example.content for example in examples] == [topics[name] for name in sorted(topics)]
    assert [example.index for example in examples] == list(range(len(topics)))
    assert corpus.commit is None
    assert "no split 'test'" in message("pydoc", split="test", streaming=streaming)


# ---- what is wrong with a source


@both_ways
def test_wrong_columns_are_named_with_the_existing_ones(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "rows.parquet", parquet(ROWS))
    text = message(file, text_column="body", streaming=streaming)
    assert "no column 'body'. Set dataset.text_column" in text and "id (string), text (string), n (int64)" in text
    assert "column 'n' holds int64, not text" in message(file, text_column="n", streaming=streaming)
    text = message(file, id_column="key", streaming=streaming)
    assert "no column 'key'. Set dataset.id_column" in text and "n (int64)" in text
    for wrong in ({"text_column": "body"}, {"text_column": "n"}, {"id_column": "key"}):
        with pytest.raises(ColumnError) as refused:
            opened(file, **wrong, streaming=streaming)
        assert refused.value.exit_code == 2


@both_ways
def test_a_source_without_texts_is_an_error(tmp_path: Path, streaming: bool) -> None:
    empties = [{"text": ""}, {"text": None}, {"text": "  "}]
    file = write(tmp_path / "empties.jsonl", jsonl(empties))
    assert "no example has text in column 'text'" in message(file, streaming=streaming)
    for index in range(2):
        with pytest.raises(SourceError, match="no example has text"):
            list(opened(file, streaming=streaming).examples(shard_index=index, shard_count=2))
    assert "no example has text" in message(write(tmp_path / "empty.txt", ""), streaming=streaming)
    for name, content in (("empty.jsonl", b""), ("head.csv", b"text,id\n"), ("none.parquet", parquet(ROWS)[:0])):
        file = write(tmp_path / name, content)
        assert str(file) in message(file, streaming=streaming)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "no_rows.parquet")
    text = message(tmp_path / "no_rows.parquet", streaming=streaming)
    assert "no_rows.parquet cannot be read: it has no examples" in text


BROKEN = {
    "cut.parquet": (parquet(ROWS)[:-40], "magic bytes"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": oops}\n', "JSON parse error"),
    "late.jsonl": (jsonl([{"text": "a" * 10_000}]) * 2_000 + b"{oops\n", "JSON parse error"),
    "bad.csv": (b'text,id\n"a",1\n"b",2,3,4\n', "Expected 2 fields in line 3, saw 4"),
    "latin.csv": ("text\nété\n".encode("latin1"), "not UTF-8"),
    "latin.txt": ("été".encode("latin1"), "not UTF-8"),
    "cut.jsonl.gz": (gzip.compress(jsonl(ROWS) * 1000)[:40], "ended before"),
    "not.txt.gz": (b"plain text", "Not a gzipped file"),
}


@both_ways
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_parsers_reason(tmp_path: Path, name: str, streaming: bool) -> None:
    content, reason = BROKEN[name]
    broken = write(tmp_path / name, content)
    text = message(broken, streaming=streaming)
    assert str(broken) in text and reason in text


@both_ways
@pytest.mark.parametrize("name", ["cut.parquet", "late.jsonl", "latin.txt", "cut.jsonl.gz"])
def test_the_broken_file_of_a_folder_is_found(tmp_path: Path, name: str, streaming: bool) -> None:
    content, reason = BROKEN[name]
    broken = write(tmp_path / "data" / f"b-{name}", content)
    whole = {"parquet": parquet(ROWS), "txt": "text", "jsonl": jsonl(ROWS), "gz": gzip.compress(jsonl(ROWS))}
    for first in "ac":
        write(tmp_path / "data" / f"{first}-{name}", whole[name.rsplit(".")[-1]])
    text = message(tmp_path / "data", streaming=streaming)
    assert f"file {broken} cannot be read" in text and reason in text


@both_ways
def test_files_need_only_the_columns_that_are_used(tmp_path: Path, streaming: bool) -> None:
    for name, form in FORMATS.items():
        folder = tmp_path / name.strip("[]*")
        write(folder / f"a-{name}", form([{"text": "a"}]))
        write(folder / f"b-{name}", form([{"extra": 1, "text": "b"}]))
        assert texts(opened(folder, streaming=streaming).examples()) == [(0, "a"), (1, "b")]
    write(tmp_path / "other" / "a.csv", "text,id\na,1\n")
    other = write(tmp_path / "other" / "b.csv", "body,id\nb,2\n")
    text = message(tmp_path / "other", streaming=streaming)
    assert f"file {other} cannot be read" in text and "no column 'text'; it has: body, id" in text


def test_local_paths_that_cannot_be_used(tmp_path: Path, in_tmp: Path) -> None:
    assert "dataset.path is not set" in message("")
    assert "no such file or folder" in message("./missing")
    assert "no such file or folder" in message("missing.jsonl")
    assert "no such file or folder" in message("folder/rows.parquet")
    text = message(write(tmp_path / "paper.pdf", b"%PDF"))
    assert "paper.pdf" in text and ".parquet, .jsonl" in text and ".gz" in text
    assert ".parquet" in message(write(tmp_path / "rows.parquet.gz", b""))
    (tmp_path / "none").mkdir()
    assert "it is empty" in message(tmp_path / "none")
    write(tmp_path / "pdfs" / "paper.pdf", b"%PDF")
    assert "paper.pdf" in message(tmp_path / "pdfs")
    write(tmp_path / "mixed" / "rows.jsonl", jsonl(ROWS))
    write(tmp_path / "mixed" / "LICENSE.txt", "free")
    text = message(tmp_path / "mixed")
    assert "json, text" in text and "LICENSE.txt" in text and "dataset.data_files='*.jsonl'" in text
    assert texts(opened(tmp_path / "mixed", data_files="*.jsonl").examples()) == TEXTS
    assert "dataset.data_files" in message(tmp_path / "mixed", data_files="*.parquet")
    file = tmp_path / "mixed" / "rows.jsonl"
    assert "dataset.name=x does not apply" in message(file, name="x")
    assert "dataset.revision=x does not apply" in message(tmp_path / "mixed", revision="x")


def test_a_folder_that_save_to_disk_wrote_is_explained(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    assert "to_parquet" in message(tmp_path / "saved")


@both_ways
def test_an_unknown_split_is_reported_with_the_existing_ones(tmp_path: Path, streaming: bool) -> None:
    file = write(tmp_path / "rows.jsonl", jsonl(ROWS))
    assert "no split 'test'. Choose one with dataset.split: train" in message(file, split="test", streaming=streaming)
    if streaming:
        assert "dataset.max_samples" in message(file, split="train[:2]", streaming=True)
    else:
        assert texts(opened(file, split="train[:3]").examples()) == TEXTS[:2]
        assert "no split 'train+dev'" in message(file, split="train+dev")
        assert "dataset.split=train[1:2:3:4]" in message(file, split="train[1:2:3:4]")


def test_a_zst_file_says_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    from fsspec.compression import compr

    file = write(tmp_path / "rows.jsonl.zst", b"\x28\xb5\x2f\xfdbroken")
    text = message(file)
    assert str(file) in text and ("zstandard" in text) == ("zstd" not in compr)


# ---- files from elsewhere

CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: [own.csv, {path}]
  header: null
  names: [text]
---
"""


@both_ways
def test_a_card_names_no_files_outside_of_its_folder(tmp_path: Path, streaming: bool) -> None:
    secret = write(tmp_path / "home" / "config.json", '{"token": "x"}')
    write(tmp_path / "texts" / "own.csv", "own")
    write(tmp_path / "texts" / "inner" / "other.csv", "own")
    for path in (secret, "../home/config.json", "inner/../../home/config.json", f"file://{secret}"):
        write(tmp_path / "texts" / "README.md", CARD.format(path=path))
        text = message(tmp_path / "texts", streaming=streaming)
        assert ".huggingface.yaml names" in text and "config.json" in text and "dataset.data_files" in text, path
    (tmp_path / "texts" / "folder").symlink_to(tmp_path / "home" / "away")
    write(tmp_path / "home" / "away" / "file", "")
    write(tmp_path / "texts" / "README.md", CARD.format(path="folder/../config.json"))
    assert "leads out of the dataset" in message(tmp_path / "texts", streaming=streaming), "of the text, it is inside"
    named = opened(tmp_path / "texts", streaming=streaming, data_files=str(secret), text_column="token")
    assert texts(named.examples()) == [(0, "x")], "files that the user names are read"


def test_a_pattern_of_a_card_is_checked_before_anything_is_listed_or_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = data_files.url_to_fs
    monkeypatch.setattr(data_files, "url_to_fs", lambda url, **options: asked.append(url) or real(url, **options))
    folder = tmp_path / "texts"
    write(folder / "own.csv", "own")
    write(tmp_path / "secret.csv", "x")
    for path in (
        f"{tmp_path}/**",
        "../*.csv",
        "inner/../../*.csv",
        f"file://{tmp_path}/*.csv",
        "http://127.0.0.1:1/a.csv",
        "zip://*.csv::http://127.0.0.1:1/a.zip",
        f"zip://*.csv::{tmp_path}/a.zip",
        "simplecache::http://127.0.0.1:1/a.csv",
    ):
        for name, written in OTHER_FORMS.values():
            write(folder / name, written(CARD.format(path=f'"{path}"')))
            assert ".huggingface.yaml names" in message(folder, streaming=False), path
            (folder / name).unlink()
    assert asked and all(Path(url).is_relative_to(folder) for url in asked)


@pytest.mark.parametrize("inner", [None, "inner"])
def test_no_folder_elsewhere_is_listed_for_a_card(
    tmp_path: Path, inner: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": listed.append(os.path.realpath(path)) or real(path))
    folder, secret = tmp_path / "texts", tmp_path / "secret"
    for path in (folder / "a.csv", folder / "inner" / "a.csv", secret / "a.csv"):
        write(path, "text\nown")
    (folder / "link").symlink_to(secret)
    for place in (
        *(f"data_dir: {path}" for path in (secret, "../secret", "/", "link", "inner/../link")),
        *(f"data_files: {path}" for path in ("link/**", "link/../secret/*", "inner/../link/*")),
    ):
        write(folder / "README.md", f"---\nconfigs:\n- config_name: default\n  {place}\n- config_name: inner\n---\n")
        message(folder, name=inner)
        assert listed and all(Path(path).is_relative_to(folder) for path in listed), place
    write(folder / "README.md", "---\nconfigs:\n- config_name: default\n  data_dir: inner\n---\n")
    assert texts(opened(folder).examples()) == [(0, "own")]


def test_a_repository_of_the_hub_has_only_its_own_files() -> None:
    home = "hf://datasets/org/name@1234/"
    check_home("dataset", [f"{home}a.csv", f"gzip://b.csv::{home}b.csv.gz"], home, is_named=False)
    for file in ("/home/me/secret.csv", "hf://datasets/me/private@1234/a.csv", "https://169.254.169.254/a.csv"):
        check_home("dataset", [file], home, is_named=True)
        with pytest.raises(SourceError, match=r"\.huggingface\.yaml names"):
            check_home("dataset", [file], home, is_named=False)


def without_dashes(card: str) -> str:
    return card.removeprefix("---\n").removesuffix("---\n")


OTHER_FORMS = {
    "a blank line first": ("README.md", lambda card: f"\n{card}"),
    "spaces first": ("README.md", lambda card: f"  {card}"),
    "a quoted key": ("README.md", lambda card: card.replace("configs:", '"configs":')),
    "a space in the key": ("README.md", lambda card: card.replace("configs:", "configs :")),
    "no card": (".huggingface.yaml", without_dashes),
    "JSON": ("README.md", lambda card: f"---\n{json.dumps(yaml.safe_load(without_dashes(card)))}\n---\n"),
    "an escaped key": ("README.md", lambda card: card.replace("configs:", r'"\x63onfigs":')),
}
"""Files that name the files of a folder for `datasets`, however they do: their names, and their content from a card."""


@both_ways
@pytest.mark.parametrize("how", OTHER_FORMS)
def test_every_file_that_is_found_for_a_folder_is_its_own(tmp_path: Path, how: str, streaming: bool) -> None:
    name, written = OTHER_FORMS[how]
    folder, secret = tmp_path / "texts", write(tmp_path / "secret.csv", "x")
    write(folder / "own.csv", "text\nown")
    write(folder / name, written(CARD.format(path=secret)))
    text = message(folder, streaming=streaming)
    assert f".huggingface.yaml names {secret}" in text and "dataset.data_files" in text
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "linked.csv").symlink_to(secret)
    write(folder / name, written(CARD.format(path=".hidden/linked.csv")))
    text = message(folder, streaming=streaming)
    assert "linked.csv leads out of the dataset" in text and str(secret) in text
    (folder / ".hidden" / "linked.csv").unlink()
    write(folder / ".hidden" / "linked.csv", "text\nhidden")
    assert texts(opened(folder, streaming=streaming).examples()) == [
        (0, "text"),
        (1, "own"),
        (2, "text"),
        (3, "hidden"),
    ]


@both_ways
@pytest.mark.parametrize("data_files", [None, "*.txt*"])
def test_a_link_that_only_datasets_finds_leads_nowhere(tmp_path: Path, data_files: str | None, streaming: bool) -> None:
    secret = write(tmp_path / "secret.txt", "x")
    write(tmp_path / "texts" / "own.txt", "own")
    (tmp_path / "texts" / "b.txt.log").symlink_to(secret)
    assert "b.txt.log leads out" in message(tmp_path / "texts", streaming=streaming, data_files=data_files)
    (tmp_path / "texts" / "b.txt.log").unlink()
    write(tmp_path / "texts" / "b.txt.log", "log")
    found = opened(tmp_path / "texts", streaming=streaming, data_files=data_files)
    assert texts(found.examples()) == [(0, "log"), (1, "own")]


@both_ways
def test_the_name_of_a_folder_or_file_is_no_pattern_or_chain(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "texts*"
    write(folder / "a::b.txt", "a")
    write(folder / "c.txt", "c")
    write(tmp_path / "texts2" / "d.txt", "not of this folder")
    assert texts(opened(folder, streaming=streaming).examples()) == [(0, "a"), (1, "c")]
    (folder / "a::b.txt").unlink()
    assert texts(opened(folder, streaming=streaming).examples()) == [(0, "c")]
    (folder / "a::b.txt").symlink_to(write(tmp_path / "secret.txt", "x"))
    assert "a::b.txt leads out of the dataset" in message(folder, streaming=streaming)


@both_ways
def test_a_card_reads_compressed_files_and_no_file_that_another_lists(tmp_path: Path, streaming: bool) -> None:
    folder, secret = tmp_path / "texts", write(tmp_path / "secret.csv", "x")
    write(folder / "own.csv", "own")
    listed = write(folder / "refs.json", json.dumps({"version": 1, "refs": {"a.csv": [f"file://{secret}"]}}))
    write(folder / "README.md", CARD.format(path=f'"reference://a.csv::{listed}"'))
    text = message(folder, streaming=streaming)
    assert f"names reference://a.csv::{listed}" in text and "gzip" in text and "dataset.data_files" in text
    write(folder / "packed.csv.gz", gzip.compress(b"packed"))
    write(folder / "README.md", CARD.format(path=f'"gzip://packed.csv::{folder}/packed.csv.gz"'))
    if streaming:  # offline, `datasets` reads no address that a card has, but streams it
        assert texts(opened(folder, streaming=True).examples()) == [(0, "own"), (1, "packed")]


def test_each_hop_to_a_file_is_of_a_compression(tmp_path: Path) -> None:
    own = f"{tmp_path}/a.gz"
    for protocol in ("gzip", "bz2", "xz", "zstd", "gzip://b::xz"):
        check_home("folder", [f"{protocol}://a::{own}"], tmp_path, is_named=False)
    chains = "gzip://a::reference://b reference://a::gzip://b /a::gzip://b gzip://../a zip://a tar://a"
    for hop in f"reference://a file:///a simplecache://a GZIP://a gzip {chains}".split():
        with pytest.raises(SourceError, match="not a file of this dataset"):
            check_home("folder", [f"{hop}::{own}"], tmp_path, is_named=False)
        check_home("folder", [f"{hop}::{own}"], tmp_path, is_named=True)


@both_ways
@pytest.mark.parametrize("named", [None, "tasks/a/task.toml"])
def test_a_format_that_leads_to_other_files_is_not_read(tmp_path: Path, named: str | None, streaming: bool) -> None:
    folder, secret = tmp_path / "texts", write(tmp_path / "secret", "x")
    write(folder / "tasks" / "a" / "task.toml", "[task]\nname = 'a'\n")
    (folder / "tasks" / "a" / "instruction.md").symlink_to(secret)
    if named is None:
        write(folder / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: tasks/a/task.toml\n---\n")
    text = message(folder, streaming=streaming, data_files=named, text_column="instruction")
    assert "of the format harbor, which may lead to other files" in text and "Convert them to parquet" in text


@both_ways
@pytest.mark.parametrize("how", ["card", "data_files"])
def test_arrow_files_are_refused_with_a_way_to_convert_them(tmp_path: Path, how: str, streaming: bool) -> None:
    table = pa.table({"text": ["a"]})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    if how == "card":
        write(tmp_path / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.arrow\n---\n")
    data_files = {"card": None, "data_files": "*.arrow"}[how]
    text = message(tmp_path, streaming=streaming, data_files=data_files)
    assert "its data files are Arrow files, which are not read" in text
    assert "from_file('a.arrow').to_parquet('a.parquet')" in text and "refs/convert/parquet" in text
    datasets.Dataset.from_file(str(tmp_path / "a.arrow")).to_parquet(tmp_path / "a.parquet")
    assert texts(opened(tmp_path / "a.parquet", streaming=streaming).examples()) == [(0, "a")]


@both_ways
@pytest.mark.parametrize("how", ["bare", "card", "data_files"])
def test_a_link_leads_to_no_file_outside_of_its_folder(tmp_path: Path, how: str, streaming: bool) -> None:
    folder, secret = tmp_path / "texts", write(tmp_path / "secret", "x")
    write(folder / "own.csv", "own\nrow")
    link = folder / "linked.csv"
    link.symlink_to(secret)
    if how == "card":
        write(folder / "README.md", CARD.format(path=link.name))
    text = message(folder, streaming=streaming, data_files="*.csv" if how == "data_files" else None)
    assert "linked.csv leads out of the dataset" in text and str(secret) in text
    link.unlink()
    link.symlink_to("own.csv")
    (folder / "README.md").unlink(missing_ok=True)
    own = opened(folder, streaming=streaming, data_files={"train": "linked.csv"}, text_column="own")
    assert texts(own.examples()) == [(0, "row")]


DESCRIPTIONS = {
    "README.md": "---\nconfigs:\n- {config_name: secret, data_files: a.csv}\n- {config_name: b}\n---\n",
    ".huggingface.yaml": "[default]\nkey = secret\n",
    "dataset_infos.json": '{"secret": {"features": "secret"}}',
}
"""A file elsewhere with each name of a file that `datasets` opens by itself."""


@pytest.mark.parametrize("data_files", [None, "*.csv"])
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_of_a_folder_is_its_own(tmp_path: Path, name: str, data_files: str | None) -> None:
    folder, elsewhere = tmp_path / "texts", write(tmp_path / "home" / "file", DESCRIPTIONS[name])
    write(folder / "own.csv", "own\nrow")
    (folder / name).symlink_to(elsewhere)
    text = message(folder, data_files=data_files)
    assert f"{name} leads out of the dataset, to {elsewhere}: it is not read" in text and "secret" not in text
    (folder / name).unlink()
    (folder / name).symlink_to(write(folder / "notes", "" if name.endswith("yaml") else "{}").name)
    own = opened(folder, data_files=data_files, text_column="own")
    assert texts(own.examples()) == [(0, "row")], "a link to another file of the folder is followed"


@pytest.mark.parametrize("data_files", [None, "*.csv"])
def test_a_description_that_is_replaced_while_it_is_read_is_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_files: str | None
) -> None:
    folder, elsewhere = tmp_path / "texts", write(tmp_path / "home" / "file", DESCRIPTIONS["README.md"])
    write(folder / "own.csv", "own\nrow")
    real = datasets.load_dataset_builder

    def planted(path: str, **options: Any) -> Any:
        (folder / "README.md").symlink_to(elsewhere)
        return real(path, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", planted)
    text = message(folder, data_files=data_files)
    assert "README.md leads out of the dataset" in text and "secret" not in text


@pytest.mark.parametrize(
    ("yaml", "problem"),
    [
        ("a: 1\nkey = secret\n", "could not find expected (line 3, column 1)"),
        ("a: [secret, 'b\n", "found unexpected end of stream (line 2, column 1)"),
        ("a: 1\nb: !secret c\n", "could not determine a constructor for the tag (line 2, column 4)"),
        ("secret: *secret\n", "found undefined alias (line 1, column 9)"),
        ("secret: \x07\n", "a character is not allowed"),
    ],
)
def test_wrong_yaml_is_named_by_its_place(tmp_path: Path, yaml: str, problem: str) -> None:
    write(tmp_path / "own.csv", "own\nrow")
    write(tmp_path / ".huggingface.yaml", yaml)
    text = message(tmp_path, data_files="*.csv")
    assert text.endswith(f"cannot be read: its YAML is wrong: {problem}") and "secret" not in text


@pytest.mark.parametrize(
    "address",
    [
        "http://alice:{}@127.0.0.1:1/a.jsonl",
        "http://127.0.0.1:1/a.jsonl?sig={}",
        "http://127.0.0.1:1/a.jsonl;sig={}",
        "http://127.0.0.1:1/a/#{}.jsonl",
        "http://127.0.0.1:1/{}/a.jsonl",
        "http://127.0.0.1:1/dl/{}",
        "http://alice:{}/x@127.0.0.1:1/a.jsonl",
        "http://alice:{}@127.0.0.1:1?x=a.jsonl",
        "http:/alice:{}@127.0.0.1:1/a.jsonl",
        "zip://a.jsonl::http://alice:{}@127.0.0.1:1/a.zip?{}",
    ],
)
def test_no_message_shows_the_secret_of_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("qk_sniffer.text._hidden", ())
    write(tmp_path / "own.jsonl", '{"text": "a"}')
    for secret in ("Tr0ub4dor", "%54r0ub4dor"):
        named = address.replace("{}", secret)
        for path, files in ((tmp_path, {"train": [named]}), (named, None)):
            with pytest.raises(SourceError) as caught:
                opened(path, data_files=files)
            assert "r0ub4dor" not in str(caught.value)
