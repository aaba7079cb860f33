"""Verifies that a dataset is complete and agrees with its manifest.

It compares every file with the size and sha256 in manifest.json. It compares the file of every head with the contract
(columns, types, order, no repeated row) and with the rows that the sampler prescribes. It changes nothing.

Exit codes: 0 whole, 1 the dataset has problems, 2 the settings are wrong, 130 interrupted.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.dataset.verify import verify
from qk_sniffer.text import say_text


@dataclass(frozen=True)
class Settings:
    """The settings of the program."""

    data_root: Path = field(metadata={"help": "the dataset's folder, written by a job or downloaded from the Hub"})


def main() -> int:
    """Runs `python -m qk_sniffer.verify`; returns the exit code."""
    return program.run("qk_sniffer.verify", __doc__, Settings, _program)


def _program(settings: Settings) -> int:
    report = verify(settings.data_root)
    say_text(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
