"""Finds the files that a manifest lists, and compares them with it before they are read."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qk_sniffer.hub.branch import Branch
from qk_sniffer.resolved import safe_name
from qk_sniffer.store.disk import sha256_of
from qk_sniffer.store.files import Comparison, Files, Folder, difference
from qk_sniffer.store.layout import HeadKey, head_file
from qk_sniffer.store.stored import UnreadableError

WAY_OUT = "restore the file, or fetch the dataset again"


class DatasetFiles:
    """The files of a finished dataset, of which `listed` are the manifest's `files`."""

    def __init__(self, files: Files, listed: Mapping[str, Any]) -> None:
        self._files = files
        self.listed = listed
        self._comparison = Comparison()

    def path(self, name: str) -> Path:
        """Returns the path of a file, which is fetched if needed and has the size that the manifest lists.

        Raises:
            StoreError: the manifest does not list the file, or it is missing or has another size.
            HubError: the file cannot be fetched.
        """
        entry = self.listed.get(name)
        if entry is None:
            raise UnreadableError(name, f"of {self} is not listed in manifest.json", WAY_OUT)
        path = self._files.path(name, entry["bytes"])
        if (problem := difference(path, entry["bytes"])) is not None:
            raise UnreadableError(path, f"is missing or damaged (it {problem})", WAY_OUT)
        return path

    def intact(self, name: str) -> AbstractContextManager[Path]:
        """Yields the path of a file for a block that reads it, as `path`, if it has the sha256 that the manifest lists.

        A file of another model's dataset has the same size.
        """
        return self._comparison.intact(self.path(name), self.listed[name]["sha256"], way_out=WAY_OUT)

    def is_intact(self, name: str) -> bool:
        """Whether a file has the sha256 that the manifest lists. The errors are those of `path`."""
        path, expected = self.path(name), self.listed[name]["sha256"]
        try:
            return bool(sha256_of(path) == expected)
        except OSError as error:
            raise UnreadableError(path, f"is missing or damaged ({error.strerror})", WAY_OUT) from error

    def fetch(self, heads: Sequence[HeadKey]) -> None:
        """Fetches the files of several heads in parallel, if the dataset is on the Hub.

        Raises:
            HubError: a file cannot be fetched.
        """
        names = [head_file(*key) for key in heads]
        self._files.fetch({name: self.listed[name]["bytes"] for name in names if name in self.listed})

    @property
    def folder(self) -> Path | None:
        """The folder of the dataset; None for a dataset on the Hub."""
        return self._files.root if isinstance(self._files, Folder) else None

    def beside(self, ending: str) -> Path:
        """Returns a path for results: `<folder>ending`, or `outputs/<branch>ending` for a dataset on the Hub."""
        if isinstance(self._files, Folder):
            root = self._files.root
            # "." and ".." have no last part to append to.
            root = root.resolve() if root.name in ("", "..") else root
            return root.with_name(root.name + ending)
        assert isinstance(self._files, Branch)
        name = self._files.repo_id.rpartition("/")[2] if self._files.name == "main" else self._files.name
        return Path("outputs", safe_name(name) + ending)

    def __str__(self) -> str:
        return str(self._files)
