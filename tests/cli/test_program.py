"""Parses the settings of the small programs, and checks their help and exit codes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qk_sniffer import status
from qk_sniffer.cli import program
from qk_sniffer.errors import ConfigError, StoreError


@dataclass(frozen=True)
class Drawing:
    data_root: Path = field(metadata={"help": "the dataset's folder"})
    width: int = field(default=7, metadata={"help": "in inches"})
    scale: float = field(default=1.0, metadata={"help": "of the numbers"})
    grid: bool = field(default=False, metadata={"help": "draw a grid"})
    title: str | None = field(default=None, metadata={"help": "stands above it"})


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        program.parse(arguments, Drawing)
    return refused.value.problems


def test_values_get_the_types_of_their_keys() -> None:
    assert program.parse(["data_root=a=b/${c}"], Drawing) == Drawing(Path("a=b/${c}"))
    given = ["width=8", "grid=True", "title=3", "data_root=~/x", "scale=2"]
    assert program.parse(given, Drawing) == Drawing(Path.home() / "x", 8, 2.0, True, "3")
    assert program.parse(["data_root=~x", "title=null"], Drawing) == Drawing(Path("~x"))


def test_everything_wrong_is_named_at_once() -> None:
    assert problems("width=wide", "grid=1", "scale=", "data_rot=x", "outputs/x", "--grid", "width=8", "title=a") == [
        "width is 'wide'; it must be an integer",
        "grid is '1'; it must be true or false",
        "scale is ''; it must be a number",
        "data_rot is not a key, did you mean data_root?; valid: data_root, width, scale, grid, title",
        "--grid: no such flag; settings are written key=value, without dashes (see --help)",
        "width is given twice; give it one value",
    ]
    assert problems("width=8") == ["data_root is not given; it is the dataset's folder"]
    assert problems("data_root=") == ["data_root is ''; it must be a path"]


def test_the_first_setting_needs_no_key() -> None:
    for arguments in (["outputs/x", "width=8"], ["width=8", "outputs/x"], ["data_root=outputs/x", "width=8"]):
        assert program.parse(arguments, Drawing) == Drawing(Path("outputs/x"), 8)
    assert program.parse(["outputs/lr=3"], Drawing) == Drawing(Path("outputs/lr=3"))
    assert problems("a", "b") == [
        "b: data_root takes one value, the dataset's folder; other settings are written key=value"
    ]
    assert problems("data_root=a", "b") == [
        "b: data_root takes one value, the dataset's folder; other settings are written key=value"
    ]
    assert problems("dat_root=a")[0].startswith("dat_root is not a key, did you mean data_root?")
    assert program.parse(["data_root=x"], status.Settings) == program.parse(["x"], status.Settings)


def ends(error: BaseException) -> Callable[[Drawing], int]:
    def body(settings: Drawing) -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (lambda settings: settings.width, 7, ""),
        (ends(StoreError("the disk is full")), 1, "the disk is full\n"),
        (ends(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    body: Callable[[Drawing], int],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["draw", "data_root=x"])
    assert program.run("draw", "Draws.", Drawing, body) == code
    assert capsys.readouterr().err == said
    monkeypatch.setattr(sys, "argv", ["draw"])
    assert program.run("draw", "Draws.", Drawing, body) == 2
    assert "data_root is not given" in capsys.readouterr().err


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["draw", "width=x", "--help"])
    assert program.run("draw", "Draws.\n", Drawing, ends(AssertionError())) == 0
    assert capsys.readouterr().out == (
        "python -m draw DATA_ROOT [key=value ...]\n\nDraws.\n\n"
        "Settings (DATA_ROOT is data_root=..., and the key may be left out):\n"
        "  data_root  the dataset's folder\n"
        "  width      in inches (default: 7)\n"
        "  scale      of the numbers (default: 1.0)\n"
        "  grid       draw a grid (default: false)\n"
        "  title      stands above it (default: null)\n"
    )
