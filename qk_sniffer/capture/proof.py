"""Proves a dataset: derives the stored rows of a few examples a second time, on another path, and compares.

The other path is a plain forward pass of the unmodified model over one example, with the user's own attention kernel:
no tap, no bands, no batch. Hooks on the query and key projections (or the norms behind them) give the vectors before
RoPE. The model's own rotary function rotates them with the model's own embedding. A family defines any further steps of
its attention. Stored rows that differ by more than rounding were captured wrongly.

The measure is taken over all rows of one head and example, with Frobenius norms:

    max(0, (||stored - derived|| - eps ||derived||) / ||derived - mean||)

`mean` is the head's mean over the example: all vectors of a head with a large bias are alike, so the norm alone would
hide errors. `eps` is that of the model's dtype: the stored vectors have no more digits. Rounding comes from batches of
another shape and from banded attention, and grows with depth. A wrong head, position or rotation gives about 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import QueryKey, RotaryCall
from qk_sniffer.backbone.tap import rotary_functions, watched_rotary
from qk_sniffer.errors import QkSnifferError
from qk_sniffer.store.layout import Head, Layout
from qk_sniffer.store.parquet_files import open_parquet, read_parquet

MAX_TOKENS = 4096
"""Longer examples are cut to this number of tokens. Later tokens do not change the vectors of earlier ones."""

MIN_TOKENS = 257
"""Shorter examples are padded on the right to this number of tokens. No model has as many heads, so that the shapes of
states are unambiguous."""

TOLERANCES = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The largest relative difference that counts as rounding, by the dtype of the model."""

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Derived:
    """The vectors of a head from hooks: `rows` (rows, head_dim), and the `mean` (head_dim,) over the whole pass."""

    rows: Vectors
    mean: Vectors


StoredRows = tuple[npt.NDArray[np.int64], Vectors]
"""Positions (rows,) and vectors (rows, head_dim)."""


def prove(
    backbone: Backbone, layout: Layout, heads: Sequence[Head], examples: Mapping[int, npt.NDArray[np.int32]]
) -> dict[str, Any]:
    """Compares the stored rows of `examples` (token ids by example_id) in `layout` with vectors from hooks.

    Returns the manifest's `proof`: `proven` (None where the family has no hook path), the tolerance, and the largest
    difference by layer.
    """
    proof: dict[str, Any] = {"proven": None, "examples": sorted(examples), "max_tokens": MAX_TOKENS}
    boundary = backbone.length_boundary
    if boundary is not None and max(MIN_TOKENS, *map(len, examples.values())) > boundary:
        reason = f"this model's rotary frequencies depend on the length of texts of more than {boundary} tokens"
        return proof | {"reason": reason}
    eps = torch.finfo(backbone.dtype).eps
    largest: dict[int, float] = {}
    for example_id, ids in examples.items():
        stored = _stored(layout, heads, example_id)
        try:
            derived = _derived(backbone, ids[:MAX_TOKENS], {head: positions for head, (positions, _) in stored.items()})
        except QkSnifferError:
            raise
        except Exception as error:  # from the model's code, if it differs from what its family expects
            return proof | {"reason": f"the hook path does not fit this model ({type(error).__name__}: {error})"}
        if derived is None:
            return proof | {"reason": "no hook path is known for this family of models"}
        for head, (_, vectors) in stored.items():
            largest[head.layer] = max(largest.get(head.layer, 0.0), _difference(vectors, derived[head], eps))
    tolerance = TOLERANCES[str(backbone.dtype).removeprefix("torch.")]
    return proof | {
        # `all` of `<=`, so that a difference of NaN proves nothing.
        "proven": bool(largest) and all(difference <= tolerance for difference in largest.values()),
        "tolerance": tolerance,
        "largest_difference_by_layer": dict(sorted(largest.items())),
    }


def _stored(layout: Layout, heads: Sequence[Head], example_id: int) -> dict[Head, StoredRows]:
    stored = {}
    for head in heads:
        positions, vectors = rows_of_example(layout.root / head.file, example_id)
        near = positions < MAX_TOKENS
        if near.any():
            stored[head] = positions[near], vectors[near]
    return stored


def examples_with_rows(layout: Layout, heads: Sequence[Head]) -> set[int]:
    """Returns the example_ids of which any head has rows. The heads of one layer and kind have the same."""
    first_heads = {(head.layer, head.kind): head for head in reversed(heads)}
    found: set[int] = set()
    for head in first_heads.values():
        ids = read_parquet(layout.root / head.file, columns=["example_id"])["example_id"]
        found |= set(ids.unique().to_pylist())
    return found


def rows_of_example(path: Path, example_id: int) -> StoredRows:
    """Returns the rows of one example in a head's file. Reads only the row groups that contain them in full."""
    with open_parquet(path) as file:
        found, start = [], 0
        ids = file.read(columns=["example_id"])["example_id"].to_numpy()
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            if (ids[start:stop] == example_id).any():
                found.append(group)
            start = stop
        table = file.read_row_groups(found, columns=["example_id", "position", "vector"])
    mine = table["example_id"].to_numpy() == example_id
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, table["vector"].type.list_size)
    return table["position"].to_numpy()[mine].astype(np.int64), vectors[mine]


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
                derived[head] = Derived(rows.float().cpu().numpy(), states.float().mean(0).cpu().numpy())

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
        with torch.inference_mode(), watched_rotary(modules, family, rotary_calls):
            backbone.run(torch.from_numpy(ids.astype(np.int64))[None])
    finally:
        for hook in hooks:
            hook.remove()
    return derived if len(derived) == len(heads) else None


def _difference(stored: Vectors, derived: Derived, eps: float = 0.0) -> float:
    """Returns the measure that the module docstring defines. NaN in both vectors counts as equal."""
    both = np.isnan(stored) & np.isnan(derived.rows)
    one, other = (np.where(both, 0, rows).astype(np.float64) for rows in (stored, derived.rows))
    mean = np.where(np.isnan(derived.mean), 0, derived.mean)
    with np.errstate(invalid="ignore"):  # inf - inf
        beyond = np.linalg.norm(one - other) - eps * np.linalg.norm(other)
    spread = np.linalg.norm(np.where(both, 0, other - mean)) or np.linalg.norm(other) or 1.0
    # Not max(0, beyond), which would turn NaN into 0.
    return 0.0 if beyond <= 0 else float(beyond / spread)
