"""Runs `python -m qk_sniffer` and `sniff-qk`: the program that the first argument names, or else the capture."""

import sys

from qk_sniffer.cli.programs import run_named


def main() -> int:
    """Runs the program; returns the exit code."""
    return run_named()


if __name__ == "__main__":
    sys.exit(main())
