"""Checks that the text of `--help` fits a terminal, and that nothing of it is lost."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qk_sniffer.cli.help_text import fitted
from qk_sniffer.cli.programs import PROGRAMS, listed, run_named
from qk_sniffer.cli.schema import Schema
from qk_sniffer.config import Config

TEXT = """\
Draws a picture of a long row of words, which is in a paragraph of two
lines.

  python -m draw width=100 height=100 colour=red    in red
  python -m draw width=1
  width  of the picture, which is a number of points
  its.long.key  a value: word.word.word.word.word.word

size: small, medium, large, larger, largest, more
Exit codes: 0"""

FITTED = r"""Draws a picture of a long row of words,
which is in a paragraph of two lines.

  python -m draw width=100 height=100 \
      colour=red
      # in red
  python -m draw width=1
  width  of the picture, which is a
         number of points
  its.long.key
      a value:
      word.word.word.word.word.word

size: small, medium, large, larger,
  largest, more
Exit codes: 0"""


def test_paragraphs_tables_and_commands_are_folded() -> None:
    assert fitted(TEXT, 40) == FITTED
    assert fitted(fitted(TEXT, 40), 40) == FITTED


def test_the_help_of_every_program_fits_80_columns_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for name in {*PROGRAMS} - {"plasticity"}:  # of Hydra's programs, a slow test composes the whole help
        monkeypatch.setattr(sys, "argv", ["sniff-qk", name, "--help"])
        assert run_named() == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80, name
    conf = Path(__file__).parents[2] / "conf"
    for file in ("config.yaml", "plasticity.yaml"):
        template = OmegaConf.to_container(OmegaConf.load(conf / file))["hydra"]["help"]["template"]  # type: ignore[call-overload,index]
        lines = "\n".join([template, listed(), Schema(Config).help()])
        words = [word for word in fitted(lines).split() if word not in ("#", "\\")]
        assert words == lines.split()
        assert max(map(len, fitted(lines).splitlines())) <= 80, file
