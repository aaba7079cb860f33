"""Tells whether the dataset in a folder is the same one from the first file that a report reads to the last."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import inside, reading, state_of


class Unchanged:
    """The files of a dataset as they are now, by what the file system says of them: none of them is read.

    A copy that runs while a report is made replaces them one by one, the manifest before or after the vectors, and a
    file of another dataset may have the same size. So the manifest alone does not tell. The files of a dataset on the
    Hub are those of one commit.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._root, self._manifest = dataset.folder, dataset.manifest
        names = [] if self._root is None else self._manifest["files"]
        self._states = {name: self._state(name) for name in names}

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Checks a file in a block that reads it: the one that is opened, and the one that is there afterwards.

        Raises:
            StoreError: it was replaced or written since.
        """
        state = self._states.get(name)
        with nullcontext() if state is None or self._root is None else reading(inside(self._root, name), state):
            yield
        self.check(name)

    def check(self, name: str) -> None:
        """Checks a file after a read of it.

        Raises:
            StoreError: it was replaced or written since.
        """
        if self._root is not None and self._state(name) != self._states[name]:
            raise StoreError(
                f"{name} of the dataset in {self._root} was replaced or written meanwhile: make the report again"
            )

    def check_all(self) -> None:
        """Checks all files, and that the manifest in the folder is the one of the dataset.

        Raises:
            StoreError: one of them was replaced or written, or the manifest is another one.
        """
        if self._root is None:
            return
        if manifests.read(self._root) != self._manifest:
            raise StoreError(f"another dataset has replaced the one in {self._root} meanwhile: make the report again")
        for name in self._states:
            self.check(name)

    def _state(self, name: str) -> tuple[int, ...] | None:
        assert self._root is not None
        path: Path = inside(self._root, name)
        with suppress(OSError):  # a missing file is an error where it is read
            return state_of(path)
        return None
