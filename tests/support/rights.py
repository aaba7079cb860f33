"""Runs a block as a user who may not read what root may."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

NOBODY = 65534


@contextmanager
def without_root() -> Iterator[None]:
    """Gives the block the rights of a user without any, if the tests run as root, who may read and write anything."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
