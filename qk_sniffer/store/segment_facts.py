"""Reads the facts in a journal segment, and accepts only those that a writer could have written.

A checksum in a name shows that the bytes are those of the name. It does not show who made them. Metadata, shapes, types
and places that contradict each other are damage, like a wrong checksum: the examples are captured again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from qk_sniffer.store import stored
from qk_sniffer.store.form_types import BatchSize, ExampleId
from qk_sniffer.store.open_folder import PLAIN, Access
from qk_sniffer.store.proof_forms import Attention
from qk_sniffer.store.rows import (
    BATCH,
    COUNT,
    DTYPES,
    FIRST,
    INDEX,
    LAST,
    MOST_INDEX,
    MOST_PARTS,
    PART,
    RUN_COLUMNS,
    START,
    TOKEN_COLUMNS,
    keys_of,
    parse_tensor_name,
    with_parts,
)
from qk_sniffer.store.segment import DamageError, Header, Place, open_segment, read_array
from qk_sniffer.store.statistics import PREFIX, PartKey, places_of
from qk_sniffer.store.stored import Count, UnreadableError
from qk_sniffer.store.text_segments import decode as decode_segments

_MOST_POSITION = 2**31 - 1

Int64 = npt.NDArray[np.int64]
Blocks = dict[tuple[int, str], dict[str, Place]]
"""The places of a segment's tensors, by (layer, kind) and column."""


class _Record(NamedTuple):
    """The fields of an `ExampleRecord`. Those with a default are missing in journals of earlier versions."""

    source_index: Annotated[int, Meta(ge=0, lt=MOST_INDEX)]
    example_id: ExampleId
    source_id: str
    num_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    truncated: bool
    text_hash: Annotated[str, Meta(pattern=r"\A[0-9a-f]{0,128}\Z")]
    left_out: Count = 0
    begins_special: bool = False
    ends_special: bool = False
    segments: str | None = None
    part: Annotated[int, Meta(ge=0, lt=MOST_PARTS)] = 0
    first_token: Count = 0
    is_last: bool = True
    first_position: Annotated[int, Meta(ge=0, lt=2**31)] = 0


_RECORD_LENGTHS = (6, 9, 10, 13, len(_Record._fields))
"""Those of earlier versions, and of this one."""

_RUN_LENGTHS = (6, len(RUN_COLUMNS))
"""Those of earlier versions, and of this one."""


class Ended(TypedDict):
    """A batch that ends in a segment: the segment that it starts in, its examples, and the checks of its attention."""

    batch: Count
    since: Count
    records: list[_Record]
    checks: NotRequired[list[Attention]]  # since checks are made


class _Batching(TypedDict):
    max_batch_tokens: BatchSize
    batch_size: BatchSize | None
    lookahead: NotRequired[BatchSize | None]  # since it may change


class _Metadata(TypedDict):
    format: Literal["qk-sniffer-journal/1"]
    batches: str
    ended: str


@dataclass(frozen=True)
class SegmentFacts:
    """The metadata of a segment: its first and last batch, the batches that end in it, and its batch settings.

    `num_tokens` are those of the examples of these batches, and `statistics` the places of their statistics.
    """

    first: int
    last: int
    ended: list[Ended]
    num_tokens: int
    batching: Mapping[str, int | None] | None
    statistics: Mapping[PartKey, Mapping[str, Place]]


def facts_of(header: Header, number: int) -> SegmentFacts:
    """Returns the facts in the metadata of segment `number`.

    Raises:
        DamageError: no writer writes such metadata.
    """
    metadata: Any = header.metadata
    try:
        stored.check(metadata, _Metadata, "its metadata", "")
        first, last = stored.decode(metadata["batches"], tuple[Count, Count], "batches", "")
        ended = stored.decode(metadata["ended"], list[Ended], "ended", "")
        batching = stored.decode(metadata.get("batching", "null"), _Batching | None, "batching", "")  # type: ignore[arg-type]
    except UnreadableError as error:
        raise DamageError(f"its metadata {error.problem}") from error
    if any(len(record) not in _RECORD_LENGTHS for end in ended for record in end["records"]):
        raise DamageError("its metadata has records of another length")
    num_tokens = 0
    try:
        for record in (_Record(*values) for end in ended for values in end["records"]):
            num_tokens += record.num_tokens
            if record.segments is not None:
                decode_segments(record.segments, record.num_tokens)
    except ValueError as error:
        raise DamageError(f"its metadata has wrong segments: {error}") from error
    if first > last or any(not first <= end["batch"] <= last or end["since"] > number for end in ended):
        raise DamageError("its metadata contradicts itself")
    statistics = places_of(header)
    if statistics and not ended:
        raise DamageError("it has statistics of no batch")
    return SegmentFacts(first, last, ended, num_tokens, batching, statistics)  # type: ignore[arg-type]


def blocks_of(header: Header) -> Blocks:
    """Returns the places of the tensors of each block.

    Raises:
        DamageError: the tensors are not those of blocks.
    """
    blocks: Blocks = {}
    for name, place in header.tensors.items():
        if name.startswith(PREFIX):
            continue
        if (parsed := parse_tensor_name(name)) is None:
            raise DamageError(f"it has a tensor {name[:100]!r}")
        layer, kind, column = parsed
        blocks.setdefault((layer, kind), {})[column] = place
    for (layer, kind), places in blocks.items():
        if not _is_block(places):
            raise DamageError(f"the tensors of layer {layer}, kind {kind} are not those of a block")
    return blocks


def _is_block(places: Mapping[str, Place]) -> bool:
    columns = places.keys() - {"runs", "vectors"}
    if not {"runs", "vectors", "position"} <= places.keys() or not columns <= {"position", *TOKEN_COLUMNS}:
        return False
    runs, vectors = places["runs"], places["vectors"]
    if len(vectors.shape) != 3 or min(vectors.shape) < 1 or vectors.dtype not in DTYPES.values():
        return False
    is_right = runs.dtype == "I64" and len(runs.shape) == 2 and runs.shape[1] in _RUN_LENGTHS
    return is_right and all((places[name].dtype, places[name].shape) == ("I32", vectors.shape[1:2]) for name in columns)


def check_runs(path: Path, header: Header, facts: SegmentFacts, access: Access = PLAIN) -> Int64:
    """Checks that the runs of each block describe its rows, and that all statistics are of the same tokens.

    Returns the batch and the example's key of each run, (n, 2), without repetitions.

    Reads runs, positions and counts, which are small next to the vectors.

    Raises:
        DamageError: they do not.
    """
    found = [np.empty((0, 2), np.int64)]
    for (layer, kind), places in blocks_of(header).items():
        with open_segment(path, access) as file:
            runs = with_parts(read_array(file, places["runs"], np.int64))
            position = read_array(file, places["position"], np.int32)
        if not (_describe(runs, position) and _are_between(runs[:, BATCH], facts.first, facts.last)):
            raise DamageError(f"the runs of layer {layer}, kind {kind} do not describe its rows")
        found.append(np.stack([runs[:, BATCH], keys_of(runs)], axis=1))
    _check_counts(path, places_of(header), facts.num_tokens, access)
    return np.unique(np.concatenate(found), axis=0)


def _check_counts(path: Path, statistics: Mapping[PartKey, Mapping[str, Place]], most: int, access: Access) -> None:
    """Checks that the statistics of every head are of equally many tokens, and no more than `most` of the examples."""
    if not statistics:
        return
    numbers: set[int] = set()
    with open_segment(path, access) as file:
        for places in statistics.values():
            count, nonfinite = (read_array(file, places[name], np.int64) for name in ("count", "nonfinite"))
            if not (_are_between(count, 0, most) and _are_between(nonfinite, 0, most)):
                raise DamageError("it has statistics of more tokens than its examples")
            numbers.update((count + nonfinite).tolist())
    if len(numbers) > 1 or max(numbers, default=0) > most:
        raise DamageError("the statistics of its heads are not of the same tokens")


def _describe(runs: Int64, position: npt.NDArray[np.int32]) -> bool:
    """Whether `runs` (num_runs, 7) follow each other through the rows, and each has ascending positions."""
    start, count, first, last = (runs[:, column] for column in (START, COUNT, FIRST, LAST))
    num_rows = len(position)
    if not (len(runs) and _are_between(count, 1, num_rows)):
        return False
    if not (_are_between(runs[:, INDEX], 0, MOST_INDEX - 1) and _are_between(runs[:, PART], 0, MOST_PARTS - 1)):
        return False
    if not (_are_between(first, 0, _MOST_POSITION) and _are_between(last, 0, _MOST_POSITION)):
        return False
    stops = np.cumsum(count)  # cannot overflow: there are fewer runs than bytes in the file
    if stops[-1] != num_rows or not np.array_equal(start, stops - count):
        return False
    ascends = np.diff(position.astype(np.int64)) > 0
    ascends[start[1:] - 1] = True
    return bool(ascends.all() and np.array_equal(position[start], first) and np.array_equal(position[stops - 1], last))


def _are_between(values: Int64, least: int, most: int) -> bool:
    return not len(values) or (int(values.min()) >= least and int(values.max()) <= most)
