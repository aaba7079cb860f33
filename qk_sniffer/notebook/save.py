"""Writes the rows of a capture that are in memory to a folder, as a dataset like those of jobs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import CaptureError
from qk_sniffer.jobs.from_python import discard_capture, finish_capture, record_of, registered, settings_of
from qk_sniffer.notebook.facts import CaptureFacts
from qk_sniffer.notebook.memory import FinishedRows, StoredRows
from qk_sniffer.resolved import ResolvedConfig, public_name
from qk_sniffer.store.claim import Claim
from qk_sniffer.store.disk import ensure_space, required_bytes
from qk_sniffer.store.journal import ExampleRecord, Journal
from qk_sniffer.store.journal_writer import JournalWriter
from qk_sniffer.store.layout import ATTENTION
from qk_sniffer.store.rows import Rows, RowTokens
from qk_sniffer.store.statistics import Part, PartKey, part_tensors

EXAMPLES_AT_A_TIME = 1000
"""The examples that become durable together, unless there are statistics, which are of all."""


def save(
    facts: CaptureFacts,
    finished: FinishedRows,
    records: Sequence[ExampleRecord],
    folder: Path,
    *,
    statistics: Mapping[PartKey, Part] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the dataset of `records` to `folder`: whole, or not at all.

    Args:
        facts: of the capture.
        finished: the rows. Those of other examples stay out.
        records: the examples, by number, of the same moment.
        folder: a new or empty folder. Its parents are created.
        statistics: those of all tokens of the examples, of the same moment; None without statistics.
        overwrite: whether it replaces a dataset or the work of a job in the folder. Other files are never replaced.

    Raises:
        CaptureError: there is no example.
        StoreError: the folder has a dataset, the work of a job or other files; or the disk is full or fails.
    """
    if not records:
        raise CaptureError("there is nothing to save: no forward pass has run in the block of the capture")
    config, record = described(facts)
    way_out = "Choose another folder, or replace what it holds with overwrite=True"
    with registered(folder, record, overwrite=overwrite, way_out=way_out) as claim:
        try:
            _write(facts, finished, records, statistics, claim, config)
            finish_capture(claim, config)
        except BaseException:
            discard_capture(claim)  # the rows are still in memory
            raise


def described(facts: CaptureFacts) -> tuple[ResolvedConfig, dict[str, Any]]:
    """Returns the settings of a capture as a dataset states them, and the record of its job."""
    model = facts.model
    if facts.adapters:
        kinds, bases = (
            list(dict.fromkeys(each.get(key) for each in facts.adapters.values()))
            for key in ("peft_type", "base_model_name_or_path")
        )
        base = bases[0] if len(bases) == 1 else None
        own = getattr(facts.backbone.model.config, "_name_or_path", None)
        stated = facts.config.model.name if base == own else None if base is None else public_name(base)
        kind = " and ".join(str(getattr(kind, "value", kind)) for kind in kinds)
        model = model | {"adapter": {"kind": kind, "base": stated}}
    config = settings_of(facts.config, model)
    return config, record_of(config, model, facts.model_commit, quantizers=facts.backbone.stored.quantizers)


def _write(
    facts: CaptureFacts,
    finished: FinishedRows,
    records: Sequence[ExampleRecord],
    statistics: Mapping[PartKey, Part] | None,
    claim: Claim,
    config: ResolvedConfig,
) -> None:
    """Writes the rows to the journal of a claimed folder."""
    numbers = np.array([record.index for record in records])
    blocks = {key: rows for key in _keys(facts) if (rows := finished.rows(*key)) is not None}
    ensure_space(claim.layout.root, sum(map(_required, blocks.values())), way_out="Choose a folder on another disk")
    journal = Journal(claim.layout.journal(0, 1), claim.job_id, access=claim)
    with JournalWriter(
        journal,
        queue_bytes=config.inference.queue_mb << 20,
        segment_bytes=config.inference.segment_mb << 20,
        by_example=True,
        access=claim,
    ) as writer:
        for (layer, kind), rows in blocks.items():
            _write_rows(writer, layer, kind, rows, np.isin(rows.example, numbers))
        for start in range(0, len(records), EXAMPLES_AT_A_TIME):
            writer.complete(records[start : start + EXAMPLES_AT_A_TIME], ends_group=statistics is None)
        if statistics is not None:
            writer.complete([], statistics=part_tensors(statistics))


def _keys(facts: CaptureFacts) -> Iterator[tuple[int, str]]:
    """Yields the layers and kinds that have rows."""
    for layer, kind, _ in facts.selection:
        yield layer, kind
        if kind == "q" and facts.config.capture.attention.enabled:
            yield layer, ATTENTION


def _required(rows: StoredRows) -> int:
    heads, number, width = rows.vectors.shape
    return required_bytes(heads * number, width, rows.vectors.dtype.itemsize)


def _write_rows(writer: JournalWriter, layer: int, kind: str, rows: StoredRows, kept: npt.NDArray[np.bool_]) -> None:
    heads, _, width = rows.vectors.shape
    places = np.flatnonzero(kept)
    step = max(1, writer.piece_bytes // (heads * width * rows.vectors.dtype.itemsize))
    for start in range(0, len(places), step):
        some = places[start : start + step]
        tokens = RowTokens(rows.example[some], rows.position[some])
        with writer.reserve(Rows(layer, kind, heads, width, rows.vectors.dtype, tokens)) as slot:
            if some[-1] - some[0] == len(some) - 1:
                slot.vectors.copy_(rows.vectors[:, some[0] : some[-1] + 1])
            else:
                slot.vectors.copy_(rows.vectors[:, some])
            writer.commit(slot, None)
