"""Exports a dataset to the file or folder of a format."""

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from qk_sniffer.dataset.reader import Dataset, open_dataset
from qk_sniffer.errors import ConfigError, StoreError
from qk_sniffer.export.formats import format_named
from qk_sniffer.export.source import Source
from qk_sniffer.logs import logger
from qk_sniffer.store import disk, stored
from qk_sniffer.store.open_folder import PLAIN, Access, Anchored, OpenFolder
from qk_sniffer.store.own_files import temporary_name
from qk_sniffer.store.places import refuse_inside
from qk_sniffer.text import expand_home, path_problem

log = logger(__name__)

PROVENANCE = "provenance.json"

_FILES_OF_FOLDERS = {
    PROVENANCE,
    "config.json",
    "model.safetensors",
    "kv_scales.safetensors",
    "kv_scales_by_head.safetensors",
    "quantization_config.json",
    "key_ranges.safetensors",
    "value_ranges.safetensors",
}
"""The names of files in the folders of all formats."""

_EARLIER = ".old"
"""The end of the name of an earlier export while a new one takes its place."""


def export(
    dataset: Dataset | str | Path, format: str, path: str | Path | None = None, *, overwrite: bool = False
) -> Path:
    """Writes the statistics of a dataset in a format of another program.

    Args:
        dataset: a dataset, or the folder of one.
        format: a name in `qk_sniffer.export.formats.FORMATS`, such as "triattention".
        path: the file or folder to write; None for a name next to the dataset's folder, or in `outputs` for a dataset
            on the Hub.
        overwrite: replace the file at `path`, or the folder of an earlier export.

    Returns:
        the path. The provenance of the numbers is in the file, or in JSON: as `provenance.json` in a folder, or next
        to a file that has no room for it, under the same name with `.json` after it and with the file's sha256. What an
        export that was killed has set aside is first put back, or removed if the new export is in its place.

    Raises:
        ConfigError: there is no such format, or `path` is not one of a file or folder.
        StoreError: the dataset lacks what the format needs, or has what it cannot express; `path` exists, has what no
            export wrote, or cannot be written.
        HubError: a file of the dataset cannot be fetched.
    """
    chosen = format_named(format)
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    target = opened.beside(chosen.suffix) if path is None else _named(path)
    beside = None if chosen.is_folder or chosen.has_provenance else target.with_name(f"{target.name}.json")
    refuse_inside(target, "output")
    if chosen.is_folder:
        _recover(target)
    with disk.explained(target, "write", _ELSEWHERE):
        for output in (target, beside):
            if output is not None and not overwrite and disk.type_of(output) is not None:
                raise _exists(output)
        if chosen.is_folder:
            _check_folder(target)
        else:
            _check_file(target)
            if beside is not None and disk.type_of(beside) is not None:
                _check_provenance(beside)
    source = Source(opened)
    if problems := [*chosen.problems(source)]:
        raise StoreError(f"{opened} cannot be exported as {format}:", *(f"  - {problem}" for problem in problems))
    files = dict(chosen.encode(source))
    provenance = source.provenance()
    with disk.explained(target, "write", _ELSEWHERE):
        disk.make_folder(target.parent)
        with _one_export_in(target.parent):
            if chosen.is_folder:
                _write_folder(target, files | {PROVENANCE: _encoded(provenance)}, overwrite=overwrite)
            elif beside is None:
                _write_file(target, files[""], overwrite=overwrite)
            else:
                if overwrite:
                    _remove_provenance(beside)  # a kill leaves a file without one, and none with that of another file
                _write_file(target, files[""], overwrite=overwrite)
                # Its place is free: what has appeared there meanwhile is not of this export.
                _write_file(beside, _encoded(provenance | {"sha256": sha256(files[""]).hexdigest()}), overwrite=False)
    return target


def _named(path: str | Path) -> Path:
    """Returns the path of the output that a user names.

    Raises:
        ConfigError: nothing can be written there: it has no name of its own, such as "." or "..", or one that no disk
            can have.
    """
    target = Path(expand_home(str(path)))
    if target.name in ("", ".."):
        raise ConfigError([f"the output is {str(path)!r}; it must name a file or folder, such as exports/model"])
    if (problem := path_problem(target)) is not None:
        raise ConfigError([f"the output is {str(path)!r}, which {problem}"])
    return target


_ELSEWHERE = "Give another output"


@contextmanager
def _one_export_in(folder: Path) -> Iterator[None]:
    """Waits until no other export writes into a folder: a file and its provenance are of one export."""
    with OpenFolder.at(folder) as opened:
        with suppress(OSError):  # some network disks lock no folders
            fcntl.flock(opened.descriptor, fcntl.LOCK_EX)
        yield


def _exists(output: Path) -> StoreError:
    return StoreError(f"{output} exists: give another output, or overwrite=true to replace it")


def _encoded(provenance: Mapping[str, object]) -> bytes:
    return (json.dumps(provenance, indent=2, ensure_ascii=False) + "\n").encode()


class _Provenance(TypedDict):
    made_by: Annotated[str, Meta(pattern=r"\Aqk-sniffer ")]


def _check_file(path: Path) -> None:
    """Checks that a file can take the place of what is at `path`.

    Raises:
        StoreError: it is no file.
    """
    if (found := disk.type_of(path)) not in (None, "file", "link"):
        raise StoreError(f"{path} is a {found}: give another output")


def _check_provenance(path: Path, access: Access = PLAIN) -> None:
    """Checks that an export wrote the file at `path`.

    Raises:
        StoreError: it did not.
    """
    try:
        stored.read(path, _Provenance, way_out="", most_bytes=stored.LARGE, access=access)
    except (OSError, stored.UnreadableError) as error:
        raise StoreError(f"{path} was not written by an export: remove it, or give another output") from error


def _remove_provenance(path: Path) -> None:
    """Removes the provenance of an earlier export, if there is one, after a new look: the numbers took a while.

    Raises:
        StoreError: no export wrote what is there.
    """
    if disk.type_of(path) is not None:
        _check_provenance(path)
        path.unlink(missing_ok=True)


def _check_folder(folder: Path) -> None:
    """Checks that there is nothing at `folder`, or an empty folder, or that of an earlier export, and no more in it.

    Raises:
        StoreError: there is something else.
    """
    if (found := disk.type_of(folder)) is None:
        return
    if found != "folder":
        raise StoreError(f"{folder} is a {found}: give another output")
    with disk.explained(folder, "read"), OpenFolder.at(folder, follow_links=False) as opened:
        _check_open_folder(opened)


def _check_open_folder(folder: OpenFolder) -> None:
    """Checks that an open folder is empty, or has the files of an export and no more.

    Raises:
        StoreError: it has others.
    """
    names = folder.names()
    for name in names:
        if name not in _FILES_OF_FOLDERS or folder.type_of(name) != "file":
            raise StoreError(f"{folder.path / name} was not written by an export: remove it, or give another output")
    if names:
        _check_provenance(folder.path / PROVENANCE, Anchored((folder,)))


def _write_file(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Writes a file whole, under a name next to its place that is no user's, and then gives it its own.

    Raises:
        StoreError: something has appeared in its place meanwhile, and `overwrite` is false.
    """
    temporary = temporary_name(path.name)
    with OpenFolder.at(path.parent) as parent:
        disk.write_atomic(parent.path / temporary, data, access=Anchored((parent,)))
        if overwrite:
            parent.rename(temporary, parent, path.name)
        else:
            try:
                parent.rename_to_free(temporary, path.name)
            except FileExistsError:
                parent.unlink(temporary)
                raise _exists(path) from None
        parent.sync()


def _write_folder(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Writes a folder whole, next to its place, and then renames it.

    Both folders stay open: in a folder of several users, a link could take the place of the new one.

    Raises:
        StoreError: something has appeared in its place meanwhile, and `overwrite` is false.
    """
    # Not a fixed name, as in `write_atomic`: a folder of this name could be the user's.
    temporary, earlier = (f".{folder.name}-{secrets.token_hex(8)}{suffix}" for suffix in (".tmp", _EARLIER))
    with OpenFolder.at(folder.parent) as parent, parent.new_folder(temporary) as written:
        try:
            for name, data in files.items():
                disk.write_atomic(written.path / name, data, access=Anchored((written,)))
            _check_folder(folder)  # again: the numbers took a while
            _check_is_there(written, parent)
            if parent.type_of(folder.name) is not None:
                if not overwrite:
                    raise _exists(folder)
                parent.rename(folder.name, parent, earlier)
            parent.rename(temporary, parent, folder.name)
        except BaseException:
            for name in files:
                written.unlink(name)
            parent.rmdir(temporary)
            raise
        _remove_export(parent, earlier, folder)
        parent.sync()


def _recover(folder: Path) -> None:
    """Puts an earlier export back in its place that a killed export has set aside, or removes it if there is a new one.

    Raises:
        StoreError: the folder that contains it cannot be read or written.
    """
    aside = re.compile(rf"\.{re.escape(folder.name)}-[0-9a-f]{{16}}{re.escape(_EARLIER)}")
    with (
        disk.explained(folder, "write"),
        suppress(FileNotFoundError, NotADirectoryError),
        OpenFolder.at(folder.parent) as parent,
    ):
        for name in filter(aside.fullmatch, parent.names()):
            try:
                with parent.folder(name) as opened:
                    _check_open_folder(opened)
            except (OSError, StoreError):  # of something else
                continue
            if parent.type_of(folder.name) is None:
                parent.rename(name, parent, folder.name)
                log.warning("%s is the earlier export again: one that was to replace it was killed", folder)
            else:
                _remove_export(parent, name, folder)


def _check_is_there(folder: OpenFolder, parent: OpenFolder) -> None:
    """Checks that an open folder still has its name in the open folder that contains it.

    Raises:
        StoreError: something else has it.
    """
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(folder.descriptor), parent.lstat(folder.path.name)):
            return
    raise StoreError(f"{folder.path} was replaced while the export wrote it: give an output where nobody else writes")


def _remove_export(parent: OpenFolder, earlier: str, name: Path) -> None:
    """Removes an earlier export, which was `name`, if there is one. Nothing but its own files is removed.

    Raises:
        StoreError: something else has come into it, or to its place, since it was checked.
    """
    try:
        with parent.folder(earlier) as opened:
            _check_open_folder(opened)
            for file in sorted(opened.names(), key=PROVENANCE.__eq__):  # last, or a kill leaves what no one knows
                opened.unlink(file)
        os.rmdir(earlier, dir_fd=parent.descriptor)
    except FileNotFoundError:
        return
    except (OSError, StoreError) as error:
        raise StoreError(
            f"{name} is exported, and what was there before is not removed, because it has changed since it was "
            f"checked: it is now {parent.path / earlier}"
        ) from error
