"""Decides whether a name is that of a folder or of a repository of the Hub, and lists the datasets near a folder."""

from pathlib import Path

from qk_sniffer.config import OutputConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.hub.revisions import is_hub_id
from qk_sniffer.store.layout import Layout
from qk_sniffer.text import closest, did_you_mean, expand_home, path_problem, shortened

_MOST_FOLDERS = 1_000
"""The folders that are looked through for datasets: a parent may hold any number of other folders."""


def folder_of(name: str | Path, revision: str | None) -> Path | None:
    """Returns the folder that `name` means; None if it means a repository of the Hub.

    A name such as `outputs/texts` has the form of both. It means a folder if one of that name exists, or if its parent
    exists or is the default `output.folder`. With a revision it means a repository, unless the folder exists.

    Raises:
        StoreError: it means a folder that does not or cannot exist, or that is no dataset but holds some; or a folder,
            which has no revisions.
    """
    root = Path(expand_home(str(name)))
    if (problem := path_problem(root)) is not None:
        raise StoreError(f"there is no dataset at {root}: the path {problem}")
    if root.is_dir() or not is_hub_id(str(name)):
        if revision is not None:
            raise StoreError(f"{root} is a folder: it has no revision {revision!r}; leave it out")
    elif revision is not None or not (root.parent.is_dir() or root.parent == Path(OutputConfig().folder)):
        return None
    if not root.exists():
        raise _missing(root, is_hub_id(str(name)))
    if (problem := of_several(root)) is not None:
        raise StoreError(problem)
    return root


def of_several(root: Path) -> str | None:
    """Returns the problem of a folder that is no dataset, and no job's, but holds datasets."""
    layout = Layout(root)
    if layout.manifest.exists() or layout.work.exists() or not (found := _datasets(root)):
        return None
    return f"{root} is not a dataset, but holds some: {shortened(found, 10)}"


def _missing(root: Path, may_be_repository: bool) -> StoreError:
    parent = next(folder for folder in root.parents if folder.is_dir())
    found = _datasets(parent)
    lines = [f"there is no dataset at {root}: no such folder{did_you_mean(closest(str(root), found))}"]
    if found:
        lines.append(f"  datasets in {parent}: {shortened(found, 10)}")
    if may_be_repository:
        lines.append(f"  for the repository {root} of the Hub, name a branch with revision=...")
    return StoreError(*lines)


def _datasets(folder: Path) -> list[str]:
    """Returns the finished datasets in a folder, or in the default `output.folder` in it."""
    places = [folder, folder / OutputConfig().folder]
    found = []
    for place in places:
        try:
            inside = sorted(each for each, _ in zip(place.iterdir(), range(_MOST_FOLDERS), strict=False))
        except OSError:
            continue
        found += [str(each) for each in inside if Layout(each).manifest.is_file()]
    return found
