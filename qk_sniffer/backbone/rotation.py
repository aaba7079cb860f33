"""Finds how a decoder rotates queries and keys: frequencies, factor, and the components that turn together.

Nothing is taken from names alone. The decoder's rotary embeddings are run at a few positions, on both sides of the
length at which their frequencies change, and each layer's rotary function is compared with every rotation that these
frequencies allow. The rotation that explains the function is recorded, and otherwise the reason that none is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from qk_sniffer.backbone import rotary
from qk_sniffer.backbone.family import Family, RotaryCall, layer_type
from qk_sniffer.errors import CaptureError

PAIRS = ("halves", "neighbours", "neighbours to halves")
"""The components that turn together: i and i + m of the 2 m rotated ones (`halves`), or 2 i and 2 i + 1
(`neighbours`). With `neighbours to halves`, the latter are stored as halves after the rotation."""

LARGEST_DIFFERENCE = 0.05
"""Of a rotary function from its rotation, relative to the change that it makes. A wrong frequency gives about 1."""

NOT_RECORDED = "not recorded: "
"""The start of the reason that a rotation, or its frequencies in long texts, are not recorded."""

_CLOSE = 2e-3
"""Of cosines and sines; float32 angles at a position of 100,000 have an error of about this size."""


@dataclass(frozen=True, eq=False)
class Frequencies:
    """The frequencies of a rotary embedding."""

    inv_freq: list[float]
    """(m,): the angles at position 1, in radians."""
    attention_scaling: float
    """The factor of the rotated components."""
    boundary: int | None = None
    """The most tokens of a text with these frequencies; None for texts of any length."""
    long: dict[str, Any] | str | None = None
    """For a text of n tokens beyond the boundary: `inv_freq` and `attention_scaling`; or the `rope_theta` b and
    `factor` f of dynamic frequencies, whose base is b (f n / boundary - f + 1)^(2m / (2m - 2)); or the reason that
    they are not recorded."""
    layer_type: str | None = None
    """The kind of layer that these frequencies are of; None for any."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the form of the manifest, in which frequencies for texts of any length have no boundary."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Rotation:
    """The rotation of a layer's queries and keys."""

    frequencies: str
    """The name of the frequencies."""
    pairs: str
    """One of `PAIRS`."""
    first: int
    """The first rotated component of a head."""
    direction: int
    """1 if the first component of a pair turns towards the second, -1 if away from it."""
    changed_after: bool
    """Whether the model scales or normalizes queries or keys after the rotation."""


def frequencies(decoder: nn.Module, config: PretrainedConfig) -> dict[str, Frequencies]:
    """Returns the frequencies of the decoder's rotary embeddings, by the name of the module and the kind of layer."""
    found: dict[str, Frequencies] = {}
    state = rotary.RotaryState(decoder)
    try:
        with torch.inference_mode():
            for name, module in decoder.named_modules():
                if "Rotary" in type(module).__name__:
                    for kind in rotary.kinds(module):
                        if (one := _of_module(module, kind, config)) is not None:
                            found[f"{name}.{kind}" if kind else name] = one
                if "Attention" not in type(module).__name__:
                    continue
                for table, values in rotary.tables(module):
                    if table not in found and (inv_freq := _of_table(values)) is not None:
                        found[table] = Frequencies(inv_freq, 1.0)
    finally:
        state.restore()
    return found


def rotation(
    module: nn.Module,
    calls: Sequence[RotaryCall],
    query: torch.Tensor,
    key: torch.Tensor,
    known: Mapping[str, Frequencies],
    family: Family,
    of_key: Rotation | None = None,
) -> Rotation | str | None:
    """Returns the rotation of a layer from its rotary calls; the reason if none of `known` explains them.

    None for a layer that is not rotated. `query` and `key` are the vectors that attention receives. `of_key` is the
    rotation of an earlier layer, if `key` is that layer's: then the query must have the same one.
    """
    if not calls:
        return None
    try:
        pairs = _before_and_after(module, calls, query, query if of_key is not None else key, family)
    except CaptureError:
        pairs = []
    if not pairs:
        return (
            f"{NOT_RECORDED}{type(module).__name__} attends with vectors that no rotary function of its layer returned"
        )
    best: tuple[float, Rotation] | None = None
    for name, candidate in _by_kind(known, layer_type(module)):
        for layout, first, direction in _layouts(candidate, query.shape[-1]):
            one = Rotation(name, layout, first, direction, family.changed_after_rotary)
            difference = max(_difference(before, after, candidate, one) for before, after in pairs)
            if best is None or difference < 0.7 * best[0]:  # of two that are alike, the first
                best = difference, one
    if best is None or best[0] > LARGEST_DIFFERENCE:
        reason = (
            "the decoder has no inverse frequencies" if best is None else "no frequencies of the decoder explain it"
        )
        return f"{NOT_RECORDED}{type(module).__name__} calls a rotary function, and {reason}"
    if of_key not in (None, best[1]):
        return f"{NOT_RECORDED}{type(module).__name__} rotates its queries otherwise than the earlier layer of its keys"
    return best[1]


def rotate(vectors: torch.Tensor, candidate: Frequencies, rotation: Rotation) -> torch.Tensor:
    """Returns `vectors` (..., n, d) of positions 0 to n - 1 of a short text, rotated in float64."""
    inv_freq, scaling = torch.tensor(candidate.inv_freq, dtype=torch.float64), candidate.attention_scaling
    size, first, layout = len(inv_freq), rotation.first, rotation.pairs
    halves = first + torch.arange(size), first + size + torch.arange(size)
    neighbours = first + 2 * torch.arange(size), first + 2 * torch.arange(size) + 1
    (one, other) = halves if layout == "halves" else neighbours
    (to_one, to_other) = neighbours if layout == "neighbours" else halves
    angle = torch.arange(vectors.shape[-2], dtype=torch.float64)[:, None] * inv_freq
    cos, sin = scaling * angle.cos(), rotation.direction * scaling * angle.sin()
    a, b = vectors[..., one], vectors[..., other]
    turned = vectors.clone()
    turned[..., to_one], turned[..., to_other] = a * cos - b * sin, a * sin + b * cos
    return turned


def _before_and_after(
    module: nn.Module, calls: Sequence[RotaryCall], query: torch.Tensor, key: torch.Tensor, family: Family
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns queries and keys (heads, n, d) before and after the rotation, in float64 on the CPU.

    Empty if the rotary function returns heads of another width than attention receives.

    Raises:
        CaptureError: query or key does not follow from the rotary calls.
    """
    if family.changed_after_rotary:
        pairs = [_heads_first(before, after, query.shape[2]) for before, after in calls[:2]]
    else:
        before_query, before_key = family.before_rotary(module, calls, query, key)
        pairs = [(before_query, query), (before_key, key)]
    if any(before.shape != after.shape or before.shape[-1] != query.shape[-1] for before, after in pairs):
        return []
    return [(before[0].double().cpu(), after[0].double().cpu()) for before, after in pairs]


def _heads_first(before: torch.Tensor, after: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (before, after) if before.shape[2] == n else (before.transpose(1, 2), after.transpose(1, 2))


def _by_kind(known: Mapping[str, Frequencies], kind: str | None) -> Iterator[tuple[str, Frequencies]]:
    """Yields the frequencies, those of the layer's own kind first."""
    yield from sorted(known.items(), key=lambda item: item[1].layer_type != kind)


def _layouts(candidate: Frequencies, head_dim: int) -> Iterator[tuple[str, int, int]]:
    """Yields the possible (pairs, first, direction) of a rotation."""
    width = 2 * len(candidate.inv_freq)
    if width <= head_dim:
        yield from product(PAIRS, dict.fromkeys((0, head_dim - width)), (1, -1))


def _difference(before: torch.Tensor, after: torch.Tensor, candidate: Frequencies, rotation: Rotation) -> float:
    change = torch.linalg.vector_norm(after - before)
    difference = torch.linalg.vector_norm(rotate(before, candidate, rotation) - after)
    return float(difference / change) if change > 0 else 0.0


def _of_module(module: nn.Module, kind: str, config: PretrainedConfig) -> Frequencies | None:
    """Returns the frequencies that the module of a kind of layer uses; None if its output does not follow from any."""
    boundary = rotary.boundary_of(config, kind)
    short = _used(module, kind, boundary or 64)
    if short is None:
        return None
    inv_freq, scaling = short
    if boundary is None:
        return Frequencies(inv_freq.tolist(), scaling, layer_type=kind or None)
    long = _long(module, kind, boundary, config)
    if long == {"inv_freq": inv_freq.tolist(), "attention_scaling": scaling}:
        return Frequencies(inv_freq.tolist(), scaling, layer_type=kind or None)
    return Frequencies(inv_freq.tolist(), scaling, boundary, long, layer_type=kind or None)


def _long(module: nn.Module, kind: str, boundary: int, config: PretrainedConfig) -> dict[str, Any] | str:
    """Returns the frequencies for texts of more tokens than the boundary, in the form of `Frequencies.long`."""
    lengths = boundary + 1, 3 * boundary
    first, second = (_used(module, kind, length) for length in lengths)
    if first is None or second is None:
        return f"{NOT_RECORDED}{type(module).__name__} uses other frequencies in long texts than it holds"
    if torch.equal(first[0], second[0]) and first[1] == second[1]:
        return {"inv_freq": first[0].tolist(), "attention_scaling": first[1]}
    rope = rotary.parameters_of(config, kind)
    formula: dict[str, Any] = {
        "rope_theta": rope.get("rope_theta"),
        "factor": rope.get("factor"),
        "attention_scaling": first[1],
    }
    if None not in formula.values():
        expected = [dynamic(formula, boundary, length, len(first[0])) for length in lengths]
        if all(torch.allclose(one, used[0], rtol=1e-4) for one, used in zip(expected, (first, second), strict=True)):
            return formula
    return f"{NOT_RECORDED}the frequencies of {type(module).__name__} in long texts follow another formula"


def dynamic(formula: Mapping[str, float], boundary: int, length: int, size: int) -> torch.Tensor:
    """Returns the `size` inverse frequencies of a text of `length` tokens by the formula of `Frequencies.long`."""
    theta, factor, width = formula["rope_theta"], formula["factor"], 2 * size
    base = theta * (factor * length / boundary - factor + 1) ** (width / (width - 2))
    return float(base) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def _used(module: nn.Module, kind: str, length: int) -> tuple[torch.Tensor, float] | None:
    """Runs the module for a text of `length` tokens; returns the inverse frequencies (m,) and the factor that it uses.

    The module may hold frequencies that it does not use. Those before and after the run are tried; None if neither
    explains its output.
    """
    name = f"{kind}_inv_freq" if kind else "inv_freq"
    held = getattr(module, name)
    if held.is_meta:
        return None
    positions = torch.tensor([sorted({0, 1, 7, length // 2, length - 1} & set(range(length)))], device=held.device)
    states = torch.zeros(1, positions.shape[1], 2, device=held.device)
    before = held.double().cpu()
    try:
        output = module(states, positions, kind) if kind else module(states, positions)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
    turned = _as_complex(output)
    if turned is None:
        return None
    scaling = float(turned.abs().mean())
    original = getattr(module, f"{kind}_original_inv_freq" if kind else "original_inv_freq", held)
    for inv_freq in (getattr(module, name).double().cpu(), before, original.double().cpu()):
        angle = (positions[0].cpu()[:, None] * inv_freq).to(torch.float64)
        expected = scaling * torch.polar(torch.ones_like(angle), angle)
        arrangements = expected, torch.cat([expected, expected], -1), expected.repeat_interleave(2, -1)
        if any(one.shape == turned.shape and (one - turned).abs().max() < 4 * _CLOSE for one in arrangements):
            declared = getattr(module, f"{kind}_attention_scaling" if kind else "attention_scaling", scaling)
            return inv_freq, declared if abs(declared - scaling) < 1e-5 * scaling else float(f"{scaling:.6g}")
    return None


def _as_complex(output: Any) -> torch.Tensor | None:
    """Returns the output of a rotary embedding, cosines and sines or complex numbers, as complex numbers (n, width)."""
    if isinstance(output, torch.Tensor) and output.is_complex():
        values = output
    elif isinstance(output, tuple) and len(output) == 2 and output[0].shape == output[1].shape:
        values = torch.complex(output[0].double(), output[1].double())
    else:
        return None
    values = values.reshape(-1, *values.shape[-2:])[0]
    return values.to(torch.complex128).cpu()


def _of_table(table: torch.Tensor) -> list[float] | None:
    """Returns the inverse frequencies of a table of sines and cosines (positions, 2 m); None for another table."""
    sin, cos = table.double().cpu().chunk(2, dim=-1)
    if len(table) < 2 or sin.shape != cos.shape:
        return None
    inv_freq = torch.atan2(sin[1], cos[1])
    angle = torch.arange(len(table), dtype=torch.float64)[:, None] * inv_freq
    close = torch.allclose(angle.sin(), sin, atol=_CLOSE) and torch.allclose(angle.cos(), cos, atol=_CLOSE)
    return inv_freq.tolist() if close else None
