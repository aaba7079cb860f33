"""Proves a dataset: derives the stored rows of a few examples a second time, on another path, and compares.

The other path is a plain forward pass of the unmodified model over one example, with the user's own attention kernel:
no tap, no batch, and no bands up to `MAX_TOKENS` tokens. Hooks on the query and key projections (or the norms behind
them) give the vectors before RoPE. The model's own rotary function rotates them with the model's own embedding. A
family defines any further steps of its attention. Stored rows that differ by more than rounding were captured wrongly.

The measure is taken over all rows of one head and example, with Frobenius norms:

    max(0, (||stored - derived|| - eps ||derived||) / max(||derived - mean||, sqrt(rows) spread / 2))

`mean` is the head's mean over the example: all vectors of a head with a large bias are alike, so the norm alone would
hide errors. `spread` is the median distance of a vector from the mean, which counts where the few compared rows happen
to be close to it. `eps` is that of the model's dtype: the stored vectors have no more digits. Rounding comes from
batches of another shape and from banded attention, and grows with depth. A wrong head, position or rotation gives about
1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.banded_attention import banded
from qk_sniffer.backbone.family import QueryKey, RotaryCall
from qk_sniffer.backbone.tap import ForwardDone, rotary_functions, watched_rotary
from qk_sniffer.capture.proof_examples import MAX_TOKENS, MIN_TOKENS, Pass
from qk_sniffer.errors import QkSnifferError
from qk_sniffer.logs import logger
from qk_sniffer.store.layout import Head, Layout
from qk_sniffer.store.parquet_files import open_parquet

log = logger(__name__)

MOST_REASON = 1000
"""The most characters of the reason for a proof that was not made."""

TOLERANCES = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The largest relative difference that counts as rounding, by the dtype of the model."""

Int64 = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Derived:
    """The vectors of a head from hooks: `rows` (rows, head_dim); over the whole pass, their `mean` (head_dim,) and the
    `spread`, the median of their distances from it."""

    rows: Vectors
    mean: Vectors
    spread: float


StoredRows = tuple[Int64, Vectors]
"""Positions (rows,) and vectors (rows, head_dim)."""


def prove(
    backbone: Backbone,
    layout: Layout,
    heads: Sequence[Head],
    passes: Sequence[Pass],
    ids: Mapping[int, npt.NDArray[np.int32]],
) -> dict[str, Any]:
    """Compares rows of `heads` in `layout` with vectors from hooks in `passes`. `ids` are token ids by example_id.

    Returns the manifest's `proof`: `proven` (None where the family has no hook path), the rows and heads that were
    compared, the largest of their positions, and of those in the first layers alone (`beyond`), each (layer, kind)
    without a compared row, the tolerance, and the largest difference by layer.
    """
    proof: dict[str, Any] = {"proven": None, "examples": sorted(ids), "max_tokens": MAX_TOKENS}
    eps = torch.finfo(backbone.dtype).eps
    largest: dict[int, float] = {}
    compared: set[Head] = set()
    rows, longest_position, beyond = 0, -1, {}
    for one, stored in zip(passes, _stored(layout, heads, passes), strict=True):
        if not stored:
            continue
        tokens = ids[one.example.example_id][: one.tokens]
        try:
            derived = _derived(backbone, tokens, {head: positions for head, (positions, _) in stored.items()})
        except QkSnifferError:
            raise
        except Exception as error:  # from the model's code, if it differs from what its family expects
            if one.first_layers:  # the memory may not hold it
                log.warning("no row beyond position %s is compared: %s", f"{MAX_TOKENS - 1:,}", error)
                continue
            reason = f"the hook path does not fit this model ({type(error).__name__}: {error})"
            return proof | {"reason": reason[:MOST_REASON]}
        if derived is None:
            return proof | {"reason": "no hook path is known for this family of models"}
        for head, (positions, vectors) in stored.items():
            difference = _difference(vectors, derived[head], eps)
            largest[head.layer] = float(np.maximum(largest.get(head.layer, 0.0), difference))  # NaN if either is
            compared.add(head)
            rows += len(positions)
        last = max(int(positions.max()) for positions, _ in stored.values())
        if one.first_layers:
            beyond = {"beyond": {"layers": sorted({head.layer for head in stored}), "longest_position": last}}
        else:
            longest_position = max(longest_position, last)
    tolerance = TOLERANCES[str(backbone.dtype).removeprefix("torch.")]
    covered = {(head.layer, head.kind) for head in compared}
    uncovered = sorted({(head.layer, head.kind) for head in heads} - covered)
    return (
        proof
        | beyond
        | {
            # `all` of `<=`, so that a difference of NaN proves nothing.
            "proven": bool(largest) and all(difference <= tolerance for difference in largest.values()),
            "rows": rows,
            "heads": len(compared),
            "longest_position": longest_position,
            "uncovered": [{"layer": layer, "kind": kind} for layer, kind in uncovered],
            "tolerance": tolerance,
            "largest_difference_by_layer": dict(sorted(largest.items())),
        }
    )


def _stored(layout: Layout, heads: Sequence[Head], passes: Sequence[Pass]) -> list[dict[Head, StoredRows]]:
    """Returns the rows of each pass, of the heads that have any. Opens each file once."""
    stored: list[dict[Head, StoredRows]] = [{} for _ in passes]
    for head in heads:
        group = head.layer, head.kind
        mine = [(number, one) for number, one in enumerate(passes) if group in one.rows]
        wanted = [(one.example.example_id, one.rows[group]) for _, one in mine]
        for (number, _), rows in zip(mine, rows_of_examples(layout.root / head.file, wanted), strict=True):
            if len(rows[0]):
                stored[number][head] = rows
    return stored


def rows_of_examples(path: Path, wanted: Sequence[tuple[int, Int64]]) -> list[StoredRows]:
    """Returns, for each (example_id, rows) in `wanted`, those of the numbered rows of a head's file that are of the
    example. Reads only the row groups that contain them."""
    if not wanted:
        return []
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        group_of = [np.searchsorted(starts, rows, side="right") - 1 for _, rows in wanted]
        read = np.unique(np.concatenate(group_of))
        table = file.read_row_groups(read.tolist(), columns=["example_id", "position", "vector"])
    # The first row of each group that was read, among all rows that were read.
    place = dict(zip(read.tolist(), np.cumsum([0, *(sizes[group] for group in read)]).tolist(), strict=False))
    ids, position = (table[name].to_numpy() for name in ("example_id", "position"))
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, table["vector"].type.list_size)
    found = []
    for (example_id, rows), groups in zip(wanted, group_of, strict=True):
        numbers = rows - starts[groups] + np.array([place[group] for group in groups.tolist()], np.int64)
        numbers = numbers[ids[numbers] == example_id]
        found.append((position[numbers].astype(np.int64), vectors[numbers]))
    return found


def _derived(
    backbone: Backbone, ids: npt.NDArray[np.int32], heads: Mapping[Head, npt.NDArray[np.int64]]
) -> dict[Head, Derived] | None:
    """Returns each head's vectors at its positions, from hooks on a plain forward pass; None without a hook path."""
    family = backbone.family
    length = min(MIN_TOKENS, backbone.num_positions or MIN_TOKENS)
    ids = np.pad(ids, (0, max(0, length - len(ids))))
    head_dims = {head.layer: head.head_dim for head in heads}
    modules = {module: layer for module, layer in backbone.attention_layers.items() if layer in head_dims}
    projected: dict[str, torch.Tensor] = {}  # by the attention module that is running
    rotary_calls: list[RotaryCall] = []
    derived: dict[Head, Derived] = {}
    hooks = []

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: projected.update({name: output})

    def derive(module: nn.Module, inputs: Any, arguments: dict[str, Any], output: Any) -> None:
        layer = modules[module]
        before = family.projected(module, projected, head_dims[layer])
        vectors: QueryKey | None = before
        if rotary_calls and not backbone.pre_rope:
            width = rotary_calls[0][0].shape[-1]
            vectors = family.rotated(module, *before, arguments.get("position_embeddings"), width)
        if vectors is not None and not (rotary_calls and backbone.pre_rope):
            vectors = family.after_rotary(module, *vectors)
        for head, positions in heads.items():
            if vectors is not None and head.layer == layer:
                query, key = vectors
                states = {"q": query, "k": key}[head.kind][0, head.head]
                rows = states[torch.from_numpy(positions).to(states.device)]
                mean = states.float().mean(0)
                spread = float((states.float() - mean).norm(dim=-1).median())
                derived[head] = Derived(rows.float().cpu().numpy(), mean.cpu().numpy(), spread)
        if len(derived) == len(heads):
            raise ForwardDone

    def begin(*_: Any) -> None:
        projected.clear()
        rotary_calls.clear()

    if not rotary_functions(modules, family):
        return None
    try:
        hooks += [module.register_forward_pre_hook(begin) for module in backbone.attention_layers]
        for module in modules:
            if (parts := family.projections(module)) is None:
                return None
            hooks += [part.register_forward_hook(keep(name)) for name, part in parts.items()]
            hooks.append(module.register_forward_hook(derive, with_kwargs=True))
        attention = banded() if backbone.banded_attention and len(ids) > MAX_TOKENS else nullcontext()
        with attention, watched_rotary(modules, family, rotary_calls), suppress(ForwardDone):
            backbone.run(torch.from_numpy(ids.astype(np.int64))[None])
    finally:
        for hook in hooks:
            hook.remove()
    return derived if len(derived) == len(heads) else None


def _difference(stored: Vectors, derived: Derived, eps: float = 0.0) -> float:
    """Returns the measure that the module docstring defines; NaN if only one of the vectors is not finite.

    NaN in both vectors counts as equal, and so does the same infinity. They do not count in the mean and the spread.
    """
    both = (np.isnan(stored) & np.isnan(derived.rows)) | (np.isinf(stored) & (stored == derived.rows))
    one, other = (np.where(both, 0, rows).astype(np.float64) for rows in (stored, derived.rows))
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return math.nan
    mean = np.where(np.isfinite(derived.mean), derived.mean, 0)
    beyond = np.linalg.norm(one - other) - eps * np.linalg.norm(other)
    typical = derived.spread * math.sqrt(len(other)) / 2 if math.isfinite(derived.spread) else 0.0
    spread = max(float(np.linalg.norm(np.where(both, 0, other - mean))), typical) or np.linalg.norm(other) or 1.0
    return max(0.0, float(beyond / spread))
