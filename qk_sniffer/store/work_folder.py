"""Prepares the work folder of a data root, checks what is in it, and removes it.

A job makes the files and folders that `layout.py` names. Anything else of these names is an obstacle, such as a folder
called job.json or a link. It is never followed or opened. A job with `output.overwrite` removes it.
"""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import make_folder, paths_in, remove, type_of
from qk_sniffer.store.layout import MANIFEST, Layout, is_ours, manifest_problem
from qk_sniffer.store.locks import InUseError, hold
from qk_sniffer.store.open_folder import PLAIN, WORK, Access, anchored
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import shortened

_FILES = (".done", ".json", ".lock", ".progress", ".tmp")
"""The endings of the files that are directly in a work folder. *.tmp is left by a write that a kill interrupted."""


def prepare_data_root(root: Path, *, overwrite: bool = False, setting: str = "output.data_root") -> Layout:
    """Creates the work folder of `root`, and returns the layout. The root has nothing but a work folder, or `is_ours`.

    `overwrite` removes what is in the way in the work folder: see `clear_obstacles`. `setting` names the root in the
    errors.

    Raises:
        StoreError: a file is in the way, the folder holds other files, cannot be written, or is inside of a dataset or
            of a work folder.
    """
    layout = Layout(root)
    try:
        check_data_root(root, setting=setting)
        make_folder(root)
        clear_obstacles(layout, overwrite=overwrite)
        with anchored(root) as access, access.open(layout.work, create=True) as work:
            name = f"{secrets.token_hex(8)}.tmp"
            work.create(name).close()
            work.unlink(name)
    except OSError as error:
        raise StoreError(f"cannot write to the data root {root}: {error.strerror}; choose another {setting}") from error
    return layout


def check_data_root(root: Path, *, setting: str = "output.data_root") -> None:
    """Checks that a dataset may be at `root`, as `prepare_data_root` does. Changes nothing.

    Raises:
        StoreError: a file is in the way, the folder holds other files, or is inside of a dataset or of a work folder.
        OSError: the folder cannot be read.
    """
    refuse_inside(root, setting)
    layout = Layout(root)
    if root.exists() and not root.is_dir():
        raise StoreError(f"the data root {root} is a file; choose another {setting}")
    # Listed before `is_ours` is called: another shard may create the work folder in between.
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if {*names} - {WORK, layout.private.name} and not is_ours(layout):
        way_out = f"choose another {setting}, or empty it yourself"
        why = manifest_problem(layout, way_out) if MANIFEST in names else way_out
        raise StoreError(f"{root} is not empty and not a dataset of qk-sniffer (it holds {shortened(names, 5)}); {why}")
    if root.is_symlink() and not root.exists():
        raise StoreError(f"the data root {root} is a link to {root.readlink()}, which does not exist")


def clear_obstacles(layout: Layout, *, overwrite: bool) -> None:
    """Checks that the work folder, if there is one, holds only files and folders where a job makes files and folders.

    With `overwrite`, removes the others: a link without its target, a folder with its content.

    Raises:
        UnreadableError: there is an obstacle, and `overwrite` is false.
    """
    with anchored(layout.root) as access:
        for path, expected in _entries(layout, access):
            found = type_of(path, access)
            if found is None or found == expected or (expected is None and found in ("file", "folder")):
                continue
            if not overwrite:
                raise UnreadableError(
                    path,
                    f"is a {found}, not a {expected or 'file or folder'} of this package",
                    "remove it, or replace the work in this folder with output.overwrite=true",
                )
            remove(path, access)


def _entries(layout: Layout, access: Access) -> Iterator[tuple[Path, str | None]]:
    """Yields everything in the work folder with its expected type: "file", "folder", or None for either of them."""
    yield layout.work, "folder"
    for path in paths_in(layout.work, access):
        if path in (layout.journal_folder, layout.staging.root):
            yield path, "folder"
        else:
            yield path, "file" if path.suffix in _FILES else None
    for journal in paths_in(layout.journal_folder, access):
        yield journal, "folder"
        for path in paths_in(journal, access):
            yield path, "file" if path.suffix in (".safetensors", ".tmp") else None
    for path in paths_in(layout.staging.root, access):
        yield path, "file" if path.is_file() else "folder"
        if type_of(path, access) == "folder":
            yield from ((inner, "file") for inner in paths_in(path, access))


def discard_work(layout: Layout, own_lock: Path, access: Access = PLAIN) -> None:
    """Removes the work of another job, so that this one starts from nothing. A finished dataset stays.

    Removes everything in the work folder: files, folders and links. Hold `own_lock`, the lock of this job's shard, and
    the start lock. `access` is the way to the work folder: the own lock.

    Raises:
        InUseError: a job is running in this root.
    """
    with ExitStack() as running:
        for path in {layout.finalize_lock, *layout.locks()} - {own_lock, layout.start_lock}:
            purpose = "working in the folder that this job replaces"
            running.enter_context(hold(path, purpose, replace=True, access=access))
        for path in paths_in(layout.work, access):
            if path.suffix != ".lock" and path not in (layout.job_file, layout.staging.root):
                remove(path, access)
        remove_work(layout, access)


def remove_leftovers(layout: Layout, own_lock: Path, access: Access = PLAIN) -> None:
    """Removes the files that a job leaves in the work folder when it is killed after its dataset is whole.

    Hold `own_lock`. `access` is the way to the work folder: the own lock.
    """
    for path in layout.locks():
        if path != own_lock:
            with suppress(InUseError), hold(path, "tidying up", access=access):
                pass  # leaving the block removes the file
    with (
        suppress(InUseError),
        hold(layout.start_lock, "tidying up", access=access) as lock,
        hold(layout.finalize_lock, "tidying up", access=access),
    ):
        if not layout.job_file.exists():
            remove_work(layout, lock)


def remove_work(layout: Layout, access: Access = PLAIN) -> None:
    """Removes the work state except for the locks, which their holders remove. The staging goes last."""
    remove(layout.journal_folder, access)
    for path in paths_in(layout.work, access):
        if path.suffix in (".done", ".progress", ".tmp"):
            remove(path, access)
    remove(layout.job_file, access)
    if type_of(layout.staging.root, access) == "folder":  # not through a link
        # The manifest goes first: without it the staging is not whole, and no job promotes it.
        remove(layout.staging.manifest, access)
    remove(layout.staging.root, access)
    with suppress(FileNotFoundError), access.open(layout.root) as root:
        root.rmdir(layout.work.name)  # it may contain locks
