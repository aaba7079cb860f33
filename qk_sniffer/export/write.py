"""Exports a dataset to the file or folder of a format."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

from qk_sniffer.dataset.reader import Dataset, open_dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.export.formats import format_named
from qk_sniffer.export.source import Source
from qk_sniffer.store import disk

PROVENANCE = "provenance.json"


def export(
    dataset: Dataset | str | Path, format: str, path: str | Path | None = None, *, overwrite: bool = False
) -> Path:
    """Writes the statistics of a dataset in a format of another program.

    Args:
        dataset: a dataset, or the folder of one.
        format: a name in `qk_sniffer.export.formats.FORMATS`, such as "triattention".
        path: the file or folder to write; None for a name next to the dataset's folder, or in `outputs` for a dataset
            on the Hub.
        overwrite: replace what is at `path`.

    Returns:
        the path. The provenance of the numbers is in the file, or in JSON: as `provenance.json` in a folder, or next
        to a file that has no room for it, under the same name with `.json` after it.

    Raises:
        ConfigError: there is no such format.
        StoreError: the dataset lacks what the format needs, or has what it cannot express; `path` exists, or cannot be
            written.
        HubError: a file of the dataset cannot be fetched.
    """
    chosen = format_named(format)
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    target = Path(path).expanduser() if path is not None else opened.beside(chosen.suffix)
    beside = None if chosen.is_folder or chosen.has_provenance else target.with_name(f"{target.name}.json")
    for output in (target, beside):
        if output is not None and not overwrite and disk.type_of(output) is not None:
            raise StoreError(f"{output} exists: give another output, or overwrite=true to replace it")
    source = Source(opened)
    if problems := [*chosen.problems(source)]:
        raise StoreError(f"{opened} cannot be exported as {format}:", *(f"  - {problem}" for problem in problems))
    files = dict(chosen.encode(source))
    provenance = (json.dumps(source.provenance(), indent=2, ensure_ascii=False) + "\n").encode()
    with disk.explained(target, "write"):
        disk.make_folder(target.parent)
        if chosen.is_folder:
            _write_folder(target, files | {PROVENANCE: provenance})
        else:
            if beside is not None:
                _write_file(beside, provenance)
            _write_file(target, files[""])
    return target


def _write_file(path: Path, data: bytes) -> None:
    """Writes a file whole, under a name next to its place that is no user's, and then renames it."""
    if disk.type_of(path) == "folder":
        raise StoreError(f"{path} is a folder: give another output")
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    disk.write_atomic(temporary, data)
    temporary.rename(path)
    disk.sync_folder(path.parent)


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder whole, next to its place, and then renames it."""
    if disk.type_of(folder) == "folder" and (others := {path.name for path in folder.iterdir()} - files.keys()):
        raise StoreError(f"{folder} has other files, such as {min(others)}: give another output")
    # Not a fixed name, as in `write_atomic`: a folder of this name could be the user's.
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        for name, data in files.items():
            disk.write_atomic(temporary / name, data)
        disk.remove(folder)
        temporary.rename(folder)
    except BaseException:
        disk.remove(temporary)
        raise
    disk.sync_folder(folder.parent)
