"""Proves a dataset: derives the stored rows of a few examples a second time, on another path, and compares.

The other path is a plain forward pass of the unmodified model over one example, with the user's own attention kernel:
no tap, no batch, and no bands up to `MAX_TOKENS` tokens. Hooks on the query and key projections (or the norms behind
them) give the vectors before RoPE. The model's own rotary function rotates them with the model's own embedding. A
family defines any further steps of its attention. Values come from the value projection. Outputs are softmax(q K) V in
float64, of the derived queries, keys and values and of the facts of the layer: scale, softcap, sinks, and the rule by
which queries see keys. If stored rows differ from the derived ones by more than rounding,
one of the two paths is wrong, and the proof fails. Rows that are not compared are not proven.

Two measures are taken of each head and example. The first one is over all its compared rows, with Frobenius norms:

    max(0, (||stored - derived|| - eps ||derived||) / max(||derived - mean||, sqrt(rows) spread / 2))

The second one is the largest over its rows, with the norms of one row each:

    max(0, (||stored - derived|| - eps ||derived|| - 4 median) / max(||derived - mean||, spread / 2))

`median` is that of ||stored - derived|| over the rows: what rounding does to most of them. A few wrong rows among
thousands change the first measure less than rounding does, and the second one to about 1. For outputs, ||stored -
derived|| of a row is less 4 times the change by logits and weights that are rounded to the model's dtype, as simple
kernels round them.

`mean` is the head's mean over the example: all vectors of a head with a large bias are alike, so the norm alone would
hide errors. `spread` is the median distance of a vector from the mean, which counts where the few compared rows happen
to be close to it. `eps` is that of the model's dtype: the stored vectors have no more digits. Rounding comes from
batches of another shape and from banded attention, and grows with depth. It differs from row to row, and so the second
measure has a tolerance of its own. It does not count in a model with experts: rounding can make a router choose another
expert for a token, which changes its later vectors wholly. A wrong head, position or rotation gives about 1.

Numbers that are not finite in both vectors count as equal. A row without any other number is not a compared one.

Attention summaries are compared with those of the derived queries and keys, apart from the vectors
(`proof_summaries.py`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.backbone.backbone import Backbone, is_out_of_memory
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.capture.proof_examples import MAX_TOKENS, LayerKind, Pass
from qk_sniffer.capture.proof_rows import tables_of_examples
from qk_sniffer.capture.proof_summaries import SummaryFiles, SummaryProof
from qk_sniffer.capture.proof_vectors import NO_HOOKS, Derived, Int64, Vectors, derive
from qk_sniffer.errors import QkSnifferError
from qk_sniffer.logs import logger
from qk_sniffer.store.layout import Head, Layout
from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.parquet_tables import read_matrix
from qk_sniffer.text import one_line

log = logger(__name__)

MOST_REASON = 1000
"""The most characters of the reason for a proof that was not made."""

TOLERANCES = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The largest relative difference over the rows of a head that counts as rounding, by the dtype of the model."""

ROW_TOLERANCES = {"float32": 0.2, "float16": 0.3, "bfloat16": 0.5}
"""The same for a single row."""


StoredRows = tuple[Int64, Vectors]
"""Positions (rows,) and vectors (rows, d)."""


def prove(
    backbone: Backbone,
    layout: Layout,
    heads: Sequence[Head],
    passes: Sequence[Pass],
    ids: Mapping[int, npt.NDArray[np.int32]],
    *,
    layers: Sequence[LayerFacts],
    min_tokens: int,
    summaries: SummaryFiles | None = None,
    access: Access | None = None,
) -> dict[str, Any]:
    """Compares rows of `heads` in `layout` with vectors from hooks in `passes`. `ids` are token ids by example_id.

    `layers` have the facts of all layers of the heads. `summaries` are the dataset's attention summaries, if there are
    any. Shorter texts are padded on the right to `min_tokens`, which is more than the heads that any projection
    returns. `access` is the way to the files; None looks up their paths.

    Returns the manifest's `proof`: `proven` (None where the family has no hook path, or no chosen row is finite), the
    rows and heads that were compared, the largest of their positions, and of those that `for_late_rows` has added in
    some layers (`beyond`), each (layer, kind) without a compared row, with the reason if its vectors cannot be derived,
    and both tolerances with the largest differences by layer. With `summaries`, it also has those of `SummaryProof`.
    """
    proof: dict[str, Any] = {"proven": None, "examples": sorted(ids), "max_tokens": MAX_TOKENS}
    eps = torch.finfo(backbone.dtype).eps
    largest: dict[int, float] = {}
    largest_row: dict[int, float] = {}
    underivable: dict[LayerKind, str] = {}
    compared: set[Head] = set()
    rows, longest_position, beyond = 0, -1, {}
    # Rounding can make a router choose another expert for a token, whose later vectors are then others.
    chooses = any("expert" in name for name, _ in backbone.decoder.named_modules())
    of_summaries = None
    if summaries is not None:
        of_summaries = SummaryProof(layout, summaries, passes, backbone.dtype, chooses=chooses, access=access)
    for one, stored in zip(passes, _stored(layout, heads, passes, access), strict=True):
        if not stored:
            continue
        tokens = ids[one.example.example_id][: one.tokens]
        try:
            positions_of = {head: positions for head, (positions, _) in stored.items()}
            on_attended = None if of_summaries is None else of_summaries.of_pass(one)
            found = derive(backbone, padded(tokens, backbone, min_tokens), positions_of, layers, on_attended)
        except QkSnifferError:
            raise
        except Exception as error:  # from the model's code, if it differs from what its family expects
            if one.for_late_rows and is_out_of_memory(error):
                log.warning("no row beyond position %s is compared: %s", f"{MAX_TOKENS - 1:,}", error)
                continue
            reason = f"the hook path does not fit this model ({type(error).__name__}: {error})"
            return proof | {"reason": one_line(reason, MOST_REASON)}
        if found is None:
            return proof | {"reason": NO_HOOKS}
        derived, reasons = found
        underivable |= reasons
        layers_of_pass, last = set(), -1
        for head, (positions, vectors) in stored.items():
            if head not in derived:
                continue
            whole, row = differences(vectors, derived[head], eps)
            counted = ~_same_nonfinite(vectors, derived[head].rows).all(axis=1)
            if not counted.any():
                continue
            largest[head.layer] = float(np.maximum(largest.get(head.layer, 0.0), whole))  # NaN if either is
            largest_row[head.layer] = float(np.maximum(largest_row.get(head.layer, 0.0), row))
            compared.add(head)
            layers_of_pass.add(head.layer)
            rows += int(counted.sum())
            last = max(last, int(positions[counted].max()))
        if not one.for_late_rows:
            longest_position = max(longest_position, last)
        elif layers_of_pass:
            beyond = {"beyond": {"layers": sorted(layers_of_pass), "longest_position": last}}
    if not compared:
        none_is_finite = "no row of the compared examples has a finite number"
        return proof | {"reason": "; ".join(sorted({*underivable.values()})) or none_is_finite}
    dtype = str(backbone.dtype).removeprefix("torch.")
    tolerance, row_tolerance = TOLERANCES[dtype], ROW_TOLERANCES[dtype]
    made = {} if of_summaries is None else {"summaries": of_summaries.facts(underivable)}
    covered = {(head.layer, head.kind) for head in compared}
    uncovered = sorted({(head.layer, head.kind) for head in heads} - covered)
    return (
        proof
        | beyond
        | {
            # `all` of `<=`, so that a difference of NaN proves nothing.
            "proven": all(difference <= tolerance for difference in largest.values())
            and (chooses or all(difference <= row_tolerance for difference in largest_row.values()))
            and (of_summaries is None or of_summaries.is_right),
            "rows": rows,
            "heads": len(compared),
            "longest_position": longest_position,
            "uncovered": [
                {"layer": group[0], "kind": group[1]} | ({"reason": underivable[group]} if group in underivable else {})
                for group in uncovered
            ],
            "tolerance": tolerance,
            "largest_difference_by_layer": dict(sorted(largest.items())),
        }
        | (
            {}
            if chooses
            else {"row_tolerance": row_tolerance, "largest_row_difference_by_layer": dict(sorted(largest_row.items()))}
        )
        | made
    )


def _stored(
    layout: Layout, heads: Sequence[Head], passes: Sequence[Pass], access: Access | None
) -> list[dict[Head, StoredRows]]:
    """Returns the rows of each pass, of the heads that have any. Opens each file once."""
    stored: list[dict[Head, StoredRows]] = [{} for _ in passes]
    for head in heads:
        group = head.layer, head.kind
        mine = [(number, one) for number, one in enumerate(passes) if group in one.rows]
        wanted = [(one.example.example_id, one.rows[group]) for _, one in mine]
        for (number, _), rows in zip(mine, rows_of_examples(layout.root / head.file, wanted, access), strict=True):
            if len(rows[0]):
                stored[number][head] = rows
    return stored


def rows_of_examples(path: Path, wanted: Sequence[tuple[int, Int64]], access: Access | None = None) -> list[StoredRows]:
    """Returns, for each (example_id, rows) in `wanted`, those of the numbered rows of a head's file that are of the
    example."""
    tables = tables_of_examples(path, wanted, ["vector"], access)
    return [(table["position"].to_numpy().astype(np.int64), read_matrix(table["vector"])) for table in tables]


def padded(ids: npt.NDArray[np.int32], backbone: Backbone, min_tokens: int) -> npt.NDArray[np.int32]:
    """Returns token ids, padded on the right to `min_tokens` where the decoder has positions for so many."""
    length = min(min_tokens, backbone.num_positions or min_tokens)
    return np.pad(ids, (0, max(0, length - len(ids))))


def differences(stored: Vectors, derived: Derived, eps: float = 0.0) -> tuple[float, float]:
    """Returns both measures that the module docstring defines; NaN if only one of the vectors is not finite.

    What `_same_nonfinite` finds does not count in the mean and the spread.
    """
    same = _same_nonfinite(stored, derived.rows)
    if same.all():
        return 0.0, 0.0
    one, other = (np.where(same, 0, rows).astype(np.float64) for rows in (stored, derived.rows))
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.nan, math.nan
    mean = np.where(np.isfinite(derived.mean), derived.mean, 0)
    spread = derived.spread / 2 if math.isfinite(derived.spread) else 0.0
    errors, norms, from_mean = (
        np.linalg.norm(rows, axis=1) for rows in (one - other, other, np.where(same, 0, other - mean))
    )
    if derived.rounding is not None:
        errors = np.maximum(0.0, errors - derived.rounding)
    typical = np.maximum(from_mean, spread)
    rows = (errors - eps * norms - 4 * np.median(errors)) / np.where(
        typical > 0, typical, np.where(norms > 0, norms, 1.0)
    )
    whole = np.array([np.linalg.norm(values) for values in (errors, norms, from_mean)])
    typical_whole = max(float(whole[2]), math.sqrt(len(other)) * spread) or float(whole[1]) or 1.0
    return max(0.0, float(whole[0] - eps * whole[1]) / typical_whole), max(0.0, float(rows.max()))


def _same_nonfinite(stored: Vectors, derived: Vectors) -> npt.NDArray[np.bool_]:
    """Returns which numbers are NaN in both vectors, or the same infinity."""
    same: npt.NDArray[np.bool_] = (np.isnan(stored) & np.isnan(derived)) | (np.isinf(stored) & (stored == derived))
    return same
