"""Promotes a staged version to the dataset, in steps that can be repeated from any point.

    1. The card and then the manifest are written into the staging, which is whole from here on.
    2. The root's manifest is removed: readers see an incomplete dataset.
    3. Files are renamed into place. Other files that the old manifest lists are removed, and pictures that this package
       has drawn of the old vectors.
    4. The manifest is written: readers see the new dataset.
    5. The journals are removed, then the staging's manifest, then the staging.

A crash before the end of step 1 leaves the old dataset and the journals. After a later crash, `finish_promotion` does
the remaining steps.

The staged manifest carries the identity of its job, and only that job promotes it. It also has a digest of its content.
The manifest in the root has neither: equal jobs make equal manifests. The staged one names the files of the version
that it replaces, with their digests: a work folder may be someone else's, and after step 2 nothing else tells these
files from those of the user.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import stored
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.disk import digest_of, explained, open_file, remove, sync_folder, type_of, write_atomic
from qk_sniffer.store.forms import decode_manifest, read_manifest
from qk_sniffer.store.layout import CARD, MANIFEST, PICTURES, Layout, is_picture
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import PLAIN, Access, OpenFolder
from qk_sniffer.store.places import is_drawn, listed_digests, listed_files
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.store.work_folder import remove_work
from qk_sniffer.text import shortened

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
        manifest = {**manifest, "replaces": listed_digests(layout)}
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


def abandon_promotion(layout: Layout, access: Access) -> None:
    """Removes a staged version that cannot be promoted, and what its promotion has left of both versions in the root.

    Hold the finalize lock. `access` is that lock. Files that neither version lists with their
    digests stay.
    """
    manifest: dict[str, Any] = {}
    with suppress(OSError, StoreError):
        manifest = read_manifest(layout.staging.manifest, way_out=WAY_OUT, follow_links=False, access=access)
    if type_of(layout.manifest, access) is None:  # otherwise the old version is whole
        files = manifest.get("files", {})
        with explained(layout.root, "remove the remains of a dataset from"), access.open(layout.root) as root:
            moved = {name for name, entry in files.items() if _is_file_of(layout.root / name, entry["sha256"], access)}
            for name in sorted(moved | _replaced(layout, manifest, access)):
                access.check()
                _remove_file(root, name)
    remove(layout.staging.root, access)


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
                listed = listed_files(layout)
                places = _Places(root, staging, listed | _replaced(layout, manifest, access, listed))
                for name in sorted({*manifest["files"], MANIFEST}):
                    places.check(name)
                for name in sorted(manifest.get("replaces", {}).keys() - places.own - manifest["files"].keys()):
                    if not is_picture(name) and type_of(layout.root / name, access) is not None:
                        raise _of_others(layout.root / name)
                access.check()
                root.unlink(MANIFEST)
                sync_folder(layout.root, access)
                _move(places, manifest["files"], access)
                _remove_others(places, manifest["files"], access)
                sync_folder(layout.root, access)
                _publish_manifest(layout, root, manifest, access)
        access.check()
        remove_work(layout, PLAIN if claim is None else claim.lock)


def _replaced(
    layout: Layout, manifest: Mapping[str, Any], access: Access, known: Collection[str] = frozenset()
) -> set[str]:
    """Returns the names of the files in the root that are those of the version which a staged one replaces.

    Reads them, except for those that are `known` to be.
    """
    replaces: dict[str, str | None] = manifest.get("replaces", {})
    unknown = {name: digest for name, digest in replaces.items() if name not in known}
    return {name for name, digest in unknown.items() if _is_file_of(layout.root / name, digest, access)}


def _of_others(path: Path) -> StoreError:
    return StoreError(f"{path} is of no dataset of qk-sniffer, and is not replaced: move it away. {_RERUN}")


@dataclass(frozen=True)
class _Places:
    """The places of the files of a dataset in the open data root, and their `staging`, which is open too."""

    root: OpenFolder
    staging: OpenFolder
    own: set[str]
    """The files of the version that is replaced, and its manifest."""

    def check(self, name: str) -> None:
        """Checks that nothing but a file of the replaced version is where the dataset gets the file `name`.

        Raises:
            StoreError: something else is there.
        """
        folder, _, file = name.rpartition("/")
        if folder and self.root.type_of(folder) not in (None, "folder"):
            raise StoreError(
                f"{self.root.path / folder} is not a folder, and the dataset is not written through it; remove it. "
                f"{_RERUN}"
            )
        with suppress(FileNotFoundError), _folder_of(self.root, name) as found:
            kind = found.type_of(file)
            if kind == "folder":
                raise StoreError(
                    f"{self.root.path / name} is a folder, where the dataset has a file: remove it. {_RERUN}"
                )
            if kind is not None and name not in self.own and self._is_staged(name):
                raise _of_others(self.root.path / name)

    def _is_staged(self, name: str) -> bool:
        """Whether the file is still to be moved. The manifest always is."""
        if name == MANIFEST:
            return True
        with suppress(FileNotFoundError), _folder_of(self.staging, name) as found:
            return found.type_of(name.rpartition("/")[2]) is not None
        return False


def _check_files(layout: Layout, files: Mapping[str, Mapping[str, Any]], access: Access) -> None:
    """Compares the files, staged or moved already, with the manifest: time has passed since they were written."""
    for name, entry in files.items():
        staged = layout.staging.root / name
        path = staged if type_of(staged, access) is not None else layout.root / name
        if not _is_file_of(path, entry["sha256"], access):
            problem = "is missing from the version that replaces the dataset, or has changed"
            raise UnreadableError(path, problem, WAY_OUT)


def _is_file_of(path: Path, sha256: str | None, access: Access) -> bool:
    if type_of(path, access) != "file":
        return False
    with open_file(path, access) as file:
        return digest_of(file) == sha256


def _move(places: _Places, names: Iterable[str], access: Access) -> None:
    """Moves the staged files to the root, between folders that stay open: no path is looked up again."""
    for name in names:
        file = name.rpartition("/")[2]
        with _folder_of(places.root, name, create=True) as target:
            access.check()
            places.check(name)
            try:
                with _folder_of(places.staging, name) as source:
                    source.rename(file, target, file)
            except FileNotFoundError:
                if target.type_of(file) is None:  # `_check_files` has compared one that was moved before
                    problem = "is missing from the version that replaces the dataset"
                    raise UnreadableError(places.root.path / name, problem, WAY_OUT) from None
            target.sync()


def _remove_others(places: _Places, names: Collection[str], access: Access) -> None:
    """Removes the other files of the replaced version, and the pictures that were drawn of its vectors."""
    drawn, unknown = _pictures(places.root)
    for name in sorted((places.own | drawn) - {MANIFEST, *names}):
        folder = name.rpartition("/")[0]
        if not folder or places.root.type_of(folder) == "folder":
            access.check()
            _remove_file(places.root, name)
    if kept := sorted(unknown - places.own - {*names}):
        log.warning(
            "%s: nothing tells that qk-sniffer has drawn %s, which therefore stay, and are published with the dataset. "
            "Remove them if they are of an earlier version",
            places.root.path,
            shortened(kept, 5),
        )


def _pictures(root: OpenFolder) -> tuple[set[str], set[str]]:
    """Returns the names of the pictures that this package has drawn, and of others."""
    drawn: set[str] = set()
    others: set[str] = set()
    if root.type_of(PICTURES) == "folder":
        with root.folder(PICTURES) as folder:
            for file in folder.names():
                if is_picture(name := f"{PICTURES}/{file}"):
                    (drawn if is_drawn(folder, file) else others).add(name)
    return drawn, others


def _remove_file(root: OpenFolder, name: str) -> None:
    """Removes a file of the dataset, and its folder below the root if that is empty then."""
    folder, _, file = name.rpartition("/")
    with suppress(FileNotFoundError), _folder_of(root, name) as found:
        if found.type_of(file) != "folder":
            found.unlink(file)
    if folder:
        root.rmdir(folder)


def _folder_of(root: OpenFolder, name: str, *, create: bool = False) -> OpenFolder:
    """Opens the folder of a file of the dataset."""
    folder = name.rpartition("/")[0]
    return root.folder(folder, create=create) if folder else root.again()


def _publish_manifest(layout: Layout, root: OpenFolder, manifest: Mapping[str, Any], access: Access) -> None:
    """Puts the manifest into the root. It is written elsewhere: a temporary file of its name could be the user's."""
    written = layout.work / f"{MANIFEST}.tmp"
    write_atomic(written, manifests.encode(_public(manifest)), access=access)
    with access.open(layout.work) as work:
        access.check()
        work.rename(written.name, root, MANIFEST)
    root.sync()


def _is_promoted(layout: Layout, manifest: Mapping[str, Any]) -> bool:
    """Whether only the removal of the work is left to do."""
    expected = manifests.encode(_public(manifest))
    try:
        return stored.read_bytes(layout.manifest, way_out="", most_bytes=len(expected)) == expected
    except (OSError, StoreError):  # none, or another one
        return False


def _public(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the root: without the identity of the job, and the names of replaced files."""
    return {key: value for key, value in manifest.items() if key not in ("job_id", "replaces")}
