"""Draws the pictures that a dataset can have of itself, into its folder `pictures/` or into another one."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.drawing import head_scores, statistics
from qk_sniffer.drawing.style import save
from qk_sniffer.errors import StoreError
from qk_sniffer.store.disk import explained
from qk_sniffer.store.layout import PICTURE_SUFFIXES, PICTURES
from qk_sniffer.store.open_folder import PLAIN, Access, Anchored, Checked, OpenFolder
from qk_sniffer.store.places import is_drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = Mapping[str, "Callable[[], Figure | None]"]
"""Functions that draw pictures, by the pictures' names. One returns None if there is nothing to show."""

MATPLOTLIB_MISSING = "matplotlib is not installed: pip install matplotlib, and rerun the same command"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def folder_of(dataset: Dataset) -> Path:
    """Returns the folder of a dataset's pictures: its `pictures/`, or one in `outputs` for a dataset on the Hub."""
    return dataset.beside(f"-{PICTURES}") if dataset.folder is None else dataset.folder / PICTURES


def drawable(dataset: Dataset) -> Pictures:
    """Returns all pictures that a dataset can have."""
    found = statistics.pictures(dataset)
    if dataset.manifest["config"]["capture"]["attention"]["enabled"]:
        found["attention"] = partial(head_scores.attention, dataset)
    return found


def unlisted(dataset: Dataset, pictures: Pictures) -> Pictures:
    """Leaves out the pictures that the manifest of a dataset lists. They stay as they are: it has their checksums."""
    listed = dataset.manifest["files"]
    return {
        name: make
        for name, make in pictures.items()
        if not any(f"{PICTURES}/{name}{suffix}" in listed for suffix in PICTURE_SUFFIXES)
    }


def undrawn(dataset: Dataset) -> Pictures:
    """Returns the pictures that are to be drawn into the folder of a dataset, because they are not there.

    A picture of the same name that someone else has made stays.
    """
    path = folder_of(dataset)
    there: set[str] = set()
    drawn: set[str] = set()
    if path.is_dir():
        with OpenFolder.at(path) as folder:
            there = {*folder.names()}
            drawn = {name for name in there if is_drawn(folder, name)}
    found = {}
    for name, make in unlisted(dataset, drawable(dataset)).items():
        files = {f"{name}{suffix}" for suffix in PICTURE_SUFFIXES}
        if not files <= there and files & there <= drawn:
            found[name] = make
    return found


def draw(
    pictures: Pictures,
    folder: Path,
    *,
    access: Access = PLAIN,
    held: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[str]:
    """Draws pictures into `folder`, which is created; returns the names of those that have something to show.

    `held` is that of `save`.

    Raises:
        StoreError: the dataset cannot be read, the folder cannot be written, or has a picture of someone else under one
            of these names.
        HubError: a file of the dataset cannot be fetched.
        QkSnifferError: a picture would have too many cells.
    """
    with ExitStack() as stack:
        with explained(folder, "make"):
            access.check()
            parent = stack.enter_context(access.open(folder.parent, create=True))
            if parent.type_of(folder.name) not in (None, "folder"):
                raise StoreError(f"{folder} is not a folder, and pictures are not written through it: remove it")
            # It stays open: drawing takes seconds, in which a link may take its place.
            opened = stack.enter_context(parent.folder(folder.name, create=True))
        inside = Checked(Anchored((opened,)), access.check)
        return [name for name, make in pictures.items() if save(folder / name, make, access=inside, held=held)]
