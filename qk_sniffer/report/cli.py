"""Writes a report of a dataset: one HTML page with interactive maps of its heads, which needs no network.

It shows what was captured and how it is proven, rows by bucket, norms, channels, principal directions, rotary
frequencies and timings, and where they are there attention, statistics and plasticity. No model runs. A large dataset
is shown by a sample of its rows. docs/report.md describes the page.

Exit codes: 0 written, 1 it cannot be written, 2 the settings are wrong, 130 interrupted.
"""

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.dataset.reader import open_dataset
from qk_sniffer.errors import ConfigError
from qk_sniffer.report.facts import report_facts
from qk_sniffer.report.page import IS_REPORT, page
from qk_sniffer.report.plasticity import read
from qk_sniffer.store.disk import explained, make_folder, write_atomic
from qk_sniffer.store.open_folder import OpenFolder
from qk_sniffer.store.own_files import refuse_foreign
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.text import in_mb, say


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: str = field(metadata=program.DATA_ROOT)
    revision: str | None = field(default=None, metadata=program.REVISION)
    output: Path | None = field(
        default=None,
        metadata={"help": "file to write; null: <data_root>-report.html, or outputs/<revision>-report.html"},
    )
    plasticity: Path | None = field(
        default=None, metadata={"help": "folder of results of plasticity; null: <data_root>-plasticity, if it is there"}
    )


def main() -> int:
    """Runs `python -m qk_sniffer.report`; returns the exit code."""
    return program.run("qk_sniffer.report", __doc__ or "", Settings, _program)


def _program(settings: Settings) -> int:
    if settings.output is not None and settings.output.name in ("", ".."):
        raise ConfigError([f"output is {str(settings.output)!r}; it must name a file, such as report.html"])
    dataset = open_dataset(settings.data_root, settings.revision)
    output = settings.output or dataset.beside("-report.html")
    refuse_inside(output, "output")
    with explained(output, "write", _ELSEWHERE):
        make_folder(output.parent)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with OpenFolder.at(output.parent) as folder:  # before the work
            refuse_foreign(folder, output.name, IS_REPORT)
    data = page(report_facts(dataset, read(dataset, settings.plasticity)))
    write_atomic(output, data, is_own=IS_REPORT, way_out=_ELSEWHERE)
    say(f"Report: {output} ({in_mb(len(data))})")
    return 0


_ELSEWHERE = "Name a file where you may write, and which has room: output=report.html"
