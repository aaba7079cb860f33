"""Derives vectors of heads from hooks on a plain forward pass of the unmodified model, for the proof (`proof.py`)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.exact_attention import Attended, exact_attention
from qk_sniffer.backbone.family import QueryKey, RotaryCall
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.masks import Visible
from qk_sniffer.backbone.tap import ForwardDone, rotary_functions, watched_rotary
from qk_sniffer.capture.proof_examples import MAX_TOKENS, LayerKind
from qk_sniffer.store.layout import ATTENTION, Head

NO_HOOKS = "no hook path is known for this family of models"
NO_VALUES = "no hook path is known for the values of this family of models"

SAMPLE = 8
"""The tokens of a pass that the mean and the spread of outputs are of, next to the compared ones."""

Int64 = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Derived:
    """The vectors of a head from hooks: `rows` (rows, d); over the whole pass, their `mean` (d,) and the `spread`, the
    median of their distances from it. Those of outputs are over some tokens of the pass."""

    rows: Vectors
    mean: Vectors
    spread: float
    rounding: npt.NDArray[np.float64] | None = None
    """(rows,): the norm of a difference that is rounding of the kernel; None for none."""


OnAttended = Callable[[int, Attended], None]
"""Receives a layer, and its queries and keys after RoPE with the rule by which they attend, without values."""

See = Callable[[int, Mapping[str, QueryKey], torch.Tensor | None], None]
"""Receives a layer, its queries and keys (1, heads, n, d) by stage, and its values (1, K, n, w); None if the family's
hooks do not show them. A stage is missing if its vectors are not known."""


def walk(
    backbone: Backbone, ids: npt.NDArray[np.int32], layers: Sequence[LayerFacts], stages: Collection[str], see: See
) -> bool:
    """Derives the vectors of all tokens in `layers`, from hooks on a plain forward pass over `ids`.

    Calls `see` with each layer. Returns whether a hook path is known.
    """
    family = backbone.family
    facts = {layer.heads.layer: layer for layer in layers}
    modules = {module: layer for module, layer in backbone.attention_layers.items() if layer in facts}
    projected: dict[str, torch.Tensor] = {}  # by the attention module that is running
    rotary_calls: list[RotaryCall] = []
    waiting = {*facts}
    hooks = []

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: projected.update({name: output})

    def show(module: nn.Module, inputs: Any, arguments: dict[str, Any], output: Any) -> None:
        layer, is_rotated = facts[modules[module]], bool(rotary_calls)
        before = family.projected(module, projected, layer.heads.head_dim)
        found: dict[str, QueryKey] = {}
        for stage in stages:
            vectors: QueryKey | None = before
            if is_rotated and stage == "post":
                width = rotary_calls[0][0].shape[-1]
                vectors = family.rotated(module, *before, arguments.get("position_embeddings"), width)
            if vectors is not None and not (is_rotated and stage == "pre"):
                vectors = family.after_rotary(module, *vectors)
            if vectors is not None:
                found[stage] = vectors
        value = None
        if isinstance(layer.value_dim, int):
            value = family.projected_value(module, projected, layer.value_dim)
        see(layer.heads.layer, found, value)
        waiting.discard(layer.heads.layer)
        if not waiting:
            raise ForwardDone

    def begin(*_: Any) -> None:
        projected.clear()
        rotary_calls.clear()

    if not rotary_functions(modules, family):
        return False
    try:
        hooks += [module.register_forward_pre_hook(begin) for module in backbone.attention_layers]
        for module in modules:
            if (parts := family.projections(module)) is None:
                return False
            hooks += [part.register_forward_hook(keep(name)) for name, part in parts.items()]
            hooks.append(module.register_forward_hook(show, with_kwargs=True))
        attention = backbone.bands() if len(ids) > MAX_TOKENS else nullcontext()
        with attention, watched_rotary(modules, family, rotary_calls), suppress(ForwardDone):
            backbone.run(torch.from_numpy(ids.astype(np.int64))[None])
    finally:
        for hook in hooks:
            hook.remove()
    return not waiting


def derive(
    backbone: Backbone,
    ids: npt.NDArray[np.int32],
    heads: Mapping[Head, Int64],
    layers: Sequence[LayerFacts],
    on_attended: OnAttended | None = None,
) -> tuple[dict[Head, Derived], dict[LayerKind, str]] | None:
    """Returns each head's vectors at its positions, and the reason for each (layer, kind) whose vectors are not known.

    Returns None without a hook path for queries and keys. All heads of a layer and kind have the same positions.
    `layers` have the facts of their layers. `on_attended` is called with each layer of `heads` whose attention follows
    from its vectors; the others have a reason, of the kind `ATTENTION`.
    """
    facts = {layer.heads.layer: layer for layer in layers}
    stage = "pre" if backbone.pre_rope else "post"
    derived: dict[Head, Derived] = {}
    reasons: dict[LayerKind, str] = {}

    def see(layer: int, vectors: Mapping[str, QueryKey], value: torch.Tensor | None) -> None:
        mine = {head: positions for head, positions in heads.items() if head.layer == layer}
        states = dict(zip(("q", "k"), vectors[stage], strict=True)) if stage in vectors else {}
        states |= {} if value is None else {"v": value}
        for head, positions in mine.items():
            if head.kind in states:
                derived[head] = _rows(states[head.kind][0, head.head], positions)
        unknown = _unknown_attention(facts[layer]) if "post" in vectors else NO_HOOKS
        if on_attended is not None and unknown is None:
            on_attended(layer, _attended(*vectors["post"], None, facts[layer]))
        elif on_attended is not None and unknown is not None:
            reasons[layer, ATTENTION] = unknown
        outputs = {head: positions for head, positions in mine.items() if head.kind == "o"}
        if value is None:
            reasons.update({(head.layer, head.kind): NO_VALUES for head in mine if head.kind in ("v", "o")})
        elif outputs and unknown is not None:
            reasons[layer, "o"] = unknown
        elif outputs:
            derived.update(_outputs(outputs, *vectors["post"], value, facts[layer], backbone.dtype))

    wanted = [facts[layer] for layer in sorted({head.layer for head in heads})]
    attends = on_attended is not None or any(head.kind == "o" for head in heads)
    stages = {stage, "post"} if attends else {stage}
    is_known = walk(backbone, ids, wanted, stages, see)
    is_known &= all(head in derived or (head.layer, head.kind) in reasons for head in heads)
    return (derived, reasons) if is_known else None


def _rows(states: torch.Tensor, positions: Int64) -> Derived:
    """Returns the rows of a head's states (n, d)."""
    rows = states[torch.from_numpy(positions).to(states.device)]
    return Derived(rows.float().cpu().numpy(), *_spread(states))


def _spread(states: torch.Tensor) -> tuple[Vectors, float]:
    """Returns the mean of states (n, d), and the median of their distances from it."""
    mean = states.float().mean(0)
    return mean.cpu().numpy(), float((states.float() - mean).norm(dim=-1).median())


def _unknown_attention(layer: LayerFacts) -> str | None:
    """Returns why the attention of a layer does not follow from its queries and keys; None if it does."""
    if layer.position_bias:
        return "attention is not derived where a bias is added to the logits"
    if layer.sparse_attention:
        return "attention is not derived where a query sees only some of the keys before it"
    if layer.heads.hides_keys and layer.attention_chunk is None:
        return "attention is not derived where it is not known which keys a query sees"
    return None


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, layer: LayerFacts) -> Attended:
    """Returns the vectors (1, heads, n, d) of a layer with the rule by which they attend."""
    return Attended(
        query[0],
        key[0],
        None if value is None else value[0],
        Visible(layer.heads.sliding_window, layer.attention_chunk, is_sparse=False),
        scale=layer.softmax_scale,
        softcap=layer.softcap,
        sinks=None if layer.sinks is None else torch.tensor(layer.sinks, dtype=torch.float64),
    )


def _outputs(
    heads: Mapping[Head, Int64],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: LayerFacts,
    dtype: torch.dtype,
) -> dict[Head, Derived]:
    """Returns the outputs of a layer's heads, from its vectors (1, heads, n, d)."""
    positions = next(iter(heads.values()))
    sample = np.linspace(0, query.shape[2] - 1, SAMPLE).round().astype(np.int64)
    at = np.unique(np.concatenate([positions, sample]))
    attended = _attended(query, key, value, layer)
    exact = exact_attention(attended, at.tolist())
    rounding = torch.zeros(exact.shape[:2], dtype=exact.dtype)
    if dtype != torch.float32:
        rounded = exact_attention(attended, at.tolist(), dtype)
        rounded = torch.where(torch.isfinite(rounded), rounded, exact)  # logits beyond float16 are infinite if rounded
        rounding = 4 * (rounded - exact).norm(dim=-1)
    rows = np.searchsorted(at, positions)
    derived = {}
    for head in heads:
        states = exact[:, head.head]
        derived[head] = Derived(
            states[rows].float().cpu().numpy(), *_spread(states), rounding[rows, head.head].double().cpu().numpy()
        )
    return derived
