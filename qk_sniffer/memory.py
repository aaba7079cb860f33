"""What the C library's allocator holds beyond what is in use.

Activations come and go in blocks of megabytes between small objects that stay; the free memory in between remains the
process's, by chance more or less. Without these two calls the peaks of equal jobs differ by a third.
"""

import ctypes
import os
from contextlib import suppress


def use_huge_pages() -> None:
    """Lets torch ask for huge pages for its large blocks, which are aligned then and fit where others lay.

    To be called before torch takes memory; a setting of the environment is left as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def trim() -> None:
    """Returns free memory to the system; does nothing where the C library cannot (it is not glibc)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
