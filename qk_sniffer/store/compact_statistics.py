"""Merges the statistics of the journals into the files of a dataset, one layer at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from qk_sniffer.config import StatisticsConfig
from qk_sniffer.errors import StoreError
from qk_sniffer.store.compaction_plan import WAY_OUT
from qk_sniffer.store.disk import explained, make_folder, write_atomic
from qk_sniffer.store.journal import Journal
from qk_sniffer.store.layout import Head, Layout, statistics_file
from qk_sniffer.store.manifest import FileEntry
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.previous import PreviousVersion
from qk_sniffer.store.segment import DamageError, Place, read_header
from qk_sniffer.store.statistics import (
    Part,
    PartKey,
    Statistics,
    paired,
    places_of,
    read_parts,
    stages_of,
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
    num_tokens: int,
    previous: PreviousVersion | None = None,
    access: Access = PLAIN,
) -> tuple[dict[str, FileEntry], dict[str, Any]]:
    """Stages a file of statistics for each layer of `heads`, after those of `previous`.

    `rotations` has the rotation of each layer in the form of the manifest. `num_tokens` is the number of tokens of all
    examples, without those that are left out. Returns the files by name, and the manifest's `statistics`. `access` is
    the way to the files: the claim of the job.

    Raises:
        StoreError: the journals or the previous version lack statistics, or have others; or a segment is damaged.
    """
    segments = [path for _, path in sorted(pair for journal in journals for pair in journal.statistics)]
    places = [(path, _places(path, access)) for path in segments]
    files: dict[str, FileEntry] = {}
    nonfinite: dict[str, int] = {}
    overflow: list[str] = []
    for layer in sorted({head.layer for head in heads}):
        of_layer: dict[str, list[Head]] = {}
        for head in sorted((head for head in heads if head.layer == layer), key=lambda head: head.row):
            of_layer.setdefault(head.kind, []).append(head)
        keys = [PartKey(layer, kind, stage) for kind in of_layer for stage in stages_of(kind, config.stages)]
        whole = {key: _moment_shape(of_layer[key.kind], covariance=config.covariance) for key in keys}
        _check_shapes(places, whole)
        merged: dict[PartKey, Part] = {}
        for key, part in chain(_of_previous(previous, keys, of_layer), _of_segments(places, keys, access)):
            other = key in merged and merged[key].modulus.shape != part.modulus.shape
            if other or part.moment.shape != whole[key]:
                raise _wrong(key, _OTHER)
            merged[key] = merged[key].merged(part) if key in merged else part
        found: dict[tuple[str, str], Statistics] = {}
        for key in keys:
            if key not in merged or (merged[key].count + merged[key].nonfinite != num_tokens).any():
                raise _wrong(key, f"are not those of all {num_tokens:,} tokens")
            part, of_kind = merged[key], of_layer[key.kind]
            pairs = paired(rotations.get(layer), part.modulus.shape[1])
            if max(chain(*(pairs or ())), default=0) >= of_kind[0].head_dim:
                raise _wrong(key, _TOO_MANY)
            statistics = Statistics.of([head.head for head in of_kind], part, pairs)
            found[key.kind, key.stage] = statistics
            for index, head in enumerate(of_kind):
                name = f"{head.name}.{key.stage}"
                if number := int(part.nonfinite[index]):
                    nonfinite[name] = number
                if statistics.overflows(index):
                    overflow.append(name)
        data = encode(found)
        path = staging.root / statistics_file(layer)
        with explained(path, "write"):
            make_folder(path.parent, access)
        write_atomic(path, data, access=access)
        files[statistics_file(layer)] = FileEntry.of(data)
    return files, {"tokens": num_tokens, "nonfinite": nonfinite, "overflow": overflow}


_OTHER = "are of other heads or have other shapes than those of the job"
_TOO_MANY = "have more rotary frequencies than a head"


def _moment_shape(heads: Sequence[Head], *, covariance: bool) -> tuple[int, ...]:
    d = heads[0].head_dim
    return (len(heads), d, d) if covariance else (len(heads), d)


def _check_shapes(places: Iterable[tuple[Path, Places]], whole: Mapping[PartKey, tuple[int, ...]]) -> None:
    """Checks, before any array is read, that the parts of the segments have the shapes of the job.

    `whole` has the shape of the moments of each key.

    Raises:
        StoreError: a part has others, which may be of any size.
    """
    for _, of_path in places:
        for key, shape in whole.items():
            part = of_path.get(key)
            if part is None:
                continue
            if part["covariance"].shape != shape:
                raise _wrong(key, _OTHER)
            if 2 * part["modulus"].shape[1] > shape[1]:
                raise _wrong(key, _TOO_MANY)


def _wrong(key: PartKey, what: str) -> StoreError:
    return StoreError(f"the statistics of layer {key.layer}, kind {key.kind}, stage {key.stage} {what}; {WAY_OUT}")


def _places(path: Path, access: Access) -> Places:
    try:
        with explained(path, "read"):
            return places_of(read_header(path, access))
    except DamageError as error:
        raise _damaged(path, error) from error


def _of_previous(
    previous: PreviousVersion | None, keys: Iterable[PartKey], heads: Mapping[str, Sequence[Head]]
) -> Iterator[tuple[PartKey, Part]]:
    """Yields the parts of the previous version; `heads` are those of the layer by kind."""
    if previous is None:
        return
    for key in keys:
        found = previous.statistics(key)
        if found is None:
            continue
        if found.heads.tolist() != [head.head for head in heads[key.kind]]:
            raise _wrong(key, _OTHER)
        if min(found.count.min(), found.nonfinite.min()) < 0:
            raise _wrong(key, "have a negative count")
        yield key, found.part()


def _of_segments(
    places: Sequence[tuple[Path, Places]], keys: Sequence[PartKey], access: Access
) -> Iterator[tuple[PartKey, Part]]:
    for path, of_path in places:
        wanted = {key: of_path[key] for key in keys if key in of_path}
        try:
            with explained(path, "read"):
                yield from read_parts(path, wanted, access)
        except DamageError as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: DamageError) -> StoreError:
    return StoreError(f"the journal segment {path} is damaged: {error}; rerun its job")
