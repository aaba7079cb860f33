"""Counts the threads and the memory that a process may use, starts threads, returns freed memory to the system, and
names the folder of compiled code."""

import atexit
import ctypes
import gc
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

MOST_THREADS = 16
"""More threads do not write faster to any disk, and each takes memory."""

LARGE_BLOCK_BYTES = 16 << 20
"""Blocks of at least this size return to the system when they are freed. The system clears every new block. That takes
no measurable time with 16 MB, but some percent of a forward pass over thousands of tokens with 4 MB."""

_COMPILED = "TORCHINDUCTOR_CACHE_DIR"

_WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

_M_MMAP_THRESHOLD = -3  # of <malloc.h>


def num_threads() -> int:
    """Returns the number of cores that SLURM or a container leaves to this process, at most `MOST_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


@contextmanager
def workers(number: int) -> Iterator[ThreadPoolExecutor]:
    """Starts threads that call numpy. Each has one thread of BLAS: the threads of BLAS itself would wait for the same
    cores, which takes two thirds longer with two threads on two cores."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(number) as pool:
        yield pool


def available_memory() -> int:
    """Returns the bytes of memory that the machine can give without swapping."""
    return int(psutil.virtual_memory().available)


def return_memory() -> None:
    """Makes large blocks of memory return to the system when they are freed. Call it before torch allocates memory.

    By default, glibc keeps freed blocks of up to 32 MB in its heap once it has seen one, and the gaps between small
    live objects stay idle. A variable makes torch request huge pages, so that the system clears new blocks quickly.
    Values that the environment already has take precedence. Does not change the heap of another C library.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def own_compiled_code() -> None:
    """Has torch keep the code that it compiles in a folder of this user. Call it before torch is imported.

    torch unpickles what it finds there. Its own folder for temporary files has a name that anybody may take first. A
    folder that the environment names (`TORCHINDUCTOR_CACHE_DIR`) is the user's choice.
    """
    if os.environ.get(_COMPILED):
        return
    user = os.getuid()
    folder = Path(tempfile.gettempdir(), f"qk_sniffer_compiled_{user}")
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    try:
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & _WRITTEN_BY_OTHERS
    except OSError:
        is_own = False
    if not is_own:
        folder = Path(tempfile.mkdtemp(prefix="qk_sniffer_compiled_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_COMPILED] = str(folder)


def release_memory() -> None:
    """Frees what is large, done with, and refers to itself, such as the model of a finished job or a picture.

    Python would collect it at some later time, after the next model is loaded.
    """
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Returns freed memory that glibc keeps in its heap to the system. Does nothing with another C library.

    Activations are allocated in blocks of megabytes among small live objects. The process keeps the gaps between these
    objects, more or fewer by chance. Without this call the memory peaks of equal jobs differ by a third.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
