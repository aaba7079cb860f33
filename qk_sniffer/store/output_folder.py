"""Claims the folder that a program writes its results to: nobody else's files are there, and no other program is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import explained, make_folder, paths_in
from qk_sniffer.store.layout import MANIFEST
from qk_sniffer.store.locks import Lock, hold
from qk_sniffer.store.own_files import is_temporary
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.text import shortened

LOCK = ".lock"


@contextmanager
def claimed_folder(
    folder: Path, purpose: str, *, is_own: Callable[[list[str]], bool], is_default: bool
) -> Iterator[Lock]:
    """Creates a folder of results, and holds its lock within the block.

    Args:
        folder: the folder.
        purpose: the activity of a holder in the error, as for `hold`.
        is_own: gets the names in a folder that is not empty, and returns whether it is one of the program's results.
        is_default: whether the program has chosen the folder, next to the dataset. Then it may not be a link, which
            may have come with the dataset.

    Raises:
        StoreError: the folder is a link that the user has not named; it has files, and is not one of results; it is
            inside a dataset, or is one; it cannot be written; or another process holds the lock.
        TakenAwayError: the folder is removed, moved or replaced during the block.
    """
    if is_default and folder.is_symlink():
        raise StoreError(
            f"{folder} is a link to {folder.readlink()}, which may have come with the dataset: remove it, or choose "
            "another output_dir"
        )
    refuse_inside(folder, "output_dir")
    with explained(folder, "read"):
        found = [path.name for path in paths_in(folder) if path.name != LOCK and not is_temporary(path.name)]
        if MANIFEST in found or (found and not is_own(found)):
            raise StoreError(f"{folder} holds something else ({shortened(found, 5)}); choose another output_dir")
    try:
        make_folder(folder)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}; choose another output_dir") from error
    with hold(folder / LOCK, purpose, of_user=True) as lock, lock.explaining():
        with explained(folder, "write"), lock.open(folder) as opened:
            for name in filter(is_temporary, opened.names()):
                opened.unlink(name)  # of a write that a kill interrupted
        yield lock
