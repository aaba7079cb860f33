"""Remembers that a dataset is to stay private, from the start that asks for it until `finalize private=false`.

A start may ask for it without naming a repository, and a dataset is published more than once. A mark in the data root
says so. Its existence counts, not its content: it only restricts what is published, whoever has written it.
"""

from qk_sniffer.logs import logger
from qk_sniffer.store import stored
from qk_sniffer.store.disk import explained, type_of, write_atomic
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.open_folder import PLAIN, Access

log = logger(__name__)


def privacy(layout: Layout, *, asked: bool) -> bool:
    """Whether a start publishes to private repositories alone: as it has `asked`, or an earlier one."""
    if not asked and is_private(layout):
        log.info("%s stays private, as an earlier start has asked", layout.root)
        return True
    return asked


def is_private(layout: Layout, access: Access = PLAIN) -> bool:
    """Whether an earlier start has asked that the dataset in a data root, or the one of its job, stays private."""
    return type_of(layout.private, access) is not None


def remember_privacy(layout: Layout, access: Access = PLAIN) -> None:
    """Marks the dataset as private. `access` is the way to the data root.

    Raises:
        StoreError: the data root cannot be written.
    """
    if not is_private(layout, access):
        write_atomic(layout.private, stored.encode({"private": True}), access=access)


def allow_public(layout: Layout, access: Access = PLAIN) -> None:
    """Removes the mark of `remember_privacy`.

    Raises:
        StoreError: the data root cannot be written.
    """
    if is_private(layout, access):
        access.check()
        with explained(layout.private, "remove"), access.open(layout.root) as root:
            root.unlink(layout.private.name)
