"""Where the files of a finished dataset are: in a folder, or on a branch of the Hub (`hub/branch.py`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Files(Protocol):
    """The files of a dataset by their names relative to its root, with slashes: `l00h00q/data.parquet`."""

    def path(self, name: str) -> Path:
        """The file on this machine, fetched now where it has to be; in a folder it may be missing."""

    def refetch(self, name: str) -> Path:
        """The file again, where it was not what it should be: fetched anew, where it came from elsewhere."""

    def fetch(self, names: Iterable[str]) -> None:
        """Brings files here at once that `path` would bring one by one."""

    def __str__(self) -> str:
        """What the dataset is called in messages."""


@dataclass(frozen=True)
class Folder:
    """The files below `root`."""

    root: Path

    def path(self, name: str) -> Path:
        return self.root / name

    def refetch(self, name: str) -> Path:
        return self.path(name)

    def fetch(self, names: Iterable[str]) -> None:
        pass  # they are here

    def __str__(self) -> str:
        return str(self.root)
