"""Paths that no file can have: each way in which a user gives one ends with an error that names it."""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import qk_sniffer
from qk_sniffer import finalize, heads, pictures, status, verify
from qk_sniffer.cli import process, program
from qk_sniffer.cli.app import APPLICATION
from qk_sniffer.cli.hydra_files import folder_problems
from qk_sniffer.config import ChatConfig, Config, DatasetConfig, ModelConfig, OutputConfig
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.export import cli as export
from qk_sniffer.notebook.settings import folder_of
from qk_sniffer.plasticity import compare
from qk_sniffer.plasticity.config import PlasticityConfig, problems
from qk_sniffer.report import cli as report

LONG, ZERO = "L" * 300, "a\0b"
PATHS = {"long": LONG, "long below": f"/tmp/{LONG}/x", "zero byte": ZERO, "half a letter": "\ud800", "loop": "./loop"}
REASON = "name that is too long|zero byte, or a character|link that leads to itself"

VALID = Config(model=ModelConfig(slug="m", name="org/m"), dataset=DatasetConfig(slug="d", path="pydoc"))
KINDS = [verify, status, heads, pictures, finalize, export, report, compare]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    return PATHS[request.param]


def refused(found: Iterable[str], key: str) -> bool:
    return [problem.partition(" ")[0] for problem in found] == [key]


def test_settings_name_the_path(path: str) -> None:
    chat = ChatConfig(template=f"./{path}.txt" if "loop" not in path else path)
    given: dict[str, Any] = {
        "output.folder": {"output": OutputConfig(folder=path, data_root="mine")},
        "output.data_root": {"output": OutputConfig(data_root=path)},
        "model.name": {"model": ModelConfig(slug="m", name=path)},
        "model.gguf_file": {"model": replace(VALID.model, name=".", gguf_file=path)},
        "model.adapter": {"model": replace(VALID.model, adapter=path)},
        "dataset.path": {"dataset": DatasetConfig(slug="d", path=path)},
        "dataset.chat.template": {"dataset": DatasetConfig(path=".", messages_column="m", chat=chat)},
    }
    for key, sections in given.items():
        found = [*APPLICATION.problems(replace(VALID, **sections), None)]
        assert key in {problem.partition(" ")[0] for problem in found}, (key, found)
    for key in ("data_root", "output_dir"):
        assert refused(problems(PlasticityConfig(**{"data_root": "org/m"} | {key: path})), key)
    assert [*folder_problems(Path(path), is_sweep=False)]


def test_programs_and_python_name_the_path(path: str) -> None:
    for module in KINDS:
        settings: Any = module.Settings  # type: ignore[attr-defined]
        for field in fields(settings):
            if "Path" in str(field.type) or field.name == "data_root":
                with pytest.raises(ConfigError, match=rf"- {field.name} is .* which has a ({REASON})"):
                    program.parse([f"{field.name}={path}"], settings)
    with pytest.raises(ConfigError, match=rf"- runs has .* which has a ({REASON})"):
        compare.compare(compare.Settings(runs=path))
    with pytest.raises(StoreError, match=rf"there is no dataset at .*: the path has a ({REASON})"):
        qk_sniffer.open_dataset(path)
    with pytest.raises(ConfigError, match=rf"to is .* which has a ({REASON})"):
        folder_of("to", path)


def test_a_name_that_follows_from_others_is_refused_too() -> None:
    long = replace(VALID, model=replace(VALID.model, slug="m" * 150), dataset=replace(VALID.dataset, slug="d" * 150))
    (problem,) = APPLICATION.problems(long, None)
    assert problem.startswith("output.data_root is null, which is 'outputs/mmm") and "too long" in problem


@pytest.mark.parametrize("look", [Path.stat, Path.mkdir], ids=["read", "write"])
def test_a_path_that_nothing_has_checked_ends_a_program_with_its_name(
    look: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("sys.argv", ["program"])
    for path in (tmp_path / LONG, tmp_path / "loop" / "x"):
        assert process.run(lambda _, path=path: look(path)) == 1
        assert capsys.readouterr().err.startswith(f"{path}: ")
