"""Promotes a staged version to the dataset, in steps that can be repeated from any point.

    1. The card and then the manifest are written into the staging, which is whole from here on.
    2. The root's manifest is removed: readers see an incomplete dataset.
    3. Files are renamed into place; heads that are no longer part of the dataset are removed.
    4. The manifest is written: readers see the new dataset.
    5. The journals are removed, then the staging's manifest, then the staging.

A crash before the end of step 1 leaves the old dataset and the journals. After a later crash, `finish_promotion` does
the remaining steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.disk import explained, sync_folder, write_atomic
from qk_sniffer.store.forms import read_manifest
from qk_sniffer.store.layout import CARD, Layout, remove_file, remove_work
from qk_sniffer.store.manifest import FileEntry

WAY_OUT = "replace the unfinished job with output.overwrite=true"


def promote(layout: Layout, manifest: Mapping[str, Any], *, card: bytes | None = None) -> None:
    """Promotes the files that `compact` has staged, with `card`, which is added to the manifest.

    Hold the finalize lock.

    Raises:
        StoreError: the disk failed. The old dataset still exists, or `finish_promotion` completes the new one.
    """
    staging = layout.staging
    with explained(staging.root, "write"):
        if card is not None:
            write_atomic(staging.card, card)
            manifest = manifests.with_files(manifest, {CARD: FileEntry.of(card)})
        for name in manifest["files"]:
            sync_folder((staging.root / name).parent)
        manifests.write(staging, manifest)
    finish_promotion(layout)


def finish_promotion(layout: Layout) -> bool:
    """Finishes an interrupted promotion. Returns False if there is none. Hold the finalize lock."""
    staging = layout.staging
    if not staging.manifest.exists():
        return False
    with explained(layout.root, "move the dataset into"):
        manifest = read_manifest(staging.manifest, way_out=WAY_OUT, follow_links=False)
        if _same_bytes(staging.manifest, layout.manifest):
            remove_work(layout)  # the only remaining step
            return True
        layout.manifest.unlink(missing_ok=True)
        sync_folder(layout.root)
        _move(layout, manifest["files"])
        for _, path in list(layout.head_files()):
            if path.relative_to(layout.root).as_posix() not in manifest["files"]:
                remove_file(layout, path)
        sync_folder(layout.root)
        manifests.write(layout, manifest)
        remove_work(layout)
    return True


def _move(layout: Layout, files: Mapping[str, Mapping[str, Any]]) -> None:
    touched: set[Path] = set()
    for name, entry in files.items():
        source, target = layout.staging.root / name, layout.root / name
        if target.parent.is_symlink():
            raise StoreError(f"{target.parent} is a link, and the dataset is not written through it; remove the link")
        if source.exists():
            target.parent.mkdir(exist_ok=True)
            source.replace(target)
            touched.add(target.parent)
        elif not target.exists() or target.stat().st_size != entry["bytes"]:
            raise StoreError(
                f"{target} is missing from the version that replaces the dataset; rerun the command with "
                "output.overwrite=true"
            )
    for folder in touched:
        sync_folder(folder)


def _same_bytes(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()
