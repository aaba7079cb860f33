"""Reads the rows of the heads of a dataset."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qk_sniffer.config import from_dict
from qk_sniffer.dataset.dataset_files import WAY_OUT, DatasetFiles
from qk_sniffer.dataset.frames import pandas_frame, polars_frame
from qk_sniffer.dataset.head_vectors import HeadVectors
from qk_sniffer.dataset.heads import captured_heads
from qk_sniffer.errors import StoreError
from qk_sniffer.store import manifest as manifests
from qk_sniffer.store.files import Files, inside, state_of
from qk_sniffer.store.layout import MANIFEST, OFFSET_COLUMNS, HeadKey, head_file, schema
from qk_sniffer.store.parquet_tables import read_matrix, read_numbers, read_table
from qk_sniffer.store.row_filter import RowFilter, RowValues
from qk_sniffer.store.rows import NO_CHARACTER
from qk_sniffer.store.stored import UnreadableError
from qk_sniffer.text import closest, did_you_mean, shortened

if TYPE_CHECKING:
    import pandas
    import polars


class HeadReader:
    """The heads of a dataset and their rows: the part of `Dataset` that reads the files of vectors."""

    def __init__(self, files: Files) -> None:
        self.manifest: dict[str, Any] = manifests.of(files)
        """The content of `manifest.json`: settings, commits, the layout of the heads, probabilities, files."""
        self.commit: str | None = getattr(files, "commit", None)
        """The commit on the Hub; None for a folder."""
        self.heads: list[HeadKey] = manifests.heads(self.manifest)
        """The captured heads as (layer, head, kind), by layer: first the queries ("q"), then keys ("k"), values ("v")
        and outputs ("o")."""
        self._files = DatasetFiles(files, self.manifest["files"])
        self._captured = {head.file: head for head in captured_heads(self.manifest)}
        self._config = from_dict(self.manifest["config"])
        self._manifest_state: tuple[int, ...] | None = None

    def vectors(
        self, layer: int, head: int, kind: str, *, intact: bool = False, **rows: Unpack[RowValues]
    ) -> HeadVectors:
        """Returns the rows of a head, or those with the values in `rows`.

        `head` is the number of a query head for the kinds "q" and "o", of a key head for "k" and "v". Where both were
        captured, the rows of an output are those of its query, and the rows of a value those of its key.

        With `intact`, the file must have the sha256 that the manifest lists, before and after it is read: one of
        another dataset may have its size.

        Raises:
            StoreError: the head was not captured, or its file is missing, damaged or, with `intact`, another one.
            HubError: the file cannot be fetched.
        """
        self._head_file(HeadKey(layer, head, kind))
        with self._files.intact(head_file(layer, head, kind)) if intact else nullcontext():
            table = self.table(layer, head, kind, ["vector", "position", "example_id"], **rows)
        if any(chunk.flatten().null_count for chunk in table["vector"].chunks):
            raise UnreadableError(self._files.path(head_file(layer, head, kind)), "has vectors with nulls", WAY_OUT)
        return HeadVectors(
            read_matrix(table["vector"]),
            read_numbers(table["position"]),
            read_numbers(table["example_id"]),
        )

    def segments(self, layer: int, head: int, kind: str, **rows: Unpack[RowValues]) -> npt.NDArray[np.object_]:
        """Returns the segment of each row of a head, row for row as `vectors`: an array (rows,) of str.

        Raises:
            StoreError: the dataset has no segments of rows (`capture.capture_segments=true` adds them), or a reason of
                `table`.
            HubError: the file cannot be fetched.
        """
        self._check_segments()
        column = self.table(layer, head, kind, ["segment"], **rows)["segment"].unify_dictionaries().combine_chunks()
        names = np.array(column.dictionary.to_pylist(), np.object_)
        found: npt.NDArray[np.object_] = names[column.indices.to_numpy()]
        return found

    def offsets(self, layer: int, head: int, kind: str, **rows: Unpack[RowValues]) -> npt.NDArray[np.int32]:
        """Returns the characters of the token of each row of a head, row for row as `vectors`.

        The array (rows, 2) has the first character and the one after the last, counted in the text from 0; -1 for a
        special token that no character belongs to.

        Raises:
            StoreError: the dataset has no offsets (`capture.capture_offsets=true` adds them), or a reason of `table`.
            HubError: the file cannot be fetched.
        """
        if not self._config.capture.capture_offsets:
            raise StoreError(f"{self} has no offsets: capture.capture_offsets=true adds them")
        table = self.table(layer, head, kind, [*OFFSET_COLUMNS], **rows)
        return np.stack([pc.fill_null(table[name], NO_CHARACTER).to_numpy() for name in OFFSET_COLUMNS], axis=1)

    def table(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> pa.Table:
        """Returns the rows of a head, or those with the values in `rows`, with all columns or the named ones.

        The card describes the columns.

        Raises:
            StoreError: the head, a column or a segment was not captured, a value in `rows` is of another type, or the
                file is missing or damaged, has other columns or rows than the manifest says, or its rows do not fit in
                memory; or another dataset has replaced this one.
            HubError: the file cannot be fetched.
        """
        only = self._filter(rows)
        path, expected = self._head_file(HeadKey(layer, head, kind))
        if unknown := set(columns or ()) - set(expected.names):
            has = ", ".join(expected.names)
            raise StoreError(f"{path} has no column {', '.join(sorted(unknown))}; it has {has}")
        listed = self.manifest["files"][head_file(layer, head, kind)].get("rows")
        table = read_table(path, expected, way_out=WAY_OUT, rows=listed, columns=columns, only=only)
        self._check_not_replaced()
        return table

    def to_pandas(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> "pandas.DataFrame":
        """Returns what `table` returns as a data frame of pandas. A vector is an array in its cell.

        Raises:
            QkSnifferError: pandas is not installed, or a reason of `table`.
        """
        return pandas_frame(self.table(layer, head, kind, columns, **rows))

    def to_polars(
        self, layer: int, head: int, kind: str, columns: Sequence[str] | None = None, **rows: Unpack[RowValues]
    ) -> "polars.DataFrame":
        """Returns what `table` returns as a data frame of polars. A vector is of the type Array.

        Raises:
            QkSnifferError: polars is not installed, or a reason of `table`.
        """
        return polars_frame(self.table(layer, head, kind, columns, **rows))

    def _check_not_replaced(self) -> None:
        """Checks, after a read, that the folder still has this dataset: a file of another one may have the same size.

        A job removes the old manifest before it replaces a file.

        Raises:
            StoreError: it has another one, or none.
        """
        if self.folder is None:  # of one commit
            return
        state = state_of(path) if (path := inside(self.folder, MANIFEST)).is_file() else None
        if state is not None and state == self._manifest_state:
            return
        if manifests.read(self.folder) != self.manifest:
            raise StoreError(
                f"another dataset has replaced the one in {self.folder} since it was opened: open it again, and read "
                "again what belongs together"
            )
        self._manifest_state = state

    def _check_segments(self) -> None:
        if not self._config.capture.capture_segments:
            raise StoreError(f"{self} has no segments of rows: capture.capture_segments=true adds them")

    def _filter(self, rows: RowValues) -> RowFilter:
        """Returns the filter of the rows with these values. The manifest lists the segments that there are."""
        only = RowFilter.of(rows)
        if "segment" in only.wanted:
            self._check_segments()
            names = sorted(self.manifest.get("segments", ()))
            for name in only.wanted["segment"]:
                if name not in names:
                    raise StoreError(
                        f"{self} has no segment {name!r}{did_you_mean(closest(name, names))}; it has "
                        f"{shortened(names, 10)}"
                    )
        return only

    def _head_file(self, key: HeadKey) -> tuple[Path, pa.Schema]:
        """Returns the path of a head's file, and its columns."""
        if key not in self.heads:
            names = [key.name for key in self.heads]
            raise StoreError(
                f"{self} has no rows of layer {key.layer}, head {key.head}, kind {key.kind!r}; it has "
                f"{shortened(names, 6)} (`.heads`)"
            )
        file = head_file(*key)
        path, listed = self._files.path(file), self._captured.get(file)
        if listed is None:
            raise UnreadableError(path, "is of a head that no layer in manifest.json has", WAY_OUT)
        return path, schema(listed.head_dim, self._config.capture)

    def is_intact(self, layer: int, head: int, kind: str) -> bool:
        """Whether the file of a head has the sha256 that the manifest lists.

        Raises:
            StoreError: the file is missing, or has another size than the manifest lists.
            HubError: the file cannot be fetched.
        """
        return self._files.is_intact(head_file(layer, head, kind))

    def fetch(self, heads: Sequence[HeadKey]) -> None:
        """Fetches the files of several heads in parallel, if the dataset is on the Hub.

        Raises:
            HubError: a file cannot be fetched.
        """
        self._files.fetch(heads)

    @property
    def folder(self) -> Path | None:
        """The folder of the dataset; None for a dataset on the Hub."""
        return self._files.folder

    def beside(self, ending: str) -> Path:
        """Returns a path for results: `<folder>ending`, or `outputs/<branch>ending` for a dataset on the Hub."""
        return self._files.beside(ending)

    def __str__(self) -> str:
        return str(self._files)
