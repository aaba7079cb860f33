"""Writes next to a finished dataset only while it is there: its pictures, its marks in the work folder.

Another job may replace the dataset at any time. It moves its own into place under the finalize lock.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import TakenAwayError, hold
from qk_sniffer.store.open_folder import Access

PATIENCE_S = 5.0
"""How long to wait for another process that moves a dataset into place, or writes next to it."""


@contextmanager
def same_dataset(layout: Layout, manifest: Mapping[str, Any], access: Access) -> Iterator[None]:
    """Holds the finalize lock within the block. The dataset of `manifest` is in the data root until its end.

    `access` is the way of the block to the data root.

    Raises:
        InUseError: another process makes a dataset there.
        TakenAwayError: another dataset or another folder is there.
        StoreError: the data root cannot be written.
    """
    with hold(layout.finalize_lock, "making a dataset there", wait_s=PATIENCE_S) as lock:
        with access.open(layout.root) as own, lock.open(layout.root) as locked:
            is_there = os.path.samestat(os.fstat(own.descriptor), os.fstat(locked.descriptor))
        if not is_there:
            raise replaced(layout.root)
        check_same(layout, manifest)
        yield


def check_same(layout: Layout, manifest: Mapping[str, Any]) -> None:
    """Checks that the dataset in the data root is the one of `manifest`, which has the checksums of its files.

    Raises:
        TakenAwayError: it is not.
        StoreError: the manifest cannot be read.
    """
    if manifests.read(layout.root) != manifest:
        raise replaced(layout.root)


def replaced(root: Path) -> TakenAwayError:
    """Returns the error for another dataset in a data root."""
    return TakenAwayError(
        f"another dataset has replaced the one in {root} while this process used it, and was neither published nor "
        "changed. Rerun the command of the job whose dataset you want, in a folder of its own"
    )
