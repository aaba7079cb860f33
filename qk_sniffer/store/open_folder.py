"""Opens folders by descriptor, so that files are found in the folder that was opened and nowhere else.

A path is looked up again at every use, and someone may have put a link or another folder in its place meanwhile. A
descriptor stays that of one folder. Names are looked up in an open folder one at a time, and no link is followed. A
process that works below a folder gets an `Access` to it, which names files by their paths and finds them this way.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

Check = Callable[[], None]
"""Raises an error if the folder that a process writes to is no longer its own. Called before each step."""


WORK = ".qk_sniffer"
"""The name of the work folder of a data root, which no program follows if it is a link."""


def unchecked() -> None:
    """Is the check of a folder that no lock protects."""


class OddFileError(OSError):
    """`filename` is a link that is not followed, or something other than a regular file; `strerror` says which."""


class OpenFolder:
    """An open folder; a context manager. `path` is its name in errors. Names are those of its entries, without a slash.

    Every method raises an OSError if the file system fails, and an OddFileError for a link.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def at(cls, path: Path, *, follow_links: bool = True) -> "OpenFolder":
        """Opens the folder at `path`. Links to its parents are followed; `follow_links` is about its own name."""
        try:
            return cls(path, os.open(path, _FOLDER | (0 if follow_links else os.O_NOFOLLOW)))
        except OSError as error:
            if not follow_links and path.is_symlink():
                raise _link(path) from error
            raise

    def folder(self, name: str, *, create: bool = False) -> "OpenFolder":
        """Opens a folder in this one. `create` makes a missing one, durably."""
        if create:
            with suppress(FileExistsError):
                os.mkdir(self._named(name), dir_fd=self.descriptor)
                self.sync()
        try:
            return OpenFolder(self.path / name, self._opened(name, _FOLDER))
        except OSError as error:
            raise self._explained(error, name) from error

    def new_folder(self, name: str) -> "OpenFolder":
        """Makes a folder in this one, and opens it. Raises a FileExistsError if something has this name."""
        os.mkdir(self._named(name), dir_fd=self.descriptor)
        return self.folder(name)

    def again(self) -> "OpenFolder":
        """Opens this folder a second time. Unlike a copy of the descriptor, it lists its names on its own."""
        return OpenFolder(self.path, os.open(".", _FOLDER, dir_fd=self.descriptor))

    def parent(self) -> "OpenFolder":
        """Opens the folder that contains this one, wherever it is by now."""
        return OpenFolder(self.path.parent, os.open("..", _FOLDER, dir_fd=self.descriptor))

    def open(self, name: str) -> BufferedReader:
        """Opens a regular file for reading. Does not wait for the writer of a pipe, and opens no device."""
        try:
            descriptor = self._opened(name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise self._explained(error, name) from error
        return regular(descriptor, self.path / name)

    def create(self, name: str) -> BinaryIO:
        """Opens a new file for writing and reading. Replaces a file or a link of this name, and not its target."""
        self.unlink(name)
        descriptor = self._opened(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        return os.fdopen(descriptor, "w+b")

    @contextmanager
    def temporary(self, name: str) -> Iterator[BinaryIO]:
        """Creates a file for a block that writes and renames it. An error removes the file if its name is still its."""
        with self.create(name) as file:
            try:
                yield file
            except BaseException:
                with suppress(OSError):
                    if os.path.samestat(os.fstat(file.fileno()), self.lstat(name)):
                        self.unlink(name)
                raise

    def rename(self, name: str, target: "OpenFolder", new_name: str) -> None:
        """Moves an entry to another folder or name. Replaces a file or a link of that name."""
        os.rename(self._named(name), self._named(new_name), src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)

    def rename_to_free(self, name: str, new_name: str) -> None:
        """Renames a file of this folder. Replaces nothing, where the disk has hard links.

        Raises:
            FileExistsError: something has the new name.
        """
        try:
            os.link(
                self._named(name),
                self._named(new_name),
                src_dir_fd=self.descriptor,
                dst_dir_fd=self.descriptor,
                follow_symlinks=False,
            )
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            if self.type_of(new_name) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path / new_name)) from None
            self.rename(name, self, new_name)
        else:
            self.unlink(name)

    def unlink(self, name: str) -> None:
        """Removes a file or a link, if there is one."""
        with suppress(FileNotFoundError):
            os.unlink(self._named(name), dir_fd=self.descriptor)

    def rmdir(self, name: str) -> None:
        """Removes a folder if it is empty."""
        with suppress(OSError):
            os.rmdir(self._named(name), dir_fd=self.descriptor)

    def remove(self, name: str, check: Check = unchecked) -> None:
        """Removes an entry, if there is one: a folder with its content, or a link and not its target.

        `check` is called when a folder is open: what is removed from then on is of the folder that was there during the
        check, although another one may take its place.
        """
        if self.type_of(name) != "folder":
            self.unlink(name)
            return
        with self.folder(name) as folder:
            check()
            while names := folder.names():
                for each in names:
                    _remove_entry(each, folder)
        os.rmdir(self._named(name), dir_fd=self.descriptor)

    def names(self) -> list[str]:
        """Returns the names of the entries, sorted."""
        with os.scandir(self.descriptor) as entries:
            return sorted(entry.name for entry in entries)

    def lstat(self, name: str) -> os.stat_result:
        """Returns the attributes of an entry, those of a link for a link."""
        return os.stat(self._named(name), dir_fd=self.descriptor, follow_symlinks=False)

    def type_of(self, name: str) -> str | None:
        """Returns what an entry is: "file", "folder", "link" or "special file"; None: nothing."""
        try:
            return _TYPES.get(stat.S_IFMT(self.lstat(name).st_mode), "special file")
        except FileNotFoundError:
            return None

    def sync(self) -> None:
        """Returns when the names of the entries are on the disk."""
        os.fsync(self.descriptor)

    @property
    def descriptor(self) -> int:
        if self._descriptor is None:  # its number may be that of another file by now
            raise ValueError(f"{self.path} is closed")
        return self._descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self, name: str, flags: int) -> int:
        return os.open(self._named(name), flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=self.descriptor)

    @staticmethod
    def _named(name: str) -> str:
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is not the name of an entry of a folder")
        return name

    def _explained(self, error: OSError, name: str) -> OSError:
        """Names the link that was not followed: its error differs between systems, and between files and folders."""
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and self.type_of(name) == "link":
            return _link(self.path / name)
        error.filename = str(self.path / name)
        return error


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


def regular(descriptor: int, path: Path) -> BufferedReader:
    """Returns the file of a descriptor that was opened for reading, and closes it if it is not a regular file.

    Raises:
        OddFileError: it is not.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OddFileError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


def _link(path: Path) -> OddFileError:
    return OddFileError(errno.ELOOP, "a link, which is not followed", str(path))


def _remove_entry(name: str, folder: OpenFolder) -> None:
    """Removes an entry of a folder; of a folder that contains folders, these become entries first.

    The depth is therefore not limited by the recursion of Python, the number of open files or the length of paths.
    """
    if folder.type_of(name) != "folder":
        folder.unlink(name)
        return
    with folder.folder(name) as inner:
        for each in inner.names():
            if inner.type_of(each) == "folder":
                inner.rename(each, folder, f".removed-{secrets.token_hex(8)}")
            else:
                inner.unlink(each)
    os.rmdir(name, dir_fd=folder.descriptor)


class Access:
    """The way of a process to files that it names by their paths. This one is of files that no lock protects.

    It looks up the whole path of a folder, and follows links to it, but for a work folder and what is in it.
    """

    def check(self) -> None:
        """Raises an error if the files are no longer the process's own. Called before each step."""

    def open(self, folder: Path, *, create: bool = False) -> OpenFolder:
        """Opens a folder. `create` makes it and its missing parents, durably.

        Raises:
            OddFileError: a link is in the way, from a work folder on.
        """
        if WORK in folder.parts:
            root = folder.parents[folder.parts[::-1].index(WORK)]
            with self.open(root, create=create) as found:
                return Anchored((found,)).open(folder, create=create)
        if create:
            missing = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for each in missing:
                with OpenFolder.at(each.parent) as parent:
                    parent.sync()
        return OpenFolder.at(folder)


PLAIN = Access()


@dataclass(frozen=True)
class Anchored(Access):
    """Finds files from open folders on: from the first one whose path a path begins with.

    Attributes:
        folders: the open folders, the inner ones first.
    """

    folders: Sequence[OpenFolder]

    def open(self, folder: Path, *, create: bool = False) -> OpenFolder:
        """Opens a folder below one of the open folders, or one of these a second time.

        Raises:
            OddFileError: a link is in the way.
        """
        for start in self.folders:
            if folder.is_relative_to(start.path):
                found = start.again()
                for name in folder.relative_to(start.path).parts:
                    with found:
                        found = found.folder(name, create=create)
                return found
        raise ValueError(f"{folder} is not in {self.folders[-1].path}")


@dataclass(frozen=True)
class Checked(Access):
    """An access with one more check."""

    access: Access
    also: Check

    def check(self) -> None:
        self.access.check()
        self.also()

    def open(self, folder: Path, *, create: bool = False) -> OpenFolder:
        return self.access.open(folder, create=create)


@contextmanager
def anchored(root: Path) -> Iterator[Access]:
    """Opens `root` for a block that finds everything below it from there on. The root itself may be a link."""
    with OpenFolder.at(root) as folder:
        yield Anchored((folder,))
