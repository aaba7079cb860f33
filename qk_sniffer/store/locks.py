"""Holds kernel file locks in the data root: they are released when a job dies, and they name their holder.

A lock protects a folder only as long as its file is at its path. If the folder is removed, moved or replaced while a
job runs, another job can take a lock of the same name there. A job therefore checks its `Lock` before each write. It
reads and writes through the lock, from the folder on that it opened for the lock's file: what it writes just after a
check is at worst in its own folder, which has no path any more.

On Linux these are record locks of the open file description. File systems that serve several machines (NFS, Lustre,
GPFS) treat them as POSIX locks. Unlike those, they are not released when the process closes another descriptor of the
file.
"""

import errno
import fcntl
import json
import os
import re
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qk_sniffer.errors import QkSnifferError, StoreError
from qk_sniffer.store import stored
from qk_sniffer.store.disk import explained
from qk_sniffer.store.open_folder import PLAIN, Access, Anchored, OpenFolder
from qk_sniffer.store.own_files import WAY_OUT
from qk_sniffer.store.stored import Count, Text, UnreadableError

_FLOCK = "hhqqi"
"""C's `struct flock`: type, whence, start, length (0: to the end), pid."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock. `slurm_job_id` is None outside of SLURM."""

    pid: Count
    host: Text
    slurm_job_id: Text | None

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job_id}" if self.slurm_job_id else ""
        return f"process {self.pid} on {self.host}{job}"

    @classmethod
    def me(cls) -> "Holder":
        """Returns this process."""
        return cls(os.getpid(), socket.gethostname(), os.environ.get("SLURM_JOB_ID"))


class InUseError(StoreError):
    """A lock is held already, by another process or by this one."""


class TakenAwayError(StoreError):
    """The folder that a process writes to was removed, moved or replaced. The process writes nothing more there."""


@dataclass(frozen=True)
class Lock(Anchored):
    """A lock that is held, and the way to the files of its folder. `descriptor` is that of the locked file.

    `folders` are the folder of the lock, and the one that contains it unless the former may be a link.
    """

    path: Path
    descriptor: int

    def check(self) -> None:
        """Checks that file and folder at the path are still those of the lock: nothing was removed, moved or replaced.

        Raises:
            TakenAwayError: it is not.
        """
        if not self.is_at_its_path:
            raise TakenAwayError(
                f"{self.path.parent} was removed, moved or replaced while this process used it: {self.path.name} is no "
                "longer the lock that it holds. Nothing more is written there; rerun the command to start over"
            )

    @property
    def is_at_its_path(self) -> bool:
        """Whether the file at the path is still the locked file, in the folder that is open.

        The folder counts too: a copy of it may have the locked file as a hard link.
        """
        try:
            are_there = all(
                os.path.samestat(os.fstat(folder.descriptor), folder.path.stat()) for folder in self.folders
            )
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return False
        return are_there and _is_at(self.descriptor, self.path)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Raises a TakenAwayError for an error of the block if the lock is lost, which explains the error."""
        try:
            yield
        except (QkSnifferError, OSError):
            self.check()
            raise


def restart_patience_s() -> float:
    """Returns how long a job waits for a lock that its previous run may still hold: zero unless SLURM restarted it.

    After a node fails, a file system needs some time to release the locks of the node: NFS 4 90 s, by default.
    """
    return 180.0 if slurm_restarts() else 0.0


def slurm_restarts() -> int:
    """Returns how often SLURM has restarted the job of this process; zero outside of SLURM, and if it is no number."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if re.fullmatch("[0-9]{1,9}", count) else 0


@contextmanager
def hold(
    path: Path,
    purpose: str,
    *,
    wait_s: float = 0.0,
    replace: bool = False,
    of_user: bool = False,
    access: Access = PLAIN,
) -> Iterator[Lock]:
    """Holds the lock `path` within the block. The file exists during the block, and after a crash.

    `purpose` is the activity of a holder in the error: "capturing shard 0 of 1". `wait_s` is how long to try. With
    `replace`, a folder, a link or anything else of that name that is not a lock file is removed first. Creates the
    folder of the lock, but not its parents. `of_user` says that a user named this folder: it may be a link, and a file
    of the lock's name that is no lock stays. In a work folder any file of this name is a lock.
    `access` is the lock that this process holds in the same data root: this one is taken in its open folder. `PLAIN`
    looks up the path.

    Raises:
        InUseError: the lock is held.
        UnreadableError: there is something else of that name.
        StoreError: the file system has no locks, or the folder cannot be written.
        TakenAwayError: the lock of `access` is lost.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with explained(path, "lock"):
                lock = _locked(path, purpose, replace, of_user, access)
            break
        except InUseError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
    _held.add(lock.descriptor)
    try:
        yield lock
    finally:
        with ExitStack() as closing:  # on a disk that fails, too
            for folder in lock.folders:
                closing.callback(folder.close)
            with ExitStack() as releasing:
                releasing.callback(os.close, lock.descriptor)
                releasing.callback(_held.discard, lock.descriptor)
                is_mine = lock.is_at_its_path  # another job may have a lock there
                if is_mine:
                    # Unlinked while it is held: a process that opened it before then finds another file, or none.
                    lock.folders[0].unlink(path.name)
            if is_mine:  # an empty work folder has no meaning
                if of_user:
                    with suppress(OSError):
                        path.parent.rmdir()
                else:
                    lock.folders[1].rmdir(path.parent.name)


def holder(path: Path) -> Holder | None:
    """Returns the process that wrote the lock file last, None without such a file. It may have crashed."""
    try:
        values: Any = stored.read(path, Holder, way_out="")
    except (OSError, StoreError):
        return None
    return Holder(values["pid"], values["host"], values["slurm_job_id"])


def is_held(path: Path) -> bool:
    """Whether a process holds the lock at this moment. Needs no write permission and changes nothing."""
    try:
        with PLAIN.open(path.parent) as folder:
            descriptor = os.open(path.name, os.O_RDONLY | _SAFELY, dir_fd=folder.descriptor)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return False
        if sys.platform == "linux":
            query = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return bool(struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, query))[0] != fcntl.F_UNLCK)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Opens no link, and does not wait for the other end of a pipe."""


def _locked(path: Path, purpose: str, replace: bool, of_user: bool, access: Access) -> Lock:
    while True:
        access.check()  # also in each further attempt: only the lock of `access` tells that the folder has moved
        if access is PLAIN:
            path.parent.mkdir(exist_ok=True)
        with ExitStack() as opened:
            try:
                found = (
                    OpenFolder.at(path.parent, follow_links=of_user) if access is PLAIN else access.open(path.parent)
                )
                folder = opened.enter_context(found)
                folders = [folder] if of_user else [folder, opened.enter_context(folder.parent())]
                descriptor = _lock_file(folder, path, purpose, replace, of_user)
            except FileNotFoundError:  # another job removed the folder at its end
                continue
            if descriptor is not None:
                opened.pop_all()
                return Lock(folders, path, descriptor)


def _lock_file(folder: OpenFolder, path: Path, purpose: str, replace: bool, of_user: bool) -> int | None:
    """Locks the file of `path` in its open folder. Returns its descriptor; None if the file is not at the path now.

    Raises:
        FileNotFoundError: the folder was removed.
        UnreadableError: something of someone else has this name.
    """
    try:
        descriptor = os.open(path.name, os.O_RDWR | os.O_CREAT | _SAFELY, 0o666, dir_fd=folder.descriptor)
    except OSError:
        kind = folder.type_of(path.name)
        if kind in (None, "file"):
            raise
        _clear(folder, path, replace, f"is a {kind}, not a lock file")
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        _clear(folder, path, replace, "is not a lock file")
        return None
    try:
        _lock(descriptor)
        if of_user and not _LOCK_FILE.match(os.pread(descriptor, 1 << 13, 0)):
            raise UnreadableError(path, "is not a lock file of qk-sniffer, and is not replaced", WAY_OUT)
        if _is_at(descriptor, path) and os.fstat(descriptor).st_nlink > 1:
            # A hard link: of a copy of the folder, or of a file of the user. The next attempt makes a file of its own.
            folder.unlink(path.name)
        elif _is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(Holder.me())).encode(), 0)
            return descriptor
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise _in_use(path, purpose, of_user) from None
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)  # the locked file was just unlinked, by its holder or here
    return None


_LOCK_FILE = re.compile(rb"\0*\Z|\{\"pid\": [0-9]")
"""The start of a lock file, which is empty or filled with zeros if its holder or machine died just then."""


def _in_use(path: Path, purpose: str, of_user: bool) -> InUseError:
    # The folder of a user has the lock itself, and a data root has it in its work folder.
    folder, rule = (
        (path.parent, "Two programs cannot write one folder: choose another one,")
        if of_user
        else (path.parent.parent, "Two jobs cannot write one data root:")
    )
    return InUseError(
        f"{folder} is in use: {holder(path) or 'another process'} is {purpose}. {rule} wait for that one or end it "
        f"(lock: {path})"
    )


def _clear(folder: OpenFolder, path: Path, replace: bool, problem: str) -> None:
    if not replace:
        raise UnreadableError(path, problem, "remove it; in a data root, output.overwrite=true does so")
    folder.remove(path.name)


def _lock(descriptor: int) -> None:
    if sys.platform == "linux":
        whole_file = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole_file)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise


_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
"""The errors for a path that leads to nothing by now. The last one is of NFS: another machine has removed the file."""


_held: set[int] = set()


def _forget_in_child() -> None:
    # A forked child shares its parent's locks, and would hold them after the parent's death.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_in_child)
