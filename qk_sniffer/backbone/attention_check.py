"""Checks attention kernels at a few positions of long texts, inside the forward passes that capture vectors.

A kernel that is wrong for long texts changes the vectors of all later layers, and a second forward pass with the same
kernel repeats the error. For one layer of each kind of attention, the output of the kernel at a few query positions is
therefore compared with softmax(q K) V, computed in float64 from the queries, keys and values that the kernel received.
Which keys a query sees follows from the facts of the layer, not from the kernel's mask, so that a wrong mask is found
as well. `attention_check` runs at the longest text so far, and so once in most jobs.

The difference at one position and head is

    max(0, ||output - exact|| - 4 ||rounded - exact||) / ||exact||

`rounded` is computed with logits and weights that are rounded to the dtype of the model, as simple kernels do. Large
logits have large rounding errors, which are no fault.

Shapes: H query heads, K key heads, P positions, n tokens, d head_dim, w width of a value.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qk_sniffer.backbone.attention_terms import unknown_argument
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.masks import Visible
from qk_sniffer.backbone.tap import KernelRun
from qk_sniffer.logs import logger
from qk_sniffer.text import compact_ranges

log = logger(__name__)

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest difference that counts as rounding, by the dtype of the model."""

PIECE_BYTES = 32 << 20
"""The keys that are widened at a time take about this much memory."""

BOUNDARY = 65536
"""Kernels with 32-bit indices are known to fail from about this many tokens on."""

NO_KERNEL = "this model's attention calls no kernel of transformers' attention interface"

_NOTHING = -1e30
"""The maximum of no logits. Finite, because inf - inf is not a number."""


class _SkippedError(Exception):
    """The check is not possible; the text gives the reason."""


class AttentionCheck:
    """The checks of one job in this process."""

    def __init__(self, layers: Sequence[LayerFacts], family: Family, dtype: torch.dtype) -> None:
        """`layers` are those that the forward passes run."""
        first: dict[str, LayerFacts] = {}
        for layer in layers:
            first.setdefault(kind_of(layer), layer)
        self._layers = {layer.heads.layer: layer for layer in first.values()}
        self._shows_runs = type(family).register_tap is Family.register_tap
        self._dtype = dtype
        self._longest = 0

    def of(self, num_tokens: int) -> "TextCheck | None":
        """Returns the check of a forward pass whose first text has `num_tokens`; None if a longer one was checked."""
        if num_tokens <= self._longest:
            return None
        self._longest = num_tokens
        return TextCheck(self._layers, self._dtype, num_tokens, shows_runs=self._shows_runs)


class TextCheck:
    """The check of one forward pass, at its first text, which has no padding."""

    def __init__(
        self, layers: Mapping[int, LayerFacts], dtype: torch.dtype, num_tokens: int, *, shows_runs: bool
    ) -> None:
        self._results: list[dict[str, Any]] = []
        self._waiting = dict(layers)
        self._num_tokens = num_tokens
        self._dtype = dtype
        if not shows_runs:
            self._skip(NO_KERNEL)

    @property
    def waits(self) -> bool:
        """Whether a layer is not checked yet."""
        return bool(self._waiting)

    def finish(self) -> list[dict[str, Any]]:
        """Returns the facts for the manifest, one dict for each kind of attention."""
        self._skip("its kernel did not run")
        return sorted(self._results, key=lambda result: result["layer"])

    def _skip(self, reason: str) -> None:
        self._results += [self._result(layer) | {"passed": None, "reason": reason} for layer in self._waiting.values()]
        self._waiting.clear()

    def see(self, run: KernelRun) -> None:
        """Checks the run of a kernel, if its layer waits for it."""
        layer = self._waiting.pop(run.call.layer, None)
        if layer is None:
            return
        result = self._result(layer)
        try:
            differences = _differences(run, layer, result["positions"], self._dtype)
        except _SkippedError as error:
            self._results.append(result | {"passed": None, "reason": str(error)})
            return
        except (RuntimeError, TypeError, ValueError) as error:  # such as no memory: the check must not end a job
            self._results.append(result | {"passed": None, "reason": f"{type(error).__name__}: {error}"[:300]})
            return
        worst = differences.amax(dim=1).tolist()  # by position; NaN stays NaN
        wrong = [at for at, value in zip(result["positions"], worst, strict=True) if not value <= result["tolerance"]]
        largest = max(worst) if all(value == value for value in worst) else None
        self._results.append(result | {"passed": not wrong, "largest_difference": largest, "wrong_positions": wrong})
        if wrong:
            log.warning(
                "layer %d: the attention kernel is wrong at positions %s of a text of %s tokens: its output is not "
                "softmax(q K) V. The dataset will not count as proven",
                layer.heads.layer,
                compact_ranges(wrong),
                f"{self._num_tokens:,}",
            )

    def _result(self, layer: LayerFacts) -> dict[str, Any]:
        return {
            "layer": layer.heads.layer,
            "kind": kind_of(layer),
            "tokens": self._num_tokens,
            "positions": positions(self._num_tokens, layer),
            "tolerance": TOLERANCES[str(self._dtype).removeprefix("torch.")],
        }


def kind_of(layer: LayerFacts) -> str:
    """Names the kind of attention of a layer: `full attention, sinks`."""
    window, chunk = layer.heads.sliding_window, layer.attention_chunk
    reach = "full attention" if window is None else f"a sliding window of {window:,}"
    marks = (
        [reach] if chunk is None else [f"chunks of {chunk:,}"] if window is None else [reach, f"chunks of {chunk:,}"]
    )
    marks += ["sparse"] if layer.sparse_attention else []
    marks += ["softcap"] if layer.softcap is not None else []
    marks += ["sinks"] if layer.sinks is not None else []
    marks += ["position bias"] if layer.position_bias else []
    return ", ".join(marks)


def positions(num_tokens: int, layer: LayerFacts) -> list[int]:
    """Returns the query positions of a text to check: its ends, the middle, `BOUNDARY` and the edges of the reach."""
    last = num_tokens - 1
    wanted = {0, num_tokens // 2, BOUNDARY, last - 1, last}
    edge = layer.heads.sliding_window or layer.attention_chunk
    if edge is None:
        wanted |= {num_tokens // 4, 3 * num_tokens // 4, 4096}
    else:
        wanted |= {edge - 1, edge, edge + 1}
    if layer.attention_chunk is not None:
        wanted.add(last - last % layer.attention_chunk)
    return sorted(position for position in wanted if 0 <= position <= last)


def _differences(run: KernelRun, layer: LayerFacts, at: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Returns the difference at each position and head, (P, H) float64.

    Raises:
        _SkippedError: the check is not possible for this layer.
    """
    _refuse_unknown(run, layer)
    exact, rounded = _attend(run, layer, at, None), _attend(run, layer, at, dtype)
    got = run.output[0, list(at)].to(exact.dtype)
    rounded = torch.where(torch.isfinite(rounded), rounded, exact)  # logits beyond float16 are infinite only if rounded
    both = (torch.isnan(got) & torch.isnan(exact)) | (torch.isinf(exact) & (got == exact))
    got, exact, rounded = (torch.where(both, 0.0, states) for states in (got, exact, rounded))
    norm = exact.norm(dim=-1)
    beyond = (got - exact).norm(dim=-1) - 4 * (rounded - exact).norm(dim=-1)
    # Not clamp(min=0) of NaN alone: a kernel whose output is NaN or infinite where the exact one is not has failed.
    return torch.where(beyond <= 0, 0.0, beyond / torch.where(norm > 0, norm, 1.0)).cpu()


def _refuse_unknown(run: KernelRun, layer: LayerFacts) -> None:
    if layer.position_bias:
        raise _SkippedError("a bias by position is added to the logits")
    if layer.heads.hides_keys and layer.attention_chunk is None and not layer.sparse_attention:
        raise _SkippedError("which earlier keys its queries see is not known")
    if run.value is None or run.value.shape[:3] != run.key.shape[:3]:
        raise _SkippedError("the values are not one for each key")
    if not isinstance(run.output, torch.Tensor) or run.output.shape != (
        run.query.shape[0],
        run.query.shape[2],
        run.query.shape[1],
        run.value.shape[-1],
    ):
        raise _SkippedError("the kernel returns its output in another shape")
    if layer.sparse_attention and not isinstance(run.mask, torch.Tensor):
        raise _SkippedError("the selection of its keys is not in the mask")
    if (name := unknown_argument(run.arguments, is_sparse=layer.sparse_attention)) is not None:
        raise _SkippedError(f"its kernel has an argument {name}, whose effect is not known")


def _attend(run: KernelRun, layer: LayerFacts, at: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
    """Returns softmax(q K) V of the first text at positions `at`, (P, H, w).

    With a `dtype`, logits and weights are rounded to it. The keys are read piece by piece, and so the memory does not
    grow with the text.
    """
    assert run.value is not None
    device = run.query.device
    wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    num_k, d = run.key.shape[1], run.key.shape[3]
    where = torch.tensor(at, device=device)
    visible_from = _visible(layer).first
    first = torch.tensor([*map(visible_from, at)], device=device)
    # (K, H / K * P, d): the query heads that share a key head, one after the other.
    query = run.query[0][:, where].to(wide).reshape(num_k, -1, d)
    group = query.shape[1] // len(at)
    scale = d**-0.5 if (scaling := run.arguments.get("scaling")) is None else float(scaling)
    softcap = run.arguments.get("softcap")

    def rounding(states: torch.Tensor) -> torch.Tensor:
        return states if dtype is None else states.to(dtype).to(wide)

    sinks = run.arguments.get("s_aux")
    if sinks is None:
        top = torch.full((num_k, query.shape[1]), _NOTHING, dtype=wide, device=device)
    else:
        top = sinks.to(wide).reshape(num_k, group, 1).expand(-1, -1, len(at)).reshape(num_k, -1)
    total = torch.zeros_like(top) if sinks is None else torch.ones_like(top)
    weighted = torch.zeros(*top.shape, run.value.shape[-1], dtype=wide, device=device)
    step = max(1, PIECE_BYTES // (num_k * (d + run.value.shape[-1]) * 8))
    for start, stop in _pieces(step, layer, at):
        keys = torch.arange(start, stop, device=device)
        visible = ((keys >= first[:, None]) & (keys <= where[:, None]))[None]  # (1, P, piece)
        if layer.sparse_attention:
            selected = run.mask[0][:, where, start:stop]
            visible = visible & (
                selected if selected.dtype == torch.bool else selected > torch.finfo(selected.dtype).min / 2
            )
        key, value = (states[0, :, start:stop].to(wide) for states in (run.key, run.value))
        logits = rounding(rounding(query @ key.transpose(1, 2)) * scale)
        if softcap is not None:
            logits = rounding(softcap * rounding(torch.tanh(rounding(logits / softcap))))
        logits = logits.masked_fill(
            ~visible.expand(num_k * group, *visible.shape[-2:]).reshape(logits.shape), -torch.inf
        )
        above = torch.maximum(top, logits.amax(dim=-1))
        weights = rounding((logits - above[..., None]).exp())
        shrunk = (top - above).exp()
        total = total * shrunk + weights.sum(dim=-1)
        weighted = weighted * shrunk[..., None] + weights @ value
        top = above
    attended = rounding(weighted / total[..., None])
    return attended.reshape(num_k * group, len(at), -1).transpose(0, 1)


def _pieces(step: int, layer: LayerFacts, at: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the ranges of at most `step` keys that some position in `at` sees, as (start, stop)."""
    visible_from = _visible(layer).first
    ranges = [(visible_from(position), position + 1) for position in at]
    for start in range(0, max(at) + 1, step):
        stop = min(start + step, max(at) + 1)
        if any(first < stop and start < end for first, end in ranges):
            yield start, stop


def _visible(layer: LayerFacts) -> Visible:
    return Visible(layer.heads.sliding_window, layer.attention_chunk, layer.sparse_attention)
