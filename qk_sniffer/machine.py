"""What a job needs to know of the machine that it runs on, and to ask of it."""

import ctypes
import os
from contextlib import suppress

MOST_THREADS = 16
"""More threads write no faster to any disk, and each takes memory."""

LARGE_BLOCK_BYTES = 16 << 20
"""Blocks of so many bytes are the system's again when they are freed. Clearing new ones costs time: at 16 MB none that
could be measured, at 4 MB some percent of a forward over thousands of tokens."""

_M_MMAP_THRESHOLD = -3  # of <malloc.h>


def num_threads() -> int:
    """For work that threads share: one a core that this process may use, which SLURM and containers limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


def return_memory() -> None:
    """Lets large blocks of memory go back to the system as soon as they are freed. Call before torch takes memory.

    Otherwise the C library keeps blocks of up to 32 MB for itself once it has seen one freed, and what small objects
    that stay leave between them lies idle. Torch asks for huge pages for its blocks, so that new ones are cleared
    quickly; a setting of the environment is left as it is. Does nothing where the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def trim_memory() -> None:
    """Returns to the system what the C library keeps of freed memory; does nothing where it is not glibc.

    Activations come and go in blocks of megabytes among small objects that stay, and what lies free between these
    remains the process's, by chance more or less: the peaks of equal jobs would differ by a third.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
