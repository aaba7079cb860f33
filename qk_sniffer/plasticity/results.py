"""Keeps the folder of results, which makes a run resumable: each head's result is a file until the tables are written.

<output_dir>/head_metrics.csv, .parquet             and the other two tables (`tables.py`)
<output_dir>/plasticity.json                        dataset, settings and notes; written last
<output_dir>/pictures/*.png
<output_dir>/.work/                                 removed when all heads are measured
    job.json                                        the fingerprint that the files next to it belong to
    l00h00q.json                                    the result of a head, with the fingerprint
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.config import PlasticityConfig
from qk_sniffer.plasticity.tables import HeadResult
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.disk import Check, make_folder, sha256_of, unchecked, write_atomic
from qk_sniffer.store.layout import MANIFEST, head_name
from qk_sniffer.store.locks import hold
from qk_sniffer.text import shortened

log = logger(__name__)

FORMAT = "qk-sniffer-plasticity/1"
"""The format of `plasticity.json`. Every change to the measures raises its number: results are then recomputed."""


class Results:
    """The results at `folder`. Does not touch the folder before `claim`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record_file = folder / "plasticity.json"
        self.pictures = folder / "pictures"
        self._work = folder / ".work"
        self._lock_file = folder / ".lock"
        self._check: Check = unchecked
        self._fingerprint: str | None = None

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Creates the folder, and holds its lock within the block. What is written there is checked against the lock.

        Raises:
            StoreError: the folder holds something else, cannot be written, or another process holds the lock.
            TakenAwayError: the folder is removed, moved or replaced during the block. Nothing more is written there.
        """
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        found = sorted(path.name for path in paths if path != self._lock_file)
        if (found and not self.record_file.exists() and not self._work.exists()) or MANIFEST in found:
            raise StoreError(f"{self.folder} holds something else ({shortened(found, 5)}); choose another output_dir")
        try:
            make_folder(self.folder)
        except OSError as error:
            raise StoreError(f"cannot write to {self.folder}: {error.strerror}; choose another output_dir") from error
        with hold(self._lock_file, "measuring plasticity") as lock, lock.explaining():
            self._check = lock.check
            yield

    def check(self) -> None:
        """Checks that the folder is still this process's.

        Raises:
            TakenAwayError: it is not.
        """
        self._check()

    def is_finished(self, fingerprint: str) -> bool:
        """Whether the results of this fingerprint are complete; pictures do not count."""
        try:
            record = self.record()
        except StoreError:
            return False
        if record["fingerprint"] != fingerprint or record["damaged"]:
            return False
        files = {self.folder / name: digest for name, digest in record["tables"].items()}
        return all(path.is_file() and sha256_of(path) == digest for path, digest in files.items())

    def record(self) -> dict[str, Any]:
        """The content of `plasticity.json`.

        Raises:
            StoreError: the file is missing, so the results are not finished, or it is not of qk-sniffer.
        """
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{self.folder} has no finished results: no {self.record_file.name}. Make them by "
                "python -m qk_sniffer.plasticity data_root=... output_dir=..."
            ) from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.record_file} cannot be read: {error}. Delete it and rerun the command") from error
        if not isinstance(record, dict) or "fingerprint" not in record:
            raise StoreError(f"{self.record_file} is not of qk-sniffer; choose another output_dir")
        return record

    def begin(self, fingerprint: str) -> None:
        """Keeps the results of earlier starts with this fingerprint. Discards those of another one, with a warning."""
        job = self._work / "job.json"
        known = job.read_text(encoding="utf-8") if job.exists() else None
        if known is None and self.record_file.exists():
            with suppress(StoreError):  # an unreadable record is replaced
                known = self.record()["fingerprint"]
        if known not in (None, fingerprint):
            log.warning("%s has results of other settings or of another dataset: they are replaced", self.folder)
        self.check()
        self._fingerprint = fingerprint
        if not job.exists() or known != fingerprint:
            self._clear()
            for path in self.pictures.glob("*.png"):  # of the replaced results
                path.unlink()
            make_folder(self._work)
            write_atomic(job, fingerprint.encode(), check=self.check)

    def load(self, layer: int, q_head: int) -> HeadResult | None:
        """The result of a head from an earlier start; None if there is none of this fingerprint."""
        try:
            values = json.loads(self._file(layer, q_head).read_bytes())
        except (FileNotFoundError, ValueError):  # none, or a part that a full or failing disk left
            return None
        if values.pop("fingerprint", None) != self._fingerprint:
            return None
        return HeadResult(**values | {"buckets": [tuple(row) for row in values["buckets"]]})

    def save(self, result: HeadResult) -> None:
        """Stores the result of a head durably, NaN and all digits included."""
        values = {"fingerprint": self._fingerprint} | result.to_dict()
        write_atomic(self._file(result.layer, result.q_head), json.dumps(values).encode(), check=self.check)

    def finish(self, results: list[HeadResult], record: dict[str, Any]) -> list[Path]:
        """Writes the tables, and `record` last; returns the tables' files."""
        self.check()
        self.record_file.unlink(missing_ok=True)
        files = tables.write(self.folder, results, check=self.check)
        record = {"format": FORMAT, "tables": {path.name: sha256_of(path) for path in files}} | record
        write_atomic(self.record_file, json.dumps(record, indent=2, sort_keys=True).encode(), check=self.check)
        if not record["damaged"]:
            self.check()
            self._clear()
        return files

    def _file(self, layer: int, q_head: int) -> Path:
        return self._work / f"{head_name(layer, q_head, 'q')}.json"

    def _clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)


def fingerprint(dataset: Dataset, config: PlasticityConfig) -> str:
    """A digest of everything that decides the numbers: settings, dataset, and the measures."""
    words = {
        "format": FORMAT,
        "manifest": manifest_sha256(dataset),
        "settings": config.measures(),
    }
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def manifest_sha256(dataset: Dataset) -> str:
    """The digest of the dataset's manifest, which holds the checksum of every file."""
    return hashlib.sha256(manifests.encode(dataset.manifest)).hexdigest()
