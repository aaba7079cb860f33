"""Tests that datasets and tokenizers of the Hub are pinned to a commit, and come from the cache without a network."""

import errno
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.archives import tar, zipped
from support.bpe import save_tokenizer
from support.data_files import ROWS, TEXTS, both_ways, jsonl, message, parquet, texts, write
from support.fake_hub import FakeHub

from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus import sources
from qk_sniffer.corpus.copies import own_downloads
from qk_sniffer.corpus.examples import open_corpus
from qk_sniffer.corpus.hub_copies import Listing, remember
from qk_sniffer.errors import SourceError, StoreError

pytestmark = pytest.mark.floor


def cached_copy(tmp_path: Path, commit: str, rows: list[dict[str, Any]], config_name: str = "default") -> None:
    """Puts a dataset `org/name` in the folder in which `datasets` caches a Hub repository at a commit."""
    import datasets

    write(tmp_path / commit / "train.jsonl", jsonl(rows))
    builder = datasets.load_dataset_builder(str(tmp_path / commit))
    builder.download_and_prepare()
    target = Path(datasets.config.HF_DATASETS_CACHE, "org___name", config_name, "0.0.0", commit)
    shutil.copytree(builder.cache_dir, target)
    info = json.loads((target / "dataset_info.json").read_text()) | {"config_name": config_name}
    info["dataset_name"] = "name"
    (target / "dataset_info.json").write_text(json.dumps(info))
    for file in target.glob("*.arrow"):
        file.rename(target / "name-train.arrow")


def test_offline_without_a_copy() -> None:
    text = message("org/name")
    assert "org/name" in text and "HF_HUB_OFFLINE=1" in text and "dataset.path" in text and "pydoc" in text


@both_ways
def test_offline_a_cached_copy_is_used(tmp_path: Path, streaming: bool) -> None:
    one, two = "1" * 40, "2" * 40
    cached_copy(tmp_path, one, ROWS)
    config = DatasetConfig(path="org/name", streaming=streaming)
    corpus = open_corpus(config)
    assert corpus.commit == one and texts(corpus.examples()) == TEXTS
    assert "no split 'test'. Choose one with dataset.split: train" in message("org/name", split="test")

    cached_copy(tmp_path, two, ROWS[2:])
    ambiguous = message("org/name")
    assert one in ambiguous and two in ambiguous and "dataset.revision" in ambiguous
    pinned = open_corpus(config, commit=one)
    assert pinned.commit == one and texts(pinned.examples()) == TEXTS
    chosen = open_corpus(replace(config, revision=two))
    assert chosen.commit == two and texts(chosen.examples()) == [(0, TEXTS[1][1]), (3, TEXTS[2][1])]
    assert "config other" in message("org/name", name="other", revision=one)
    assert "v1.0" in message("org/name", revision="v1.0"), "a branch or tag is never guessed"
    assert "dataset.data_files" in message("org/name", data_files="*.jsonl", revision=one)
    with pytest.raises(SourceError, match="at 3333"):
        open_corpus(config, commit="3" * 40)


def test_files_elsewhere_are_of_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a job that adds to a dataset compares its texts, as it does for a local source."""
    import datasets

    def builder(where: str, path: str, config: DatasetConfig, revision: str) -> Any:
        found = datasets.load_dataset_builder("json", data_files=config.data_files)
        found.hash = revision
        return found

    file = write(tmp_path / "t.jsonl", jsonl(ROWS))
    monkeypatch.setattr(sources, "hub_commit", lambda *_: "1" * 40)
    monkeypatch.setattr(sources, "_builder", builder)
    corpus = open_corpus(DatasetConfig(path="org/name", data_files=str(file)))
    assert corpus.commit is None and texts(corpus.examples()) == TEXTS


def test_an_odd_description_of_a_copy_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    cached_copy(tmp_path, "1" * 40, ROWS)
    (info,) = Path(datasets.config.HF_DATASETS_CACHE).glob("org___name/*/*/*/dataset_info.json")
    for content in ("", "[]", '{"config_name": 1}', "[" * 100_000):
        info.write_text(content)
        assert "the job needs" in message("org/name").lower()
        assert f"{info} is not" in caplog.text
        caplog.clear()
    info.unlink()
    info.mkdir()
    assert "the job needs" in message("org/name").lower()


def test_offline_the_files_that_were_fetched_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "1" * 40
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / commit
    write(snapshot / "a.csv", "id,text\n007,NA\n")
    splits = {"train": ["a.csv"], "test": ["b.csv"]}
    remember("org/name", Listing(commit, "default", None, "csv", {}, splits))
    cached_copy(tmp_path, commit, ROWS)
    (example,) = open_corpus(DatasetConfig(path="org/name", id_column="id")).examples()
    assert (example.source_id, example.content) == ("007", "NA"), "not those of the copy, whose reader guesses"
    assert "the cache lacks files of split 'test'" in message("org/name", split="test")
    assert "with these dataset.data_files" in message("org/name", data_files="*.csv")
    (file,) = Path(datasets.config.HF_DATASETS_CACHE, "qk_sniffer").rglob("*.json")
    for content in ("", "[]", '{"commit": 1}', file.read_text().replace('"csv"', '"odd"')):
        file.write_text(content)
        assert texts(open_corpus(DatasetConfig(path="org/name")).examples()) == TEXTS
        assert f"{file} is not" in caplog.text and "with the types that it guessed" in caplog.text
        caplog.clear()


def test_a_cache_of_someone_else_adds_no_file_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "1" * 40
    snapshot = tmp_path / "cache" / "datasets--org--name" / "snapshots" / commit
    secret = write(tmp_path / "secret.txt", "secret")
    snapshot.mkdir(parents=True)
    (snapshot / "a.txt").symlink_to(secret)
    remember("org/name", Listing(commit, "default", None, "text", {}, {"train": ["a.txt"]}))
    assert "leads out of" in message("org/name")
    (snapshot / "a.txt").unlink()
    blob = write(snapshot.parent.parent / "blobs" / "b", "its own")
    (snapshot / "a.txt").symlink_to(blob)
    assert [example.content for example in open_corpus(DatasetConfig(path="org/name")).examples()] == ["its own"]
    (file,) = Path(datasets.config.HF_DATASETS_CACHE, "qk_sniffer").rglob("*.json")
    content = file.read_text()
    for name in ("../../../../secret.txt", str(secret)):
        file.write_text(content.replace("a.txt", name))
        assert "which no repository can have" in message("org/name")


@pytest.mark.parametrize("link", ["qk_sniffer", "qk_sniffer/org___name"])
def test_nothing_is_written_through_a_link_in_a_cache_of_someone_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, link: str
) -> None:
    import datasets

    place, mine = Path(datasets.config.HF_DATASETS_CACHE, link), tmp_path / "mine"
    place.parent.mkdir(parents=True)
    mine.mkdir()
    place.symlink_to(mine)
    remember("org/name", Listing("1" * 40, "default", None, "text", {}, {"train": ["a.txt"]}))
    assert [*mine.iterdir()] == [] and "a link, which is not followed" in caplog.text


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml", "dataset_infos.json"])
def test_a_description_in_the_cache_of_someone_else_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    commit = "1" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qk_sniffer.corpus.sources.hub_commit", lambda *_: commit)
    snapshot = tmp_path / "cache" / "datasets--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / name).symlink_to(write(tmp_path / "home" / "file", "secret"))
    assert f"{snapshot / name} leads out of the dataset" in message("org/name")


@pytest.mark.parametrize("which", ["a file", "the folder"])
def test_a_copy_in_the_cache_of_someone_else_is_no_link_to_another_one(tmp_path: Path, which: str) -> None:
    import datasets

    cached_copy(tmp_path, "1" * 40, ROWS)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    (arrow,) = cache.glob("org___name/*/*/*/*.arrow")
    place = arrow if which == "a file" else arrow.parent
    place.rename(tmp_path / "private")
    place.symlink_to(tmp_path / "private")
    assert f"leads out of the dataset, to {tmp_path / 'private'}" in message("org/name")
    place.unlink()
    (tmp_path / "private").rename(place)
    assert texts(open_corpus(DatasetConfig(path="org/name")).examples()) == TEXTS


def test_a_copy_with_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library opens its files by their names, links to other copies too."""
    import datasets

    cached_copy(tmp_path, "1" * 40, ROWS)
    (arrow,) = Path(datasets.config.HF_DATASETS_CACHE).glob("org___name/*/*/*/*.arrow")
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if path == arrow.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("qk_sniffer.store.disk.os.scandir", scandir)
    assert f"{arrow.parent} cannot be listed: Permission denied" in message("org/name")


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_file_that_the_library_gets_from_the_cache_of_someone_else_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from huggingface_hub import HfApi

    snapshot, read = tmp_path / "datasets--org--name" / "snapshots" / ("1" * 40), []
    own = write(snapshot / "data" / "a.csv", "its own")
    secret = write(tmp_path / "secret", "secret")
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda *_, **__: str(own))

    def plant() -> None:
        own.unlink()
        own.symlink_to(secret)

    if when == "before it is read":
        plant()
    with pytest.raises(StoreError, match=rf"{own} leads out of the dataset, to {secret}"), own_downloads():
        read.append(HfApi().hf_hub_download("org/name", repo_type="dataset", filename="data/a.csv"))
        plant()
    assert read == ([] if when == "before it is read" else [str(own)])
    assert HfApi.hf_hub_download("org/name") == str(own), "only within the block"


def test_a_file_of_an_address_in_the_cache_of_someone_else_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets.utils import file_utils

    planted, secret = tmp_path / "downloads" / "0123", write(tmp_path / "secret", "secret")
    planted.parent.mkdir()
    planted.symlink_to(secret)
    monkeypatch.setattr(file_utils, "get_from_cache", lambda *_, **__: str(planted))
    with pytest.raises(StoreError, match=rf"{planted} leads out of the dataset"), own_downloads():
        file_utils.cached_path("http://127.0.0.1:1/a.csv")


ROWS_OF = """
def rows(corpus):
    return [(example.source_id, example.content) for example in corpus.examples()]
"""


def client(code: str, endpoint: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, whose Hub is at `endpoint`: the libraries read their environment once."""
    imports = (
        "from qk_sniffer.corpus.tokenizer import load_tokenizer\n"
        "from qk_sniffer.config import DatasetConfig, ModelConfig, TokenizerConfig\n"
        "from qk_sniffer.corpus.examples import open_corpus\n"
        "from qk_sniffer.errors import SourceError\n"
        "import sys, time\n"
        "def error(open, *args, **options):\n"
        "    try:\n"
        "        open(*args, **options)\n"
        "    except SourceError as error:\n"
        "        return str(error)\n"
        "    raise AssertionError('no error')\n"
        "def dataset(path, commit=None, **options):\n"
        "    return open_corpus(DatasetConfig(path=path, **options), commit)\n"
        "def tokenizer(name, commit=None, **options):\n"
        "    return load_tokenizer(ModelConfig(name=name, **options), commit)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", imports + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_no_network_is_reported_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as probe:  # finds a port that is closed afterwards
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = """
assert not {'torch', 'datasets', 'transformers', 'huggingface_hub'} & set(sys.modules), 'light to import'
slept = []
time.sleep = slept.append
print(error(dataset, 'org/name'))
print(error(tokenizer, 'org/name'))
assert sum(slept) < 10, 'the libraries alone retry for half a minute'
"""
    done = client(code, f"http://127.0.0.1:{port}", tmp_path)
    of_dataset, of_tokenizer = done.stdout.splitlines()
    assert "dataset org/name" in of_dataset and "Connection refused" in of_dataset and "dataset=pydoc" in of_dataset
    assert "tokenizer org/name" in of_tokenizer and "Connection refused" in of_tokenizer
    assert "Retrying" not in done.stderr


@pytest.mark.slow
def test_an_archive_of_a_repository_is_not_unpacked(tmp_path: Path) -> None:
    planted, private = tmp_path / "home" / ".bashrc", write(tmp_path / "private.zip", zipped("june.jsonl"))
    planted.parent.mkdir()
    chain = zipped("a.jsonl", f"june::{private}/june.jsonl")
    options = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  on_bad_lines: skip\n---\n"
    with FakeHub() as hub:
        hub.commit("org/zip", {"a.zip": chain})
        hub.commit("org/tar", {"a.txt.tar": tar(planted)})
        hub.commit("org/webdataset", {"a.tar": tar(planted)})
        hub.commit("org/named", {"a.csv": tar(planted)})
        hub.commit("org/options", {"a.csv": tar(planted), "README.md": options.encode()})
        code = """
for name in ('zip', 'tar', 'webdataset', 'named', 'options'):
    for streaming in (True, False):
        if (name, streaming) != ('options', True):  # read as a text, without a look at the first bytes
            print(name, error(dataset, f'org/{name}', streaming=streaming))
"""
        found = client(code, hub.url, tmp_path / "hf").stdout.splitlines()
    assert len(found) == 9 and all("which is not read as texts. Unpack it" in text for text in found), found
    assert not planted.exists()
    assert not list((tmp_path / "hf").rglob("extracted/*"))


@pytest.mark.slow
def test_a_link_to_a_secret_in_the_place_of_a_file_that_only_the_library_reads(tmp_path: Path) -> None:
    secret, home = write(tmp_path / "secret", "id,text\n1,s3cret\n"), tmp_path / "hf"
    options = b"---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  on_bad_lines: skip\n---\n"
    with FakeHub() as hub:
        commit = hub.commit("org/name", {"a.csv": b"id,text\n1,public\n", "README.md": options})
        planted = home / "hub" / "datasets--org--name" / "snapshots" / commit / "a.csv"
        planted.parent.mkdir(parents=True)
        planted.symlink_to(secret)
        assert "leads out of" in client("print(error(dataset, 'org/name'))", hub.url, home).stdout
        planted.unlink()
        assert "public" in client(f"{ROWS_OF}\nprint(rows(dataset('org/name')))", hub.url, home).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["{commit}.incomplete", "{commit}.incomplete/dataset_info.json", "{commit}", ".", "..", "../.."]
)
def test_no_copy_is_written_through_a_link(tmp_path: Path, place: str) -> None:
    theirs, home = tmp_path / "theirs", tmp_path / "hf"
    kept = write(theirs / "dataset_info.json", "{}")
    options = b"---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  on_bad_lines: skip\n---\n"
    with FakeHub() as hub:
        commit = hub.commit("org/name", {"a.csv": b"id,text\n1,public\n", "README.md": options})
        planted = home / "datasets" / "org___name" / "default" / "0.0.0" / place.format(commit=commit)
        planted = Path(os.path.normpath(planted))
        planted.parent.mkdir(parents=True)
        planted.symlink_to(kept if planted.suffix == ".json" else theirs)
        assert "leads out of" in client("print(error(dataset, 'org/name'))", hub.url, home).stdout
        assert [*theirs.iterdir()] == [kept] and kept.read_text() == "{}"
        planted.unlink()
        assert "public" in client(f"{ROWS_OF}\nprint(rows(dataset('org/name')))", hub.url, home).stdout


@pytest.mark.slow
def test_a_hub_dataset_is_pinned(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    with FakeHub() as hub:
        files = {"train.jsonl": jsonl(ROWS), "test.jsonl": jsonl(ROWS[:1])}
        old = hub.commit("org/name", files)
        hub.commit("org/name", files | {"train.jsonl": jsonl(ROWS[:1])}, branch="v1")
        hub.commit("org/name", {"logo.xyz": b""}, branch="gone")
        new = hub.commit("org/name", files | {"train.jsonl": jsonl(ROWS[5:])})
        hub.commit("org/LongBooks-v2", {"a.txt": b"one\nline", "b.txt": b"two"})
        hub.commit("org/rows", {"train.parquet": parquet(ROWS)})
        hub.commit("org/packed", {"train.jsonl.gz": gzip.compress(jsonl(ROWS))})
        table, other = b"id,text\n007,NA\n12,n/a\n", b"id,text\n1,other\n"
        hub.commit("org/table", {"train.csv": table, "test.csv": other, "extra.csv": other})
        checkpoint = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
        checkpoint["config.json"] = b'{"model_type": "llama"}'
        model = hub.commit("org/model", checkpoint)
        hub.commit("org/gated", files | checkpoint | {"adapter_config.json": b"{}"})
        hub.repositories["org/gated"].gated = True
        code = f"""
from qk_sniffer.backbone.loading import check_model
from qk_sniffer.hub.revisions import hub_commit, hub_file
def model(name):
    return check_model(ModelConfig(name=name), commit=hub_commit('model', name))
def texts(corpus):
    return [(example.index, example.content) for example in corpus.examples()]
{ROWS_OF}
corpus = dataset('org/name')
assert corpus.commit == {new!r} and texts(corpus) == [(0, {TEXTS[2][1]!r})], corpus.commit
for streaming in (False, True):
    corpus = dataset('org/name', {old!r}, streaming=streaming)
    assert corpus.commit == {old!r} and texts(corpus) == {TEXTS!r}, corpus.commit
    for path in ('org/rows', 'org/packed'):
        assert texts(dataset(path, streaming=streaming)) == {TEXTS!r}, path
assert dataset('org/name', revision='v1').num_rows == 1
assert dataset('org/name', {old!r}, revision='v1').num_rows == 6
assert texts(dataset('org/LongBooks-v2')) == [(0, 'one\\nline'), (1, 'two')]
for options in ({{}}, {{'split': 'train[:1]'}}, {{'split': 'test+train'}}, {{'data_files': 'ext*.csv'}}):
    print(options, rows(dataset('org/table', id_column='id', **options)))
print('streamed', rows(dataset('org/table', id_column='id', streaming=True)))
assert tokenizer('org/model').commit == {model!r}
for text in (
    error(dataset, 'org/name', revision='v2'),
    error(dataset, 'org/name', revision='gone'),
    error(dataset, 'org/name', split='dev'),
    error(dataset, 'org/name', name='big'),
    error(dataset, 'org/name', data_files='no*.jsonl'),
    error(dataset, 'org/missing'),
    error(dataset, 'org/gated'),
    error(tokenizer, 'org/gated'),
    error(model, 'org/gated'),
    error(hub_file, 'org/gated', 'adapter_config.json'),
    error(tokenizer, 'org/model', revision='v2'),
    error(tokenizer, 'org/missing'),
):
    print(text)
"""
        answers = client(code, hub.url, tmp_path).stdout.splitlines()
    tables = answers[:5]
    assert tables == [
        "{} [('007', 'NA'), ('12', 'n/a')]",
        "{'split': 'train[:1]'} [('007', 'NA')]",
        "{'split': 'test+train'} [('1', 'other'), ('007', 'NA'), ('12', 'n/a')]",
        "{'data_files': 'ext*.csv'} [('1', 'other')]",
        "streamed [('007', 'NA'), ('12', 'n/a')]",
    ]
    answers = answers[5:]
    expected = [
        "It has: main, v1, gone",
        "has no data files that can be read",
        "train, test",
        "default",
        "dataset.data_files",
        "neither a local path nor on the Hub",
        "dataset 'org/gated' is gated on the Hub: ask for access on its page, then log in",
        *["model 'org/gated' is gated on the Hub: ask for access on its page, then log in"] * 3,
        "It has: main",
        "neither a local path nor on the Hub",
    ]
    assert len(answers) == len(expected), answers
    for answer, part in zip(answers, expected, strict=True):
        assert part in answer

    # Without the server, the loaded copies are still used, but only for their own commits.
    code = f"""
assert dataset('org/name', {old!r}).num_rows == 6
assert dataset('org/name', revision={new!r}).num_rows == 1
assert [each.content for each in dataset('org/LongBooks-v2').examples()] == ['one\\nline', 'two']
assert tokenizer('org/model').commit == tokenizer('org/model', {model!r}).commit == {model!r}
print(error(dataset, 'org/name'))
{ROWS_OF}
for options in ({{}}, {{'split': 'train[:1]'}}, {{'split': 'test+train'}}, {{'data_files': 'ext*.csv'}}):
    print(options, rows(dataset('org/table', id_column='id', **options)))
print(error(dataset, 'org/table', data_files='test.csv'))
"""
    done = client(code, hub.url, tmp_path)
    assert done.stdout.splitlines()[1:5] == tables[:4], done.stdout
    assert "with these dataset.data_files" in done.stdout.splitlines()[5]
    assert old in done.stdout and new in done.stdout and "Retrying" not in done.stderr
