"""Proves attention summaries: compares those of a few queries with the weights of derived queries and keys, in float64.

The vectors are those that the proof derives from hooks (`proof.py`), and the weights follow from them and from the
facts of the layer. The measure of a row is the largest of three relative differences: of weights (by distance, of the
learned sink, of the first tokens, and of the listed keys), of logsumexp and max_logit, and of entropy and the logarithm
of effective_keys. A row with another num_keys is wrong.

The measure of a head in an example is the root of the mean square over its rows. Where rounding can change single
vectors wholly, in a model with experts or one that does not compute in float32, it is the median. A row with NaN or Inf
is wrong, unless that of the derived vectors has them too. Where a measure is larger than its tolerance, each difference
is less several times its change by logits that are rounded to the dtype of the model: the derived vectors have other
rounding than the captured ones, which large logits magnify. In 16 bits it grows with depth to many times the rounding
of one number.

Shapes: P rows, n keys, D bins of distances.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from qk_sniffer.backbone.exact_attention import Attended, exact_logits
from qk_sniffer.capture.proof_examples import LayerKind, Pass
from qk_sniffer.capture.proof_rows import tables_of_examples
from qk_sniffer.capture.proof_vectors import OnAttended
from qk_sniffer.store.attention_table import AttentionTable
from qk_sniffer.store.layout import ATTENTION, Head, Layout
from qk_sniffer.store.open_folder import Access
from qk_sniffer.store.parquet_tables import read_matrix

TOLERANCES = {"float32": 5e-3, "float16": 5e-2, "bfloat16": 1e-1}
"""The largest difference of a head in an example that counts as rounding, by the dtype of the model."""

ROUNDINGS = {"float32": 4, "float16": 16, "bfloat16": 16}
"""How many times the change by rounded logits does not count, by the dtype of the model."""

MOST_ROWS = 8
"""The most rows that a pass compares in a layer: each costs attention to all its keys, in float64."""

MOST_SPREAD = 80.0
"""The logarithm of the largest effective_keys that the sums of float32 hold for certain."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SummaryFiles:
    """The attention summaries of a dataset."""

    heads: Sequence[Head]
    """Those of the files, one for each captured query head."""
    table: AttentionTable
    sink_tokens: int


class SummaryProof:
    """The comparison of the summaries of one dataset."""

    def __init__(
        self,
        layout: Layout,
        files: SummaryFiles,
        passes: Sequence[Pass],
        dtype: torch.dtype,
        *,
        chooses: bool,
        access: Access | None = None,
    ) -> None:
        """`chooses` says that the model has experts. Reads the rows of all `passes`, each file once."""
        self._files = files
        self._dtype = dtype
        self._uses_median = chooses or dtype != torch.float32
        name = str(dtype).removeprefix("torch.")
        self._tolerance, self._roundings = TOLERANCES[name], ROUNDINGS[name]
        self._stored: dict[tuple[int, Head], pa.Table] = {}
        self._largest: dict[int, float] = {}
        self._compared: set[Head] = set()
        self._rows = 0
        columns = list(files.table.widths)
        for head in files.heads:
            wanted = [(one, _few(one.rows[head.layer, "q"])) for one in passes if (head.layer, "q") in one.rows]
            rows = [(one.example.example_id, numbers) for one, numbers in wanted]
            tables = tables_of_examples(layout.root / head.file, rows, columns, access)
            self._stored |= {(id(one), head): table for (one, _), table in zip(wanted, tables, strict=True)}

    def of_pass(self, one: Pass) -> OnAttended:
        """Returns what compares the summaries of a layer in a pass."""

        def see(layer: int, attended: Attended) -> None:
            for head in self._files.heads:
                table = self._stored.get((id(one), head)) if head.layer == layer else None
                if table is not None:
                    self._compare(head, table, attended)

        return see

    @property
    def is_right(self) -> bool:
        """Whether no difference is larger than rounding."""
        return all(difference <= self._tolerance for difference in self._largest.values())  # NaN is not

    def facts(self, reasons: Mapping[LayerKind, str]) -> dict[str, Any]:
        """Returns the manifest's `proof.summaries`: rows and heads that were compared, the layers without one, with
        their reason in `reasons` if there is one, and the tolerance with the largest difference by layer.

        Without a compared row, it has a reason alone.
        """
        if not self._compared:
            of_layers = sorted({reason for (_, kind), reason in reasons.items() if kind == ATTENTION})
            return {"reason": "; ".join(of_layers) or "no compared row is finite"}
        uncovered = sorted({head.layer for head in self._files.heads} - {head.layer for head in self._compared})
        return {
            "rows": self._rows,
            "heads": len(self._compared),
            "uncovered": [
                {"layer": layer, "kind": "q"}
                | ({"reason": reasons[layer, ATTENTION]} if (layer, ATTENTION) in reasons else {})
                for layer in uncovered
            ],
            "tolerance": self._tolerance,
            "largest_difference_by_layer": dict(sorted(self._largest.items())),
        }

    def _compare(self, head: Head, table: pa.Table, attended: Attended) -> None:
        columns = {
            name: read_matrix(table[name]) if self._files.table.is_list(name) else table[name].to_numpy()
            for name in self._files.table.widths
        }
        at = table["position"].to_numpy().astype(np.int64)
        logits = exact_logits(attended, head.head, at.tolist())
        sink = -np.inf if attended.sinks is None else float(attended.sinks[head.head])
        stored, exact = _stored(columns), self._derived(logits, sink, at, columns["top_position"])
        sees = (logits != -torch.inf).sum(dim=1).cpu().numpy()
        are_finite, is_right = _are_finite(stored), np.equal(columns["num_keys"], sees)
        counts = are_finite | (_are_finite(exact) & (exact[2][:, 1] < MOST_SPREAD))
        if not counts.any():
            return

        def difference(rounding: Sequence[Float64 | float]) -> float:
            with np.errstate(invalid="ignore"):  # of NaN and Inf
                errors = [
                    np.maximum(0.0, _norm(part - mine) - less) / np.maximum(_norm(mine), least)
                    for part, mine, less, least in zip(stored, exact, rounding, (1e-30, 1.0, 1.0), strict=True)
                ]
            rows = np.where(is_right & are_finite, np.max(errors, axis=0), np.inf)[counts]
            return float(np.median(rows) if self._uses_median else np.sqrt(np.mean(rows**2)))

        found = difference((0.0, 0.0, 0.0))
        if not found <= self._tolerance:
            rounded = exact_logits(attended, head.head, at.tolist(), self._dtype)
            # Logits beyond float16 are infinite if rounded.
            rounded = torch.where(rounded.isinf() & logits.isfinite(), logits, rounded)
            other = self._derived(rounded, sink, at, columns["top_position"])
            found = difference(
                [self._roundings * _norm(changed - mine) for changed, mine in zip(other, exact, strict=True)]
            )
        self._largest[head.layer] = float(np.maximum(self._largest.get(head.layer, 0.0), found))  # NaN if one is
        self._compared.add(head)
        self._rows += int(counts.sum())

    def _derived(
        self, found: torch.Tensor, sink: float, at: npt.NDArray[np.int64], listed: npt.NDArray[np.int32]
    ) -> tuple[Float64, ...]:
        """Returns the parts of `_stored` from the logits `found` (P, n) and the logit of the learned sink."""
        logits = found.double().cpu().numpy()
        top = logits.max(axis=1, keepdims=True)
        above = np.maximum(top, sink)
        total = above + np.log(np.exp(logits - above).sum(axis=1, keepdims=True) + np.exp(sink - above))
        weights = np.exp(logits - total)
        distance = np.maximum(0, at[:, None] - np.arange(weights.shape[1]))
        bin_of = np.frexp(distance + 1.0)[1] - 1
        bins = range(self._files.table.widths["distance_mass"])
        by_distance = [np.where(bin_of == number, weights, 0).sum(axis=1) for number in bins]
        first = weights[:, : self._files.sink_tokens].sum(axis=1)
        is_key = (listed >= 0) & (listed <= at[:, None])
        of_listed = np.take_along_axis(weights, np.where(is_key, listed, 0).astype(np.int64), axis=1)
        largest = np.zeros(listed.shape)
        ordered = -np.sort(-weights, axis=1)[:, : listed.shape[1]]
        largest[:, : ordered.shape[1]] = ordered
        surprise = np.where(weights > 0, total - logits, 0)
        return (
            np.column_stack([*by_distance, np.exp(sink - total), first, np.where(is_key, of_listed, 0), largest]),
            np.column_stack([total, top]),
            np.column_stack([(weights * surprise).sum(axis=1), -np.log((weights**2).sum(axis=1))]),
        )


def _stored(columns: Mapping[str, npt.NDArray[Any]]) -> tuple[Float64, ...]:
    """Returns the stored numbers that are compared in three parts, (P, numbers) each: weights, levels and spread."""
    names = (
        ("distance_mass", "sink_weight", "first_mass", "top_weight", "top_weight"),
        ("logsumexp", "max_logit"),
        ("entropy", "effective_keys"),
    )
    weights, levels, spread = (np.column_stack([columns[each] for each in part]).astype(np.float64) for part in names)
    with np.errstate(divide="ignore", invalid="ignore"):  # of impossible numbers
        spread[:, 1] = np.log(spread[:, 1])
    return weights, levels, spread


def _are_finite(parts: Sequence[Float64]) -> npt.NDArray[np.bool_]:
    """Returns whether all numbers of each row are finite."""
    return np.asarray(np.isfinite(np.concatenate(parts, axis=1)).all(axis=1))


def _norm(values: Float64) -> Float64:
    """Returns the norm of each row."""
    found: Float64 = np.linalg.norm(values, axis=1)
    return found


def _few(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns at most `MOST_ROWS` of the rows, evenly spread."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).round().astype(np.int64))]
