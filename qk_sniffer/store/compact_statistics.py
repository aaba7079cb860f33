"""Merges the statistics of the journals into the files of a dataset, one layer at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qk_sniffer.config import StatisticsConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.store.compaction_plan import WAY_OUT
from qk_sniffer.store.disk import Check, unchecked, write_atomic
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Head, Layout, head_name, statistics_file
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.previous import PreviousVersion
from qk_sniffer.store.segment import DamageError, Place, read_header
from qk_sniffer.store.statistics import (
    Part,
    PartKey,
    Statistics,
    merge,
    paired,
    places_of,
    read_parts,
)
from qk_sniffer.store.statistics_file import encode

Places = Mapping[PartKey, Mapping[str, Place]]


def compact_statistics(
    staging: Layout,
    journals: Sequence[Journal],
    heads: Sequence[Head],
    config: StatisticsConfig,
    rotations: Mapping[int, Any],
    *,
    previous: PreviousVersion | None = None,
    check: Check = unchecked,
) -> tuple[dict[str, FileEntry], dict[str, int]]:
    """Stages a file of statistics for each layer of `heads`, after those of `previous`.

    `rotations` has the rotation of each layer in the form of the manifest. Returns the files by name, and the vectors
    with NaN or Inf by head and stage, for those that have any: `{"l00h00q.post": 3}`.

    Raises:
        StoreError: the journals have no statistics of a head, or a segment is damaged.
    """
    segments = [path for _, path in sorted(pair for journal in journals for pair in journal.statistics)]
    places = [(path, _places(path)) for path in segments]
    files: dict[str, FileEntry] = {}
    nonfinite: dict[str, int] = {}
    for layer in sorted({head.layer for head in heads}):
        of_layer: dict[str, list[int]] = {}
        for head in sorted((head for head in heads if head.layer == layer), key=lambda head: head.row):
            of_layer.setdefault(head.kind, []).append(head.head)
        keys = [PartKey(layer, kind, stage) for kind in of_layer for stage in config.stages]
        merged = merge([*_of_previous(previous, keys), *_of_segments(places, keys)])
        if merged.keys() != {*keys}:
            _, kind, stage = min({*keys} - merged.keys())
            raise StoreError(f"the journals have no statistics of layer {layer}, kind {kind}, stage {stage}; {WAY_OUT}")
        found: dict[tuple[str, str], Statistics] = {}
        for key, part in merged.items():
            numbers = of_layer[key.kind]
            if len(part.count) != len(numbers):
                raise StoreError(
                    f"the journals have statistics of {len(part.count)} heads of layer {layer}, kind {key.kind}, not "
                    f"of {len(numbers)}; {WAY_OUT}"
                )
            size = part.modulus.shape[1]
            found[key.kind, key.stage] = Statistics.of(numbers, part, paired(rotations.get(layer), size))
            for head_number, number in zip(numbers, part.nonfinite.tolist(), strict=True):
                if number:
                    nonfinite[f"{head_name(layer, head_number, key.kind)}.{key.stage}"] = number
        data = encode(found)
        path = staging.root / statistics_file(layer)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data, check=check)
        files[statistics_file(layer)] = FileEntry.of(data)
    return files, nonfinite


def _places(path: Path) -> Places:
    try:
        return places_of(read_header(path))
    except DamageError as error:
        raise _damaged(path, error) from error


def _of_previous(previous: PreviousVersion | None, keys: Iterable[PartKey]) -> Iterator[tuple[PartKey, Part]]:
    if previous is None:
        return
    for key in keys:
        found = previous.statistics(key)
        if found is not None:
            yield key, found.part()


def _of_segments(places: Sequence[tuple[Path, Places]], keys: Sequence[PartKey]) -> Iterator[tuple[PartKey, Part]]:
    for path, of_path in places:
        wanted = {key: of_path[key] for key in keys if key in of_path}
        try:
            yield from read_parts(path, wanted)
        except DamageError as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: DamageError) -> StoreError:
    return StoreError(f"the journal segment {path} is damaged: {error}; rerun its job")
