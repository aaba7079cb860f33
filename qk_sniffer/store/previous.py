"""Reads the finished dataset that a job adds to. Its rows come first in the next version, unchanged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa

from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Comparison, Files, difference
from qk_sniffer.store.journal import ExampleRecord
from qk_sniffer.store.layout import EXAMPLES, MANIFEST, is_statistics_file, statistics_file
from qk_sniffer.store.parquet_tables import excess, opened, read_examples, too_large
from qk_sniffer.store.statistics import PartKey, Statistics
from qk_sniffer.store.statistics_file import read_statistics
from qk_sniffer.store.stored import UnreadableError

WAY_OUT = "restore the file, or recreate the dataset with output.overwrite=true"

RECORD_BYTES = 450
"""The memory of an `ExampleRecord`, without the characters of its texts, which have 60 bytes in all in a usual one."""

_RECORDS_AT_A_TIME = 1 << 16
"""The examples whose columns are lists of Python at the same time."""


@dataclass(frozen=True)
class PreviousVersion:
    """The dataset in `files`. `record` describes it at the start of the job that adds to it: see `describe`."""

    files: Files
    record: Mapping[str, Any]
    _comparison: Comparison = field(default_factory=Comparison, init=False, repr=False, compare=False)

    @property
    def is_there(self) -> bool:
        """Whether the dataset still has the recorded manifest."""
        return self._found(MANIFEST, self.record["manifest_sha256"], None) is not None

    def check(self) -> None:
        """Checks that the dataset is the recorded one.

        Raises:
            StoreError: it is another one.
        """
        if not self.is_there:
            raise self._replaced()

    def _replaced(self) -> StoreError:
        return StoreError(
            f"{self.files} is no longer the dataset that this job was adding to: restore it, or recreate it "
            "with output.overwrite=true"
        )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the dataset."""
        self.check()
        manifest, digest = manifests.with_digest(self.files)
        if digest != self.record["manifest_sha256"]:  # it was replaced after the check
            raise self._replaced()
        return manifest

    def fetch(self) -> None:
        """Fetches the files that are not on this machine."""
        self.files.fetch({name: entry["bytes"] for name, entry in self._data_files.items()})

    @property
    def _data_files(self) -> dict[str, Any]:
        """The entries of the files that the next version continues."""
        files = self.manifest["files"].items()
        return {name: entry for name, entry in files if "rows" in entry or is_statistics_file(name)}

    def check_files(self, stop: Event) -> None:
        """Compares the files with the manifest: first the sizes of all, then their content, at the speed of the disk.

        Returns early when `stop` is set.

        Raises:
            StoreError: a file is missing or damaged.
        """
        listed = self._data_files
        for name, entry in listed.items():
            if difference(self.files.path(name, entry["bytes"]), entry["bytes"]) is not None:
                self._checked(name)  # which fetches a file of the Hub again
        for name in listed:
            if stop.is_set():
                return
            self._checked(name)

    def examples(self) -> list[ExampleRecord]:
        """Returns the examples of the dataset, in the order of the source.

        Raises:
            StoreError: the file is not the one in the manifest or not the list of its examples, or the examples do not
                fit in memory.
        """
        with self._intact(EXAMPLES) as path:
            table = read_examples(path, self.manifest, way_out=WAY_OUT)
        # Repeated texts and lengths take few bytes in a file.
        if problem := too_large(table.nbytes + RECORD_BYTES * table.num_rows):
            raise UnreadableError(path, problem, WAY_OUT)
        records = []
        for batch in table.to_batches(_RECORDS_AT_A_TIME):
            columns = [column.to_pylist() for column in batch.columns]
            for values in zip(*columns, strict=True):
                records.append(ExampleRecord(**dict(zip(table.column_names, values, strict=True))))
        return records

    def statistics(self, key: PartKey) -> Statistics | None:
        """Returns the statistics of a key; None if the dataset has none of this kind and stage.

        Raises:
            StoreError: the file is not the one in the manifest.
        """
        with self._intact(statistics_file(key.layer)) as path:
            return read_statistics(path, key.kind, key.stage, way_out=WAY_OUT)

    def nonfinite_rows(self, name: str) -> int:
        """Returns the number of rows with NaN or Inf in the head's file `name`."""
        counted: dict[str, int] = self.manifest.get("nonfinite_rows", {})
        return counted.get(name, 0)

    def tables(self, name: str, schema: pa.Schema, rows_per_table: int) -> Iterator[pa.Table]:
        """Yields the rows of the head's file `name` in tables of `rows_per_table` rows; the last may have fewer.

        Raises:
            StoreError: the file is not the one in the manifest, or not of this schema. After the last table: it was
                changed while it was read.
        """
        pending = schema.empty_table()
        rows = self.manifest["files"].get(name, {}).get("rows")
        with self._intact(name) as path, opened(path, schema, way_out=WAY_OUT, rows=rows) as file:
            if problem := excess(path, file, schema, at_once=False):
                raise UnreadableError(path, problem, WAY_OUT)
            for group in range(file.num_row_groups):
                read = file.read_row_group(group, columns=schema.names).select(schema.names)
                pending = pa.concat_tables([pending, pa.Table.from_arrays(read.columns, schema=schema)])
                while pending.num_rows >= rows_per_table:
                    yield pending.slice(0, rows_per_table).combine_chunks()
                    pending = pending.slice(rows_per_table)
        if pending.num_rows:
            yield pending.combine_chunks()

    @contextmanager
    def _intact(self, name: str) -> Iterator[Path]:
        """Yields the path of a file for a block that reads it: it may be replaced or overwritten meanwhile.

        Raises:
            StoreError: the file is not the one in the manifest, or was changed during the block.
        """
        path = self._checked(name)
        with self._comparison.intact(path, self.manifest["files"][name]["sha256"], way_out=WAY_OUT):
            yield path

    def _checked(self, name: str) -> Path:
        entry = self.manifest["files"].get(name)
        path = None if entry is None else self._found(name, entry["sha256"], entry["bytes"])
        if path is None:
            raise StoreError(
                f"{name} of {self.files} is missing or damaged: it is not the file that manifest.json lists, so "
                f"nothing can be added to this dataset. {WAY_OUT[0].upper()}{WAY_OUT[1:]}"
            )
        return path

    def _found(self, name: str, sha256: str, size: int | None) -> Path | None:
        """Returns the path of the file with this digest; None if there is none. `size` is in bytes, None if unknown."""
        for get in (self.files.path, self.files.refetch):
            path = get(name, size)
            with suppress(OSError):  # it was removed in the meantime
                if path.is_file() and self._comparison.matches(path, sha256):
                    return path
        return None


def describe(files: Files) -> dict[str, Any]:
    """Returns the record of the dataset in `files` for a job that adds to it, without its location.

    Raises:
        StoreError: the manifest contradicts itself about the rows of the source.
    """
    manifest, digest = manifests.with_digest(files)
    skipped, rows = manifest["skipped_rows"], manifest["source_rows"]
    what, texts = manifests.texts(manifest)
    if texts + skipped != rows:
        problem = f"contradicts itself (source_rows is {rows:,}, {what} {texts:,} and skipped_rows {skipped:,})"
        raise UnreadableError(files.path(MANIFEST), problem, WAY_OUT)
    return {
        "manifest_sha256": digest,
        "source_rows": manifest["source_rows"],
        "skipped_rows": manifest["skipped_rows"],
        "versions": manifest["versions"],
        "batching": manifest.get("batching", []),
        "grown_from": manifest.get("grown_from", []),
    }
