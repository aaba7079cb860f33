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
from pathlib import Path
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import stored
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.disk import Check, explained, sha256_of, sync_folder, type_of, unchecked, write_atomic
from qk_sniffer.store.forms import decode_manifest, read_manifest
from qk_sniffer.store.layout import CARD, Layout, remove_file
from qk_sniffer.store.manifest import FileEntry
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
    staging, check = layout.staging, unchecked if claim is None else claim.check
    with explained(staging.root, "write"):
        if card is not None:
            write_atomic(staging.card, card, check=check)
            manifest = manifests.with_files(manifest, {CARD: FileEntry.of(card)})
        decode_manifest(manifests.encode(manifest), staging.manifest, way_out=WAY_OUT)  # as every reader does
        for name in manifest["files"]:
            sync_folder((staging.root / name).parent)
        manifests.write(staging, {**manifest, "sha256": stored.digest(manifest)}, check=check)
    _promote(layout, dict(manifest), claim)


def finish_promotion(layout: Layout, claim: Claim | None = None) -> bool:
    """Finishes an interrupted promotion of the job of `claim`. Returns False if there is none.

    Hold the finalize lock. A staged version of another job stays where it is.

    Raises:
        UnreadableError: the staged manifest cannot be read, or a file that it lists is missing.
        StoreError: the disk failed.
        TakenAwayError: the data root is no longer the job's.
    """
    manifest = staged_manifest(layout)
    if manifest is None:
        return False
    if manifest.get("job_id") != (None if claim is None else claim.job_id):
        log.warning("%s is of another job and is not promoted", layout.staging.manifest)
        return False
    if not _is_promoted(layout, manifest):
        with explained(layout.root, "read"):
            _check_files(layout, manifest["files"])
    _promote(layout, manifest, claim)
    return True


def finish_removal(layout: Layout, check: Check) -> bool:
    """Removes the rest of the work of a promotion that was interrupted after the record of its job was removed.

    Returns False if there is none. Hold the finalize lock.
    """
    manifest = staged_manifest(layout)
    if manifest is None or not _is_promoted(layout, manifest):
        return False
    remove_work(layout, check)
    return True


def staged_manifest(layout: Layout) -> dict[str, Any] | None:
    """Returns the manifest of the staged version; None if no version is staged whole.

    Raises:
        UnreadableError: it cannot be read, or has changed.
    """
    path = layout.staging.manifest
    try:
        manifest = read_manifest(path, way_out=WAY_OUT, follow_links=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if manifest.pop("sha256", None) != stored.digest(manifest):
        raise UnreadableError(path, "has changed since it was written", WAY_OUT)
    return manifest


def _promote(layout: Layout, manifest: dict[str, Any], claim: Claim | None) -> None:
    check = unchecked if claim is None else claim.check
    with explained(layout.root, "move the dataset into"):
        if not _is_promoted(layout, manifest):
            for folder in sorted({(layout.root / name).parent for name in manifest["files"]} - {layout.root}):
                if type_of(folder) not in (None, "folder"):
                    raise StoreError(
                        f"{folder} is not a folder, and the dataset is not written through it; remove it. {_RERUN}"
                    )
            for path in (layout.manifest, *(layout.root / name for name in manifest["files"])):
                if type_of(path) == "folder":
                    raise StoreError(f"{path} is a folder, where the dataset has a file: remove it. {_RERUN}")
            check()
            layout.manifest.unlink(missing_ok=True)
            sync_folder(layout.root)
            _move(layout, manifest["files"], check)
            # The pictures and statistics of a version are of its vectors.
            others = [*layout.pictures(), *layout.statistics_files()]
            for path in [*(path for _, path in layout.head_files()), *others]:
                is_listed = path.relative_to(layout.root).as_posix() in manifest["files"]
                if not is_listed and not path.parent.is_symlink():
                    check()
                    remove_file(layout, path)
            sync_folder(layout.root)
            manifests.write(layout, _public(manifest), check=check)
        check()
        remove_work(layout, unchecked if claim is None else claim.lock.check)


def _check_files(layout: Layout, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares the files, staged or moved already, with the manifest: time has passed since they were written."""
    for name, entry in files.items():
        staged = layout.staging.root / name
        path = staged if type_of(staged) is not None else layout.root / name
        if type_of(path) != "file" or sha256_of(path) != entry["sha256"]:
            raise UnreadableError(
                path, "is missing from the version that replaces the dataset, or has changed", WAY_OUT
            )


def _move(layout: Layout, names: Iterable[str], check: Check) -> None:
    touched: set[Path] = set()
    for name in names:
        source, target = layout.staging.root / name, layout.root / name
        check()
        if source.exists():
            target.parent.mkdir(exist_ok=True)
            source.replace(target)
            touched.add(target.parent)
        elif type_of(target) is None:  # `_check_files` has compared one that was moved before
            raise UnreadableError(target, "is missing from the version that replaces the dataset", WAY_OUT)
    for folder in touched:
        sync_folder(folder)


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
