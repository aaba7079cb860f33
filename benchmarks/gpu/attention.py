"""Compares the output of attention at eight rows of long texts with float32, for each kind of attention that occurs.

Each case is a model of one layer, whose forward pass is that of a job: our masks, bands and choice of kernels. Its
queries are so large that about sixteen keys share the weight of a query. A missing or a further key then shows.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import Qwen3Config

from gpu.bench import VOCABULARY, Bench, made, random_ids
from gpu.clock import kernels
from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import find_family
from qk_sniffer.backbone.tap import AttentionCall, ForwardDone, KernelRun
from qk_sniffer.errors import CaptureError

LONG = 131_072
TOLERANCE = 0.02
"""The largest difference of a row, norm over norm, that bfloat16 explains."""
LOGITS = 3.0
"""The standard deviation of the logits."""


@dataclass(frozen=True)
class Case:
    tokens: int
    head_dim: int
    query_heads: int
    key_heads: int
    window: int | None = None
    banded: bool = True

    @property
    def pairs(self) -> int:
        """The pairs of a query and a key that it sees."""
        width = min(self.window or self.tokens, self.tokens)
        return width * (width + 1) // 2 + (self.tokens - width) * width

    @property
    def mask(self) -> str:
        return "none" if self.window is None else "band" if self.banded else "tensor"


CASES = (
    Case(LONG, 128, 32, 8),
    Case(LONG, 256, 8, 4),
    Case(LONG + 1, 256, 4, 1),
    Case(LONG, 128, 32, 8, 512),
    Case(LONG, 128, 32, 8, 1024),
    Case(LONG, 128, 32, 8, 4096),
    Case(LONG, 128, 32, 8, 32_768),
    Case(LONG + 1, 256, 8, 4, 1024),
    # The last block of a band has a number of keys that leaves 1 if divided by 32, with or without its first key.
    Case(LONG + 1, 256, 4, 1, 512),
    Case(LONG + 2, 256, 4, 1, 512),
    Case(4097, 128, 32, 8, 512, banded=False),
    Case(70_000, 128, 32, 8, 512, banded=False),
)
TINY_CASES = (
    Case(257, 16, 4, 2),
    Case(257, 32, 4, 1),
    Case(289, 16, 4, 2, 32),
    Case(290, 32, 4, 1, 32),
    Case(257, 16, 4, 2, 32, banded=False),
)


def check_attention(bench: Bench) -> None:
    """Adds a row for each case, and for a band that a kernel serves another one for its blocks. A refusal is right."""
    for case in TINY_CASES if bench.tiny else CASES:
        bench.budget.need_time()
        try:
            found = _measure(bench, case)
        except CaptureError as error:
            if error.__cause__ is not None:  # an error of torch, not a refusal of ours
                bench.results.fail(f"attention, {case}: {error}")
                continue
            found = [dict.fromkeys(("difference", "ms", "TFLOP/s", "GB")) | {"kernel": f"refused: {str(error)[:120]}"}]
        for each in found:
            row = {"tokens": case.tokens, "head_dim": case.head_dim, "heads": f"{case.query_heads}/{case.key_heads}"}
            bench.results.add("Attention", row | {"mask": case.mask, "window": case.window} | each)
            if each["difference"] is not None and not each["difference"] <= TOLERANCE:
                bench.results.fail(f"attention is wrong: {case}, {each['kernel']}: {each['difference']:.3g}")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if bench.device.type == "cuda" and not bench.tiny:
        _check_torch(bench)


def _measure(bench: Bench, case: Case) -> list[dict[str, Any]]:
    """Returns the cells of the rows of a case: kernel, difference, time, speed and memory.

    Raises:
        CaptureError: the forward pass is refused, or fails.
    """
    sliding = {} if case.window is None else {"use_sliding_window": True, "sliding_window": case.window}
    config = Qwen3Config(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        head_dim=case.head_dim,
        num_attention_heads=case.query_heads,
        num_key_value_heads=case.key_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=case.tokens,
        layer_types=["full_attention" if case.window is None else "sliding_attention"],
        attn_implementation="sdpa",
        **sliding,
    )
    torch.manual_seed(0)
    decoder = made(config, bench.device, torch.bfloat16)
    torch.nn.init.constant_(decoder.layers[0].self_attn.q_norm.weight, LOGITS)
    backbone = Backbone(decoder, find_family("qwen3"), banded_attention=case.banded)
    backbone.probe()  # finds the kernel with a window
    ids = torch.from_numpy(random_ids(1, case.tokens))
    run = _Run(bench.device, case)
    found = []
    for window_kernel in dict.fromkeys([backbone.window_kernel, None]):
        backbone.window_kernel = window_kernel
        named = kernels(partial(backbone.forward, ids, run.begin, run.end))  # also chooses it
        backbone.forward(ids, run.begin, run.end)
        found.append({"kernel": named if window_kernel is None else f"{window_kernel.name}: {named}"} | run.cells())
    return found


class _Run:
    """Sees the kernel of a case run."""

    def __init__(self, device: torch.device, case: Case) -> None:
        self._on_cuda = device.type == "cuda"
        self._case = case
        self._cells: dict[str, Any] = {}

    def begin(self, call: AttentionCall) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()

    def end(self, run: KernelRun) -> None:
        ms = gb = None
        if self._on_cuda:
            self._events[1].record()
            torch.cuda.synchronize()
            ms = self._events[0].elapsed_time(self._events[1])
            gb = (torch.cuda.max_memory_allocated() - self._before) / 1e9
        flops = 4 * self._case.query_heads * self._case.head_dim * self._case.pairs
        assert run.value is not None
        self._cells = {
            "difference": difference(run.query[0], run.key[0], run.value[0], run.output[0], self._case),
            "ms": ms,
            "TFLOP/s": None if ms is None else flops / ms / 1e9,
            "GB": gb,
        }
        raise ForwardDone

    def cells(self) -> dict[str, Any]:
        return self._cells


def rows_to_check(case: Case) -> list[int]:
    """Returns eight query positions: the ends, the edges of the window, and some between."""
    last, edge = case.tokens - 1, case.window or 4096
    wanted = {0, edge - 1, edge, case.tokens // 2, 3 * case.tokens // 4, 65_536, last - 1, last}
    rest = np.linspace(1, last, 32).astype(int).tolist()  # takes the place of rows that coincide or do not exist
    found = sorted(row for row in wanted if 0 <= row <= last)
    return [*found, *(row for row in rest if row not in found)][:8]


def difference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, case: Case) -> float:
    """Returns the largest difference at a checked row and head, norm over norm.

    `query` is (H, n, d), `key` and `value` (K, n, d), and `output` (n, H, d).
    """
    worst = 0.0
    for row in rows_to_check(case):
        first = 0 if case.window is None else max(0, row - case.window + 1)
        keys, values = key[:, first : row + 1].float(), value[:, first : row + 1].float()
        queries = query[:, row].float().unflatten(0, (case.key_heads, -1))  # (K, G, d)
        weights = (queries @ keys.mT * case.head_dim**-0.5).softmax(dim=-1)
        exact = (weights @ values).flatten(0, 1)
        off = (output[row].float() - exact).norm(dim=-1) / exact.norm(dim=-1)
        worst = max(worst, off.max().item()) if bool(torch.isfinite(off).all()) else float("nan")
    return worst


def _check_torch(bench: Bench) -> None:
    """Adds what torch itself does with the mask that we refuse: a note, whose difference is no failure of ours."""
    case = CASES[-1]
    torch.manual_seed(0)
    with torch.inference_mode():
        query, key, value = (
            torch.randn(1, heads, case.tokens, 128, device=bench.device, dtype=torch.bfloat16) for heads in (8, 8, 8)
        )
        place = torch.arange(case.tokens, device=bench.device, dtype=torch.int32)
        apart = place[:, None] - place[None]
        mask = (apart >= 0) & (apart < case.window)
        del apart
        attend = partial(F.scaled_dot_product_attention, LOGITS * query, key, value, attn_mask=mask[None, None])
        found: dict[str, torch.Tensor] = {}
        kernel = kernels(lambda: found.update(output=attend()))
        eight = Case(case.tokens, 128, 8, 8, case.window)
        off = difference(LOGITS * query[0], key[0], value[0], found["output"][0].transpose(0, 1), eight)
    row = {"tokens": case.tokens, "mask": "tensor, 2^32 scores and more", "kernel": kernel, "difference": off}
    bench.results.add("Attention of torch alone", row)
