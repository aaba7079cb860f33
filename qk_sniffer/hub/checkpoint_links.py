"""Refuses links in a checkpoint that lead elsewhere on this machine, pipes, devices, and configs of no sensible size.

A checkpoint may come from someone else. Tokens of a file that such a link leads to would become part of the dataset,
and lines of it part of messages. transformers also takes files of odd names for a vocabulary, such as
`tokenizer.model.`. Weights may be links to anywhere: of a file without tensors, nothing gets further. A pipe is worse
than a missing file: the libraries that open it wait for ever.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qk_sniffer.errors import SourceError, StoreError
from qk_sniffer.hub.checkpoint_files import WEIGHT_SUFFIXES, files_of, is_inside
from qk_sniffer.hub.config_limits import refuse_large_config
from qk_sniffer.hub.json_files import DamagedFileError, json_object
from qk_sniffer.hub.revisions import is_hub_id
from qk_sniffer.store.disk import open_regular, real_path

_MOST_BYTES = 1 << 24

_MARKS = {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class", "adapter_config.json": "peft_type"}
"""The key by which each of these files shows that its folder is a checkpoint."""

_MOST_LINKS = 8


def refuse_odd_files(name: str, commit: str | None = None) -> None:
    """Checks that the files of a checkpoint are regular ones, and its links. A link may lead to a file

    - in the folder of the checkpoint; or, for a repository in the Hub's cache, among its `blobs`;
    - of the same name in another checkpoint, if that one's link may lead on.

    Args:
        name: the folder, or the Hub id of a repository, of which the cache is checked.
        commit: that of a Hub id.

    Raises:
        SourceError: a link leads elsewhere, a file is a pipe or a device, a config is too large, or a file has the name
            of the repository.
    """
    folder = Path(name)
    if not folder.is_dir():
        # A tokenizer may be the path of its tokenizer.json.
        if is_hub_id(name) and folder.suffix != ".json" and os.path.lexists(folder):
            raise SourceError(
                f"{folder.absolute()} has the name of a repository of the Hub, and is no folder: transformers would "
                "read it as a config, as weights and as a vocabulary. Move it away, or start in another folder"
            )
        from huggingface_hub import constants

        folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots", commit or "")
        if commit is None or not folder.is_dir():
            return
    for path in sorted(files_of(folder)):
        refuse_special(path)
        refuse_large_config(path)
        if path.suffix not in WEIGHT_SUFFIXES and home_of(folder, path) is None:
            raise SourceError(
                f"{path} leads to {os.path.realpath(path)}, which is neither in its folder nor a file of the same name "
                "in another checkpoint: it is not read. Replace the link by a copy of the file"
            )


@contextmanager
def own_files(name: str, commit: str | None = None) -> Iterator[None]:
    """Checks the files of a checkpoint as `refuse_odd_files` does, before a block that loads them and after it.

    A file that the block fetches may be in the cache of the Hub already, among the `blobs`. The cache may come from
    someone else, with a link of that name to any file, which an error of the block may quote.

    Raises:
        SourceError: that of `refuse_odd_files`.
    """
    refuse_odd_files(name, commit)
    try:
        yield
    finally:
        refuse_odd_files(name, commit)


def refuse_special(path: Path) -> None:
    """Checks that a path that will be opened is no pipe or device. A missing file is left to its reader.

    Raises:
        SourceError: it is one.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SourceError(f"{path} is not a regular file, but a pipe or a device: it is not opened. Remove it")


def home_of(folder: Path, path: Path, most: int = _MOST_LINKS) -> Path | None:
    """Returns the folder of the checkpoint that has the file `path` of `folder`; None if there is none.

    It is `folder`, or that of the file of the same name to which at most `most` links lead.
    """
    if is_inside(folder, path):
        return folder
    if not path.is_symlink() or most == 0:
        return None
    try:
        source = real_path(path.parent) / path.readlink()
    except StoreError:
        return None
    if source.name != path.name or not _is_checkpoint(source.parent):
        return None
    return home_of(source.parent, source, most - 1)


def _is_checkpoint(folder: Path) -> bool:
    return any(isinstance(_read(folder / file).get(key), str) for file, key in _MARKS.items())


def _read(path: Path) -> dict[str, object]:
    try:
        with open_regular(path) as file:
            return json_object(file.read(_MOST_BYTES))
    except (OSError, DamagedFileError):
        return {}
