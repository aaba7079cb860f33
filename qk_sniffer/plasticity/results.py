"""Keeps the folder of results, which makes a run resumable: each head's result is a file until the tables are written.

<output_dir>/head_metrics.csv, .parquet             and the other tables (`tables.py`)
<output_dir>/plasticity.json                        dataset, settings and notes; written last
<output_dir>/pictures/*.png, *.svg, *.pdf
<output_dir>/.work/                                 removed when all heads are measured
    job.json                                        the fingerprint that the files next to it belong to
    l00h00q.json                                    the result of a head, with the fingerprint
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.dataset.reader import Dataset
from qk_sniffer.drawing.style import PAPER_SUFFIXES
from qk_sniffer.errors import StoreError
from qk_sniffer.logs import logger
from qk_sniffer.plasticity import tables
from qk_sniffer.plasticity.config import PlasticityConfig, measures
from qk_sniffer.plasticity.forms import (
    FORMAT,
    IS_RECORD,
    WAY_OUT,
    encode_head,
    is_of_another_version,
    read_head,
    read_record,
)
from qk_sniffer.plasticity.notes import is_note
from qk_sniffer.plasticity.owed_notes import are_all_there
from qk_sniffer.plasticity.tables import HeadResult
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store import stored
from qk_sniffer.store.disk import explained, make_folder, paths_in, sha256_of, write_atomic
from qk_sniffer.store.files import Comparison
from qk_sniffer.store.layout import head_name, parse_head_name
from qk_sniffer.store.open_folder import PLAIN, Access, OpenFolder
from qk_sniffer.store.output_folder import claimed_folder
from qk_sniffer.store.own_files import refuse_foreign, starts_with
from qk_sniffer.store.places import is_drawn
from qk_sniffer.store.stored import UnreadableError

log = logger(__name__)

_JOB = "job.json"


class Results:
    """The results at `folder`. Does not touch the folder before `claim`."""

    def __init__(self, folder: Path, *, is_default: bool = False) -> None:
        """`is_default` says that the user has not named the folder: then it may not be a link."""
        self.folder = folder
        self._is_default = is_default
        self.record_file = folder / "plasticity.json"
        self.pictures = folder / "pictures"
        self._work = folder / ".work"
        self.access: Access = PLAIN
        self._fingerprint: str | None = None

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Creates the folder, and holds its lock within the block. What is written there is checked against the lock.

        Raises:
            StoreError: the folder has files, but none with content of results; a file of someone else has the name of
                one of results; it cannot be written; or another process holds the lock.
            TakenAwayError: the folder is removed, moved or replaced during the block. Nothing more is written there.
        """
        for path in (self._work, self.pictures):
            if path.is_symlink():
                raise StoreError(f"{path} is a link, and results are not written through it: remove the link")
        with claimed_folder(
            self.folder, "measuring plasticity", is_own=self._is_of_results, is_default=self._is_default
        ) as lock:
            self.access = lock
            self._refuse_foreign()
            yield

    def _refuse_foreign(self) -> None:
        """Checks that what this start may replace is of this package: now, and not after hours.

        Raises:
            StoreError: names what is not.
        """
        with explained(self.folder, "read"), self.access.open(self.folder) as folder:
            for name, is_own in {self.record_file.name: IS_RECORD, **tables.IS_OWN}.items():
                refuse_foreign(folder, name, is_own)
            if folder.type_of(self._work.name) == "folder":
                with folder.folder(self._work.name) as work:
                    names = [name for name in work.names() if _is_of_job(name) and name != f"{_JOB}.tmp"]
                    if names and not _is_own_work(work):
                        raise StoreError(f"{self._work / names[0]} was not written by qk-sniffer, {_KEPT}")

    def _is_of_results(self, names: list[str]) -> bool:
        """Whether a file in the folder has content of results. Other programs may use the names of these files."""
        if names == [self._work.name] and {path.name for path in paths_in(self._work)} <= {f"{_JOB}.tmp"}:
            return True  # of a start that was killed at once
        of_results = {self.record_file.name: IS_RECORD, "head_metrics.parquet": tables.IS_OWN["head_metrics.parquet"]}
        with OpenFolder.at(self.folder) as folder:
            if any(folder.type_of(name) == "file" and is_own(folder, name) for name, is_own in of_results.items()):
                return True
            if folder.type_of(self._work.name) != "folder":
                return False
            with folder.folder(self._work.name) as work:
                return _is_own_work(work)

    def check(self) -> None:
        """Checks that the folder is still this process's.

        Raises:
            TakenAwayError: it is not.
        """
        self.access.check()

    def is_finished(self, fingerprint: str, facts: Mapping[str, Any], notes: Mapping[str, list[str]]) -> bool:
        """Whether the results of this fingerprint are complete; pictures do not count.

        `facts` is what the record has to say of the dataset, and of heads without keys, and `notes` are those on the
        whole dataset. The record may come from someone else, or from a version with other notes. Whether the numbers
        of the tables are right cannot be checked without measuring.
        """
        try:
            record = self.record()
            if record["fingerprint"] != fingerprint or record["damaged"]:
                return False
            if any(_without_place(record[key]) != _without_place(facts[key]) for key in facts):
                return False
            found = {name: self.table(name, record) for name in tables.TABLES}
            metrics = found["head_metrics"]
            keys = zip(metrics["layer"].tolist(), metrics["q_head"].tolist(), strict=True)
            heads = {head_name(layer, head, "q") for layer, head in keys}
            if not _are_notes(record["notes"], notes, heads):
                return False
            if not are_all_there(record["notes"], found, record["settings"]):
                return False
        except StoreError:
            return False
        files = {self.folder / name: digest for name, digest in record["tables"].items()}
        return all(path.is_file() and sha256_of(path) == digest for path, digest in files.items())

    def record(self) -> dict[str, Any]:
        """The content of `plasticity.json`.

        Raises:
            StoreError: the file is missing, so the results are not finished; it is not of qk-sniffer; or its
                fingerprint is not that of the settings and the dataset that it names.
        """
        try:
            record = read_record(self.record_file)
            if record["fingerprint"] != _fingerprint(
                record["dataset"]["manifest_sha256"], measures(record["settings"])
            ):
                problem = "contradicts itself (its fingerprint is of other settings or of another dataset)"
                raise UnreadableError(self.record_file, problem, WAY_OUT)
            return record
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{self.folder} has no finished results: no {self.record_file.name}. Make them by "
                "python -m qk_sniffer.plasticity data_root=... output_dir=..."
            ) from None

    def table(self, name: str, record: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The columns of a table of the finished results of `record`, which another start may replace meanwhile.

        Raises:
            StoreError: the table is missing or damaged, or is not the one of the record.
        """
        path = self.folder / f"{name}.parquet"
        comparison, listed = Comparison(), record["tables"][path.name]
        with suppress(OSError):  # reading it tells the reason
            if not comparison.matches(path, listed):
                raise UnreadableError(path, f"is not the table that {self.record_file.name} lists", tables.WAY_OUT)
        with comparison.intact(path, listed, way_out=tables.WAY_OUT):
            columns = tables.read(self.folder, name)
        if name == "head_metrics" and (facts := summary(columns["ap_overall"])) != {key: record[key] for key in facts}:
            problem = f"contradicts {path.name} (number of heads, or mean plasticity)"
            raise UnreadableError(self.record_file, problem, WAY_OUT)
        return columns

    def refuse_other(self, fingerprint: str, config: PlasticityConfig, dataset: Dataset) -> None:
        """Refuses to replace results of another fingerprint, finished or not; all arguments are the new ones.

        Raises:
            StoreError: lists the settings that differ, as far as the old ones are known, and the way out.
        """
        if self._known() in (None, fingerprint):
            return
        lines = []
        with suppress(StoreError):
            record = self.record()
            there, now = _flat(record["settings"]), _flat(config.measures())
            lines = [
                f"  - {key}: {json.dumps(there.get(key))} there, {json.dumps(value)} now"
                for key, value in now.items()
                if there.get(key) != value
            ]
            source = record["dataset"]
            if source["manifest_sha256"] != manifest_sha256(dataset):
                name = source.get("name")
                is_same = name == str(dataset)
                lines.append("  - the dataset has changed" if is_same else f"  - they are of the dataset {name}")
        raise StoreError(
            f"{self.folder} holds results of other settings, of another dataset or of another version:",
            *lines,
            "Give the new results another folder (output_dir=...), go back to the old values, or replace the old "
            "results with overwrite=true.",
        )

    def _known(self) -> str | None:
        """Returns the fingerprint of the results in the folder; an empty one of another version, and None of none."""
        if (known := _text(self._work / _JOB)) is not None:
            return known
        try:
            return str(self.record()["fingerprint"])
        except StoreError:  # there is no record, or an unreadable one, which is replaced
            return "" if is_of_another_version(self.record_file) else None

    def begin(self, fingerprint: str) -> None:
        """Keeps the results of earlier starts with this fingerprint. Discards those of another one, with a warning."""
        job = self._work / _JOB
        stored_before = _text(job)
        if self._known() not in (None, fingerprint):
            log.warning("%s has results of other settings or of another dataset: they are replaced", self.folder)
        self.check()
        self._fingerprint = fingerprint
        if stored_before != fingerprint:
            with explained(self.folder, "replace the results in"):
                # The job's file stays until it is replaced: a start that is killed here leaves a folder of results.
                self._clear(but={_JOB})
                self.remove_pictures(lambda name: name.endswith(PAPER_SUFFIXES))  # of the replaced results
                make_folder(self._work, self.access)
            write_atomic(job, fingerprint.encode(), access=self.access)

    def load(self, layer: int, q_head: int) -> HeadResult | None:
        """The result of a head from an earlier start; None if there is none of this fingerprint."""
        return read_head(self._file(layer, q_head), layer, q_head, str(self._fingerprint))

    def save(self, result: HeadResult) -> None:
        """Stores the result of a head durably, NaN and all digits included."""
        data = encode_head(result, str(self._fingerprint))
        write_atomic(self._file(result.layer, result.q_head), data, access=self.access)

    def finish(self, results: list[HeadResult], record: dict[str, Any]) -> list[Path]:
        """Writes the tables, and `record` last; returns the tables' files."""
        with explained(self.record_file, "replace"), self.access.open(self.folder) as folder:
            refuse_foreign(folder, self.record_file.name, IS_RECORD)
            self.check()
            folder.unlink(self.record_file.name)
        files = tables.write(self.folder, results, record["dataset"]["limited_layers"], access=self.access)
        record = {"format": FORMAT, "tables": {path.name: sha256_of(path) for path in files}} | record
        data = json.dumps(record, indent=2, sort_keys=True).encode()
        write_atomic(self.record_file, data, access=self.access, is_own=IS_RECORD)
        if not record["damaged"]:
            self._clear()
        return files

    def remove_pictures(self, is_chosen: Callable[[str], bool]) -> None:
        """Removes the pictures whose file names are chosen, if this package has drawn them.

        Raises:
            StoreError: they cannot be removed.
            TakenAwayError: the folder is no longer this process's.
        """
        self.check()
        with (
            explained(self.pictures, "replace"),
            suppress(FileNotFoundError),
            self.access.open(self.pictures) as folder,
        ):
            for name in [name for name in folder.names() if is_chosen(name) and is_drawn(folder, name)]:
                folder.unlink(name)

    def _file(self, layer: int, q_head: int) -> Path:
        return self._work / f"{head_name(layer, q_head, 'q')}.json"

    def _clear(self, but: Collection[str] = ()) -> None:
        """Removes the files of a job, and their folder if it is empty then."""
        self.check()
        with explained(self._work, "remove"), suppress(FileNotFoundError), self.access.open(self.folder) as folder:
            with folder.folder(self._work.name) as work:
                self.check()
                # The job's file goes last: without it, no later start knows the others as its own.
                for name in sorted(filter(_is_of_job, work.names()), key=_JOB.__eq__):
                    if name not in but:
                        work.remove(name, self.check)
            folder.rmdir(self._work.name)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by their keys on a command line."""
    return {key: value for key, value in settings.items() if key != "estimator"} | {
        f"estimator.{key}": value for key, value in settings["estimator"].items()
    }


def _is_of_job(name: str) -> bool:
    name = name.removesuffix(".tmp")
    return name == _JOB or (name.endswith(".json") and parse_head_name(name.removesuffix(".json")) is not None)


def summary(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Returns what the record says of the plasticity of the heads (heads,), NaN for a head without one."""
    finite = np.isfinite(values)
    mean = float(np.nanmean(values)) if finite.any() else None
    return {"heads": len(values), "heads_with_plasticity": int(finite.sum()), "mean_ap_overall": mean}


def _without_place(facts: Any) -> Any:
    """Leaves out where a dataset was read: it may have moved since."""
    return {key: facts[key] for key in facts if key not in ("name", "commit")} if isinstance(facts, dict) else facts


def _are_notes(found: Mapping[str, list[str]], of_dataset: Mapping[str, list[str]], heads: Collection[str]) -> bool:
    """Whether the notes of a record are those on the dataset, and other notes on some of the heads."""
    of_heads = {note: found[note] for note in found if is_note(note)}
    return found == {**of_heads, **of_dataset} and all({*named} <= {*heads} for named in of_heads.values())


def _is_own_work(work: OpenFolder) -> bool:
    """Whether the file of a job in an open folder of work is of this package."""
    return work.type_of(_JOB) == "file" and _IS_JOB(work, _JOB)


_IS_JOB = starts_with(rb"[0-9a-f]{64}\Z")

_KEPT = "and is not replaced: move it away, or choose another output_dir"


def _text(path: Path) -> str | None:
    """Returns the text of a short file; None if there is none that can be read."""
    try:
        return stored.read_bytes(path, way_out="").decode("ascii", "replace")
    except (OSError, StoreError):
        return None


def fingerprint(dataset: Dataset, config: PlasticityConfig) -> str:
    """A digest of everything that decides the numbers: settings, dataset, and the measures."""
    return _fingerprint(manifest_sha256(dataset), config.measures())


def _fingerprint(manifest: str, settings: Mapping[str, Any]) -> str:
    words = {"format": FORMAT, "manifest": manifest, "settings": settings}
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def manifest_sha256(dataset: Dataset) -> str:
    """The digest of the dataset's manifest, which holds the checksum of every file."""
    return hashlib.sha256(manifests.encode(dataset.manifest)).hexdigest()
