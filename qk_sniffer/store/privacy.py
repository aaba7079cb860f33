"""Remembers that a dataset is to stay private: from the start that asks for it to one that gives `private=false`.

A start may ask for it without naming a repository, and a dataset is published more than once. A mark in the data root
says so. Its existence counts, not its content: it only restricts what is published, whoever has written it.
"""

from qk_sniffer.logs import logger
from qk_sniffer.store import stored
from qk_sniffer.store.disk import explained, type_of, write_atomic
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.open_folder import PLAIN, Access

log = logger(__name__)


def privacy(layout: Layout, asked: bool | None) -> bool | None:
    """Returns what a start asks for with its setting `private`: None leaves it as an earlier start has asked."""
    if asked is None and is_private(layout):
        log.info("%s stays private, as an earlier start has asked (private=false allows a public one)", layout.root)
        return True
    return asked


def is_private(layout: Layout, access: Access = PLAIN) -> bool:
    """Whether the dataset in a data root, or the one of its job, is to stay private."""
    return type_of(layout.private, access) is not None


def changes_privacy(layout: Layout, private: bool | None) -> bool:
    """Whether `remember_privacy` would change anything."""
    return private is not None and private != is_private(layout)


def remember_privacy(layout: Layout, private: bool | None, access: Access = PLAIN) -> None:
    """Marks the dataset as private, or no longer; None changes nothing. `access` is the way to the data root.

    Raises:
        StoreError: the data root cannot be written.
    """
    if private is None or private == is_private(layout, access):
        return
    if private:
        write_atomic(layout.private, stored.encode({"private": True}), access=access)
        return
    access.check()
    with explained(layout.private, "remove"), access.open(layout.root) as root:
        root.unlink(layout.private.name)
