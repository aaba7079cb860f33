"""Checks a dataset: is it whole, and is it exactly what its manifest says?

Every file is held against the size and sha256 in manifest.json, every head's file against the contract (columns, types,
order, no row twice) and against the sampler, which says exactly which rows there must be. Changes nothing.

Exit codes: 0 whole, 1 something is wrong, 2 the settings are wrong, 130 interrupted.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.cli import program
from qk_sniffer.dataset.verify import verify


@dataclass(frozen=True)
class Settings:
    """What to check."""

    data_root: Path = field(metadata={"help": "the dataset's folder: one that a job wrote, or fetched from the Hub"})


def main() -> int:
    """`python -m qk_sniffer.verify`; returns the exit code."""
    return program.run("qk_sniffer.verify", __doc__, Settings, _program)


def _program(settings: Settings) -> int:
    report = verify(settings.data_root)
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
