"""Tests that the descriptions of a folder of texts cannot keep the libraries that read them from ending."""

import os
from pathlib import Path

import pytest
from support.data_files import message, opened, texts, write

from qk_sniffer.jobs.licenses import stated_terms

LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 30)}]\n" for n in range(1, 7))
CONFIGS = "configs:\n- config_name: default\n  data_files: a.jsonl\n"
RECURSIVE = "configs: &c\n- config_name: default\n  data_files: *c\n"
FEW = "a: &files [a.jsonl]\nconfigs:\n- config_name: default\n  data_files: *files\n"


def folder(path: Path, yaml: str, name: str = "README.md") -> Path:
    write(path / "a.jsonl", '{"text": "hello"}\n')
    write(path / name, yaml if name != "README.md" else f"---\n{yaml}license: mit\n---\n")
    return path


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("yaml", [LISTS + CONFIGS, MERGED + CONFIGS, RECURSIVE], ids=["lists", "merged", "recursive"])
def test_names_in_yaml_that_stand_for_too_much_are_refused(
    yaml: str, name: str, tmp_path: Path, impatient: None
) -> None:
    assert "stand for more than 100,000 values, or for themselves" in message(
        folder(tmp_path, yaml, name), data_files="a.jsonl"
    )
    assert stated_terms("dataset", str(tmp_path), None) == {"license": [], "language": []}


def test_names_in_yaml_that_stand_for_little_are_read(tmp_path: Path) -> None:
    assert texts(opened(folder(tmp_path, FEW)).examples()) == [(0, "hello")]
    assert stated_terms("dataset", str(tmp_path), None) == {"license": ["mit"], "language": []}


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml", "dataset_infos.json"])
def test_a_pipe_in_a_folder_of_texts_is_not_waited_for(name: str, tmp_path: Path, impatient: None) -> None:
    write(tmp_path / "a.jsonl", '{"text": "hello"}\n')
    os.mkfifo(tmp_path / name)
    assert f"/{name} is not a regular file, but a pipe or a device" in message(tmp_path)


def test_options_of_a_card_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "text\nhello\n")
    folder(tmp_path, CONFIGS.replace("jsonl", "csv") + "  names: 7\n")
    assert "the options of its README.md or .huggingface.yaml (names) do not fit csv files" in message(tmp_path)


def csv_folder(path: Path, options: str, config_name: str = "default") -> Path:
    """Returns a folder whose card has options for which the library `datasets` reads its CSV file."""
    write(path / "a.csv", "text\nhello\n")
    yaml = f"configs:\n- config_name: {config_name}\n  data_files: a.csv\n  on_bad_lines: skip\n{options}"
    write(path / "README.md", f"---\n{yaml}---\n")
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_a_card_makes_no_files_elsewhere(tmp_path: Path, streaming: bool) -> None:
    planted, texts_of = tmp_path / "planted", tmp_path / "texts"
    up = "../" * 6
    for version in (str(planted), f"{up}planted", "..", "1.0.0/../..", "0.0", "1.0.0\\n", "7", "[1.0.0]"):
        found = message(csv_folder(texts_of, f'  version: "{version}"\n'), streaming=streaming)
        assert "the config default of its card has version" in found, version
    for name in (f'"{planted}"', "..", '"a/b"', '"a\\0b"', '"."'):
        found = message(csv_folder(texts_of, "", config_name=name), streaming=streaming)
        assert "in its card is no name of a config" in found, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]
    assert opened(csv_folder(texts_of, "  version: 1.2.3\n"), streaming=streaming).num_rows in (1, None)


@pytest.mark.parametrize(
    "option",
    [
        *("converters: {text: x}", "memory_map: true", "create_config_id: x", "encoding: [utf-8]", "skiprows: {a: 1}"),
        *("doublequote: 1", "nrows: true", "name: other", "quoting: '0'"),
    ],
)
def test_a_card_has_only_options_of_reading(option: str, tmp_path: Path) -> None:
    found = message(csv_folder(tmp_path, f"  {option}\n"))
    assert f"the config default of its card has {option.partition(':')[0]}: " in found and "Remove it from" in found


def test_a_card_may_have_keys_that_the_library_does_not_know(tmp_path: Path) -> None:
    csv_folder(tmp_path, "  made_by: me\n  default: true\n  skiprows: [1]\n  names: null\n  hash: ../..\n")
    with (tmp_path / "a.csv").open("a", encoding="utf-8") as file:
        file.write("second\n")
    assert texts(opened(tmp_path).examples()) == [(0, "second")]
