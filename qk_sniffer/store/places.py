"""Tells the files of a dataset from those of others in the same folder, which no job replaces or removes.

The name of a file does not tell: `README.md` may be anyone's. A file is of a dataset if its manifest lists it.
"""

import re
from pathlib import Path
from typing import Any, BinaryIO

from qk_sniffer.errors import StoreError
from qk_sniffer.store import stored
from qk_sniffer.store.disk import real_path
from qk_sniffer.store.layout import (
    CARD,
    EXAMPLES,
    FORMAT,
    MANIFEST,
    PICTURE_MARK,
    PICTURES,
    STATISTICS,
    Layout,
    is_dataset_file,
    is_ours,
    is_statistics_file,
    parse_head_name,
)
from qk_sniffer.store.open_folder import WORK, OpenFolder
from qk_sniffer.text import shortened


def refuse_inside(path: Path, setting: str) -> None:
    """Checks that a file or folder that is to be written is not where a job or a dataset has its own.

    What someone else writes there is removed with the work of the job or with the dataset, or published with it. Links
    are followed. `setting` names the path in the error.

    Raises:
        StoreError: it is in a work folder, or in a folder of a dataset's files, or one of these. Names the data root.
    """
    real = real_path(path)
    for root in real.parents:
        name = real.relative_to(root).as_posix()
        folder = name.partition("/")[0]
        if folder == WORK:
            raise StoreError(
                f"{path} is in {root / WORK}, the work folder of the data root {root}, and would be removed with it; "
                f"choose another {setting}"
            )
        is_of_dataset = folder in _FOLDERS or parse_head_name(folder) is not None
        if (is_of_dataset or name == MANIFEST or is_dataset_file(name)) and is_ours(Layout(root)):
            raise StoreError(f"{path} is where the dataset at {root} has its own files; choose another {setting}")


_FOLDERS = (EXAMPLES.partition("/")[0], STATISTICS, PICTURES)


def listed_files(layout: Layout) -> set[str]:
    """Returns the names of the files that the manifest in the data root lists, and its own.

    Also of a manifest that is damaged otherwise, whose dataset `output.overwrite` replaces. Without a manifest of this
    package, returns no names.
    """
    files = _listed(layout)
    return set() if files is None else {MANIFEST, *files}


def listed_digests(layout: Layout) -> dict[str, str | None]:
    """Returns the sha256 of each file that the manifest in the data root lists; None if it has none for the file."""
    return {name: _digest_in(entry) for name, entry in (_listed(layout) or {}).items()}


def _digest_in(entry: Any) -> str | None:
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None


def _listed(layout: Layout) -> dict[str, Any] | None:
    try:
        values: Any = stored.read(
            layout.manifest, dict[str, Any], way_out="", most_bytes=stored.LARGE, follow_links=True
        )
    except (OSError, StoreError):
        return None
    if values.get("format") != FORMAT:
        return None
    files = values.get("files")
    return {name: files[name] for name in files if is_dataset_file(name)} if isinstance(files, dict) else {}


def refuse_unlisted(layout: Layout) -> None:
    """Checks that nothing is where the data root gets files of a dataset but the files that its manifest lists.

    Pictures do not count: a dataset may have any.

    Raises:
        StoreError: names what is there.
    """
    with OpenFolder.at(layout.root) as root:
        names = _dataset_names(root)
        if layout.staging.manifest.exists():  # another shard is moving the dataset into place
            return
        listed = listed_files(layout)
        found = [name for name in names if name not in listed or _is_folder(root, name)]
        marks = (layout.snapshot.name, layout.private.name)
        found += [name for name in marks if root.type_of(name) == "folder"]
    if found:
        raise StoreError(
            f"{layout.root} holds {shortened(found, 5)}, which no dataset of qk-sniffer there lists as a file. A job "
            "does not replace it: move it away, or choose another output.data_root"
        )


def _dataset_names(root: OpenFolder) -> list[str]:
    """Returns what is in an open data root under the names of a dataset's files, pictures excepted."""
    found = []
    for name in root.names():
        if name in (MANIFEST, CARD):
            found.append(name)
        elif root.type_of(name) == "folder":
            with root.folder(name) as folder:
                inside = [f"{name}/{file}" for file in folder.names()]
            if name == STATISTICS:
                found += filter(is_statistics_file, inside)
            elif name != PICTURES:
                found += filter(is_dataset_file, inside)
    return found


def _is_folder(root: OpenFolder, name: str) -> bool:
    folder, _, file = name.rpartition("/")
    with root.folder(folder) if folder else root.again() as found:
        return found.type_of(file) == "folder"


def is_drawn(folder: OpenFolder, name: str) -> bool:
    """Whether a picture in an open folder is one that this package has drawn, by its metadata."""
    if folder.type_of(name) != "file":
        return False
    with folder.open(name) as file:
        return has_mark(file)


def has_mark(file: BinaryIO) -> bool:
    """Whether the metadata of a picture say that this package has drawn it. Moves the place in the file."""
    file.seek(0)
    ends = file.read(_PICTURE_END)
    file.seek(-min(_PICTURE_END, file.seek(0, 2)), 2)  # of a PDF, it is at its end
    ends += file.read(_PICTURE_END)
    return any(mark in ends for mark in _MARKS)


_PICTURE_END = 1 << 13
"""The bytes of a picture, at its start and at its end, that have its metadata."""

_MARKS = (
    f"Software\0{PICTURE_MARK}".encode(),
    f"<dc:title>{PICTURE_MARK}</dc:title>".encode(),
    f"/Creator ({PICTURE_MARK})".encode(),
)
"""The metadata of a PNG, of an SVG and of a PDF that name this package."""
