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

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qk_sniffer.backbone.attention_terms import unknown_argument
from qk_sniffer.backbone.exact_attention import Attended, exact_attention
from qk_sniffer.backbone.family import Family
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.masks import Visible
from qk_sniffer.backbone.tap import KernelRun
from qk_sniffer.logs import logger
from qk_sniffer.text import compact_ranges, one_line

log = logger(__name__)

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest difference that counts as rounding, by the dtype of the model."""

BOUNDARY = 65536
"""Kernels with 32-bit indices are known to fail from about this many tokens on."""

NO_KERNEL = "this model's attention calls no kernel of transformers' attention interface"


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
            self._results.append(result | {"passed": None, "reason": one_line(f"{type(error).__name__}: {error}", 300)})
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
    return beyond_rounding(got, exact, rounded).cpu()


def beyond_rounding(got: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Returns the difference of outputs (P, H, w) from the exact ones that the module docstring defines, (P, H)."""
    rounded = torch.where(torch.isfinite(rounded), rounded, exact)  # logits beyond float16 are infinite only if rounded
    both = (torch.isnan(got) & torch.isnan(exact)) | (torch.isinf(exact) & (got == exact))
    got, exact, rounded = (torch.where(both, 0.0, states) for states in (got, exact, rounded))
    norm = exact.norm(dim=-1)
    beyond = (got - exact).norm(dim=-1) - 4 * (rounded - exact).norm(dim=-1)
    # Not clamp(min=0) of NaN alone: a kernel whose output is NaN or infinite where the exact one is not has failed.
    return torch.where(beyond <= 0, 0.0, beyond / torch.where(norm > 0, norm, 1.0))


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
    """Returns softmax(q K) V of the first text at positions `at`, (P, H, w), by the arguments of the kernel."""
    assert run.value is not None
    scaling = run.arguments.get("scaling")
    attended = Attended(
        run.query[0],
        run.key[0],
        run.value[0],
        Visible(layer.heads.sliding_window, layer.attention_chunk, layer.sparse_attention),
        scale=run.key.shape[3] ** -0.5 if scaling is None else float(scaling),
        softcap=run.arguments.get("softcap"),
        sinks=run.arguments.get("s_aux"),
        selection=run.mask[0] if layer.sparse_attention else None,
    )
    return exact_attention(attended, at, dtype)
