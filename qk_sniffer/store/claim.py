"""Checks that a job still owns the data root that it writes to.

A data root may be removed, moved or replaced while a job runs, and another job may start at the same path. Every step
of the first job would then change the work of the second one, because all of them name files by their path. A job
therefore checks its claim before each step: the lock that it holds is still at its path, and `job.json` is still its
record. A check costs a few lookups of a file's attributes. What the job writes after a check is in the folders that it
opened with its lock, whatever is at their paths by then.
"""

from dataclasses import dataclass, field
from pathlib import Path

from qk_sniffer.errors import StoreError
from qk_sniffer.store.layout import Layout
from qk_sniffer.store.locks import Lock, TakenAwayError
from qk_sniffer.store.open_folder import Access, OpenFolder
from qk_sniffer.store.record import stored_job_id


@dataclass
class Claim(Access):
    """The right of the job `job_id` to write to the data root at `layout`, as the holder of `lock`. Thread-safe."""

    lock: Lock
    layout: Layout
    job_id: str
    _seen: tuple[int, ...] = field(default=(), init=False, repr=False)

    def check(self) -> None:
        """Checks that the lock and the record of the job are still in place.

        Raises:
            TakenAwayError: they are not. Nothing in the data root is this job's.
        """
        self.lock.check()
        file = self.layout.job_file
        try:
            with self.open(file.parent) as folder:
                facts = folder.lstat(file.name)
            # A record is never changed in place: each write makes another file.
            seen = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if seen == self._seen:
                return
            is_mine = stored_job_id(self.layout, self) == self.job_id
        except (FileNotFoundError, NotADirectoryError, StoreError):
            is_mine = False
        if not is_mine:
            raise TakenAwayError(
                f"{self.layout.root} no longer holds this job: {file} is missing, or the record of another job. "
                "Nothing more is written there; rerun the command to start over"
            )
        self._seen = seen

    def open(self, folder: Path, *, create: bool = False) -> OpenFolder:
        return self.lock.open(folder, create=create)
