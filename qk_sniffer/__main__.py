"""Runs `python -m qk_sniffer` and `sniff-qk`: the program that the first argument names, or else the capture."""

import atexit
import gc
import sys

from qk_sniffer.cli.programs import run_named


def main() -> int:
    """Runs the program; returns the exit code."""
    atexit.register(gc.freeze)  # else Python collects all objects of torch as it ends, for more than a second
    return run_named()


if __name__ == "__main__":
    sys.exit(main())
