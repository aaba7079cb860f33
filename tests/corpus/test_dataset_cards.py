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
