"""What a job needs to know of the machine that it runs on, and to ask of it."""

import ctypes
import os
from contextlib import suppress

MOST_THREADS = 16
"""More threads write no faster to any disk, and each takes memory."""


def num_threads() -> int:
    """For work that threads share: one a core that this process may use, which SLURM and containers limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def use_huge_pages() -> None:
    """Lets torch ask for huge pages for its large blocks, which are aligned then and fit where others lay.

    To be called before torch takes memory; a setting of the environment is left as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def trim_memory() -> None:
    """Returns to the system what the C library keeps of freed memory; does nothing where it is not glibc.

    Activations come and go in blocks of megabytes among small objects that stay, and what lies free between these
    remains the process's, by chance more or less: the peaks of equal jobs would differ by a third.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
