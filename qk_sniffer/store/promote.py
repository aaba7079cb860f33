"""Promotes a staged version to the dataset, in steps that can be repeated from any point.

    1. The card and then the manifest are written into the staging, which is whole from here on.
    2. The root's manifest is removed: readers see an incomplete dataset.
    3. Files are renamed into place; heads and pictures that are not part of the new dataset are removed.
    4. The manifest is written: readers see the new dataset.
    5. The journals are removed, then the staging's manifest, then the staging.

A crash before the end of step 1 leaves the old dataset and the journals. After a later crash, `finish_promotion` does
the remaining steps.

The staged manifest carries the identity of its job, and only that job promotes it. It also has a digest of its content.
The manifest in the root has neither: equal jobs make equal manifests.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import stored
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.disk import digest_of, explained, open_file, sync_folder, type_of, write_atomic
from qk_sniffer.store.forms import decode_manifest, read_manifest
from qk_sniffer.store.layout import CARD, MANIFEST, Layout
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import PLAIN, Access, OpenFolder
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.store.work_folder import remove_work

log = logger(__name__)

_RERUN = "Then rerun the command, which promotes what it has captured"

WAY_OUT = "replace the unfinished job with output.overwrite=true"


def promote(
    layout: Layout, manifest: Mapping[str, Any], *, card: bytes | None = None, claim: Claim | None = None
) -> None:
    """Promotes the files that `compact` has staged, with `card`, which is added to the manifest.

    Hold the finalize lock. `claim` is that of the manifest's job; None if it has none.

    Raises:
        UnreadableError: no reader would accept the manifest.
        StoreError: the disk failed. The old dataset still exists, or `finish_promotion` completes the new one.
        TakenAwayError: the data root is no longer the job's.
    """
    staging, access = layout.staging, PLAIN if claim is None else claim
    with explained(staging.root, "write"):
        if card is not None:
            write_atomic(staging.card, card, access=access)
            manifest = manifests.with_files(manifest, {CARD: FileEntry.of(card)})
        decode_manifest(manifests.encode(manifest), staging.manifest, way_out=WAY_OUT)  # as every reader does
        for name in manifest["files"]:
            sync_folder((staging.root / name).parent, access)
        manifests.write(staging, {**manifest, "sha256": stored.digest(manifest)}, access=access)
    _promote(layout, dict(manifest), claim)


def finish_promotion(layout: Layout, claim: Claim | None = None) -> bool:
    """Finishes an interrupted promotion of the job of `claim`. Returns False if there is none.

    Hold the finalize lock. A staged version of another job stays where it is.

    Raises:
        UnreadableError: the staged manifest cannot be read, or a file that it lists is missing.
        StoreError: the disk failed.
        TakenAwayError: the data root is no longer the job's.
    """
    access = PLAIN if claim is None else claim
    manifest = staged_manifest(layout, access)
    if manifest is None:
        return False
    if manifest.get("job_id") != (None if claim is None else claim.job_id):
        log.warning("%s is of another job and is not promoted", layout.staging.manifest)
        return False
    if not _is_promoted(layout, manifest):
        with explained(layout.root, "read"):
            _check_files(layout, manifest["files"], access)
    _promote(layout, manifest, claim)
    return True


def finish_removal(layout: Layout, access: Access) -> bool:
    """Removes the rest of the work of a promotion that was interrupted after the record of its job was removed.

    Returns False if there is none. Hold the finalize lock.
    """
    manifest = staged_manifest(layout, access)
    if manifest is None or not _is_promoted(layout, manifest):
        return False
    remove_work(layout, access)
    return True


def staged_manifest(layout: Layout, access: Access) -> dict[str, Any] | None:
    """Returns the manifest of the staged version; None if no version is staged whole.

    Raises:
        UnreadableError: it cannot be read, or has changed.
    """
    path = layout.staging.manifest
    try:
        manifest = read_manifest(path, way_out=WAY_OUT, follow_links=False, access=access)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if manifest.pop("sha256", None) != stored.digest(manifest):
        raise UnreadableError(path, "has changed since it was written", WAY_OUT)
    return manifest


def _promote(layout: Layout, manifest: dict[str, Any], claim: Claim | None) -> None:
    access = PLAIN if claim is None else claim
    with explained(layout.root, "move the dataset into"):
        if not _is_promoted(layout, manifest):
            with access.open(layout.root) as root, access.open(layout.staging.root) as staging:
                _check_places(root, manifest["files"])
                access.check()
                root.unlink(MANIFEST)
                sync_folder(layout.root, access)
                _move(staging, root, manifest["files"], access)
                # The pictures and statistics of a version are of its vectors.
                others = [*layout.pictures(), *layout.statistics_files()]
                for path in [*(path for _, path in layout.head_files()), *others]:
                    name = path.relative_to(layout.root).as_posix()
                    if name not in manifest["files"] and root.type_of(path.parent.name) == "folder":
                        access.check()
                        _remove_file(root, name)
                sync_folder(layout.root, access)
                manifests.write(layout, _public(manifest), access=access)
        access.check()
        remove_work(layout, PLAIN if claim is None else claim.lock)


def _check_places(root: OpenFolder, names: Iterable[str]) -> None:
    """Checks that nothing but folders and files of a dataset is where it gets folders and files.

    Raises:
        StoreError: something else is there.
    """
    for name in sorted({*names, MANIFEST}):
        folder, _, file = name.rpartition("/")
        if folder and root.type_of(folder) not in (None, "folder"):
            raise StoreError(
                f"{root.path / folder} is not a folder, and the dataset is not written through it; remove it. {_RERUN}"
            )
        with suppress(FileNotFoundError), _folder_of(root, name) as found:
            if found.type_of(file) == "folder":
                raise StoreError(f"{root.path / name} is a folder, where the dataset has a file: remove it. {_RERUN}")


def _check_files(layout: Layout, files: Mapping[str, Mapping[str, Any]], access: Access) -> None:
    """Compares the files, staged or moved already, with the manifest: time has passed since they were written."""
    for name, entry in files.items():
        staged = layout.staging.root / name
        path = staged if type_of(staged, access) is not None else layout.root / name
        if type_of(path, access) == "file":
            with open_file(path, access) as file:
                if digest_of(file) == entry["sha256"]:
                    continue
        raise UnreadableError(path, "is missing from the version that replaces the dataset, or has changed", WAY_OUT)


def _move(staging: OpenFolder, root: OpenFolder, names: Iterable[str], access: Access) -> None:
    """Moves the staged files to the root, between folders that stay open: no path is looked up again."""
    for name in names:
        file = name.rpartition("/")[2]
        with _folder_of(root, name, create=True) as target:
            access.check()
            try:
                with _folder_of(staging, name) as source:
                    source.rename(file, target, file)
            except FileNotFoundError:
                if target.type_of(file) is None:  # `_check_files` has compared one that was moved before
                    problem = "is missing from the version that replaces the dataset"
                    raise UnreadableError(root.path / name, problem, WAY_OUT) from None
            target.sync()


def _remove_file(root: OpenFolder, name: str) -> None:
    """Removes a file of the dataset, and its folder below the root if that is empty then."""
    folder, _, file = name.rpartition("/")
    with _folder_of(root, name) as found:
        found.unlink(file)
    root.rmdir(folder)


def _folder_of(root: OpenFolder, name: str, *, create: bool = False) -> OpenFolder:
    """Opens the folder of a file of the dataset."""
    folder = name.rpartition("/")[0]
    return root.folder(folder, create=create) if folder else root.again()


def _is_promoted(layout: Layout, manifest: Mapping[str, Any]) -> bool:
    """Whether only the removal of the work is left to do."""
    expected = manifests.encode(_public(manifest))
    try:
        return stored.read_bytes(layout.manifest, way_out="", most_bytes=len(expected)) == expected
    except (OSError, StoreError):  # none, or another one
        return False


def _public(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the root: without the identity of the job."""
    return {key: value for key, value in manifest.items() if key != "job_id"}
