"""Runs `python -m qk_sniffer` and `sniff-qk`: the program that the first argument names, or else the capture."""

import atexit
import gc
import sys

from qk_sniffer.cli.programs import run_named

_FEW = 1_000
"""The younger collections before a full one; by default 10. A full one looks at half a million objects of torch and
transformers, and finds next to nothing: those of a start alone take most of a second."""


def main() -> int:
    """Runs the program; returns the exit code."""
    gc.set_threshold(*gc.get_threshold()[:2], _FEW)
    atexit.register(gc.freeze)  # else Python collects all objects of torch as it ends, for more than a second
    return run_named()


if __name__ == "__main__":
    sys.exit(main())
