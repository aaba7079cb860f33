"""Proves statistics of all tokens: makes those of a few examples on two paths, and compares.

One path is that of the capture: its tap and its sums (`capture.py`, `moments.py`), in a forward pass over one example.
The other one is that of `proof.py`: hooks on a plain pass, whose vectors give count, mean and covariance in float64.
What the two paths do not have in common is wrong in one of them.

Three measures are taken of each head, stage and example, relative to the spread of the head's vectors, the root of the
trace of their covariance C: that of `proof.py` over some of the tap's vectors, and

    max(0, (||mean - mean'|| - eps ||mean'||) / spread)
    max(0, (||C - C'|| - 2 eps |x| spread) / ||C'||)

where ' marks the second path and |x| is the root of the mean square of the vectors' norms. Rounding of vectors changes
a mean and a covariance less than it changes the vectors, so the tolerance is that of rows. Counts that differ fail the
proof. A wrong head, position or rotation gives about 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import QueryKey
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.capture.capture import Capture
from qk_sniffer.capture.moments import Moments, Spans
from qk_sniffer.capture.proof import MOST_REASON, TOLERANCES, differences, padded
from qk_sniffer.capture.proof_examples import Pass
from qk_sniffer.capture.proof_vectors import NO_HOOKS, NO_VALUES, Derived, walk
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.selection import Selection
from qk_sniffer.config import SamplerConfig
from qk_sniffer.corpus.tokens import Tokens
from qk_sniffer.errors import QkSnifferError
from qk_sniffer.store.layout import Head
from qk_sniffer.store.statistics import Part, PartKey, stages_of
from qk_sniffer.text import one_line
from qk_sniffer.timing import Stages

NO_OUTPUTS = "statistics of outputs are not made a second time"

MOST_VECTORS = 64
"""The vectors of a head and example that are compared themselves, evenly spread over the example."""

Float64 = npt.NDArray[np.float64]


@dataclass
class _Watched(Moments):
    """Statistics that keep some of the vectors that go into them."""

    positions: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    vectors: dict[PartKey, npt.NDArray[np.float32]] = field(default_factory=dict)
    """(heads, positions, d), of the only text."""

    def add(self, key: PartKey, states: torch.Tensor, spans: Sequence[Spans]) -> None:
        super().add(key, states, spans)
        heads = torch.tensor(self.heads[key.layer, key.kind], device=states.device)
        kept = states[0, heads][:, torch.from_numpy(self.positions).to(states.device)]
        self.vectors[key] = kept.float().cpu().numpy()


def prove_statistics(
    backbone: Backbone,
    heads: Sequence[Head],
    selection: Selection,
    moments: Moments,
    passes: Sequence[Pass],
    tokens: Mapping[int, Tokens],
    *,
    layers: Sequence[LayerFacts],
    min_tokens: int,
    segments: list[str] | None = None,
) -> dict[str, Any]:
    """Compares statistics of `heads` in `passes`, one at a time. `tokens` are those of the examples by key.

    `moments` are of the heads of `selection`, which are `heads`, in `layers`. Short texts are padded to `min_tokens`,
    as in `prove`. `segments` are `sampler.segments`. Statistics of outputs are not compared.

    Returns the manifest's `proof.statistics`, with `proven`: None where the family has no hook path, or no token has a
    finite vector.
    """
    config = moments.config
    found: dict[str, Any] = {"proven": None, "stages": [*config.stages]}
    largest: dict[int, float] = {}
    compared: set[Head] = set()
    examples, num_tokens = set(), 0
    for one in passes:
        example = tokens[one.example.key]
        example = example.first(one.tokens)
        watched = _Watched(config, moments.heads, moments.pairs, positions=_spread(config.skip_tokens, one.tokens))
        try:
            parts, spans = _of_tap(backbone, selection, watched, example, segments)
            counted = np.array([position for span in spans for position in range(*span)], np.int64)
            of_heads = _largest(backbone, heads, layers, watched, parts, example, counted, min_tokens)
        except QkSnifferError:
            raise
        except Exception as error:  # from the model's code, if it differs from what its family expects
            reason = f"the hook path does not fit this model ({type(error).__name__}: {error})"
            return found | {"reason": one_line(reason, MOST_REASON)}
        if of_heads is None:
            return found | {"reason": NO_HOOKS}
        for head, difference in of_heads.items():
            largest[head.layer] = float(np.maximum(largest.get(head.layer, 0.0), difference))  # NaN if either
            compared.add(head)
        if of_heads:
            examples.add(one.example.example_id)
            num_tokens += len(counted)
    if not compared:
        return found | {"reason": "no token of the compared examples has a finite vector"}
    tolerance = TOLERANCES[str(backbone.dtype).removeprefix("torch.")]
    covered = {(head.layer, head.kind) for head in compared}
    uncovered = {(head.layer, head.kind) for head in heads if stages_of(head.kind, config.stages)} - covered
    reasons = {"v": {"reason": NO_VALUES}, "o": {"reason": NO_OUTPUTS}}
    return found | {
        "proven": all(each <= tolerance for each in largest.values()),
        "examples": sorted(examples),
        "tokens": num_tokens,
        "heads": len(compared),
        "uncovered": [{"layer": layer, "kind": kind} | reasons.get(kind, {}) for layer, kind in sorted(uncovered)],
        "tolerance": tolerance,
        "largest_difference_by_layer": dict(sorted(largest.items())),
    }


def _spread(start: int, stop: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(start, stop - 1, min(stop - start, MOST_VECTORS)).round().astype(np.int64))


def _of_tap(
    backbone: Backbone, selection: Selection, moments: Moments, example: Tokens, segments: list[str] | None
) -> tuple[dict[PartKey, Part], Spans]:
    """Returns the statistics of an example as the capture makes them, and the tokens that they are of."""
    sampler = Sampler(SamplerConfig(type="none", segments=segments))
    capture = Capture(backbone, selection, sampler, None, columns=(), stages=Stages(), moments=moments)
    plan = capture.plan([example])
    capture.run(plan)
    return moments.take(), plan.spans[0]


def _largest(
    backbone: Backbone,
    heads: Sequence[Head],
    layers: Sequence[LayerFacts],
    watched: _Watched,
    parts: Mapping[PartKey, Part],
    example: Tokens,
    counted: npt.NDArray[np.int64],
    min_tokens: int,
) -> dict[Head, float] | None:
    """Returns the largest of the measures of each head that has finite vectors; None without a hook path.

    `counted` are the positions of the tokens that the statistics are of.
    """
    eps = torch.finfo(backbone.dtype).eps
    of_key: dict[tuple[int, str], list[Head]] = {}
    for head in heads:
        of_key.setdefault((head.layer, head.kind), []).append(head)
    found: dict[Head, float] = {}

    stages = [*watched.config.stages]
    known: set[tuple[int, str]] = set()

    def see(layer: int, vectors: Mapping[str, QueryKey], value: torch.Tensor | None) -> None:
        states = {} if value is None else {PartKey(layer, "v", "post"): value}
        for stage, of_stage in vectors.items():
            states |= {PartKey(layer, kind, stage): one for kind, one in zip("qk", of_stage, strict=True)}
            known.add((layer, stage))
        for key, of_kind in states.items():
            if key not in parts:
                continue
            for index, head in enumerate(sorted(of_key[layer, key.kind], key=lambda head: head.head)):
                rows = of_kind[0, head.head, : example.num_tokens].double().cpu().numpy()
                measured = _measure(watched, parts[key], key, index, rows, counted, eps)
                if measured is not None:
                    found[head] = float(np.maximum(found.get(head, 0.0), measured))

    wanted = {head.layer for head in heads}
    used = [layer for layer in layers if layer.heads.layer in wanted]
    is_known = walk(backbone, padded(example.ids, backbone, min_tokens), used, stages, see)
    return found if is_known and known == {(layer, stage) for layer in wanted for stage in stages} else None


def _measure(
    watched: _Watched,
    part: Part,
    key: PartKey,
    index: int,
    vectors: Float64,
    counted: npt.NDArray[np.int64],
    eps: float,
) -> float | None:
    """Returns the largest of the measures of the head at `index`, whose hooked vectors (n, d) are of the whole example.

    None if none of them is finite on either path; NaN if the paths count other tokens.
    """
    used = vectors[counted]
    finite = used[np.isfinite(used).all(axis=1)]
    if len(finite) != part.count[index] or len(used) != part.count[index] + part.nonfinite[index]:
        return math.nan
    if not len(finite):
        return None
    mean = finite.mean(axis=0)
    centered = finite - mean
    moment = centered.T @ centered if part.moment.ndim == 3 else np.square(centered).sum(axis=0)
    square = float(np.square(centered).sum())
    spread, size = math.sqrt(square / len(finite)), math.sqrt(float(np.square(finite).sum()) / len(finite))
    of_mean = float(np.linalg.norm(part.mean[index] - mean)) - eps * float(np.linalg.norm(mean))
    of_moment = float(np.linalg.norm(part.moment[index] - moment)) - 2 * eps * size * spread * len(finite)
    rows = vectors[watched.positions].astype(np.float32)
    middle = float(np.median(np.linalg.norm(centered, axis=1)))
    of_rows, _ = differences(watched.vectors[key][index], Derived(rows, mean.astype(np.float32), middle), eps)
    return max(
        0.0,
        of_rows,
        of_mean / (spread or size or 1.0),
        of_moment / (float(np.linalg.norm(moment)) or size**2 * len(finite) or 1.0),
    )
