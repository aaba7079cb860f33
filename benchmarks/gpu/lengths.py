"""Measures batches of many lengths: cuDNN makes a plan for every new shape, in the pass that needs it.

The plans belong to a thread, so each way runs in its own. It runs all batches twice: the first time, shapes are new.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from gpu.bench import Bench, Model, random_ids
from gpu.capturing import WAYS, capturing
from gpu.clock import kernels

NUM_BATCHES, BATCH = 20, 4
LONGEST = 4096
ROUNDED = 128


def measure_lengths(bench: Bench, shape: str) -> None:
    """Adds a row for plain passes with cuDNN, without it, and of rounded lengths, and one for passes that capture."""
    model = bench.model(shape)
    lengths = batch_lengths(bench.tokens(LONGEST), 3 if bench.tiny else NUM_BATCHES)
    rounded = [ROUNDED * math.ceil(length / ROUNDED) for length in lengths]
    run = partial(_plain, bench, model, lengths)
    _add(bench, "plain, without cuDNN", lengths, partial(run, cudnn=False))
    _add(bench, f"plain, lengths rounded up to {ROUNDED}", rounded, partial(_plain, bench, model, rounded, cudnn=True))
    _add(bench, "plain, with cuDNN", lengths, partial(run, cudnn=True))
    _add(bench, "capture, uniform", lengths, partial(_captured, bench, model, lengths))


def batch_lengths(longest: int, count: int) -> list[int]:
    """Returns distinct lengths, log-normal as those of texts, none of them a multiple of `ROUNDED`."""
    drawn = np.random.default_rng(0).lognormal(math.log(longest / 4), 0.8, 100 * count).astype(int)
    fitting = (length for length in drawn.tolist() if 16 <= length <= longest and length % ROUNDED)
    return list(dict.fromkeys(fitting))[:count]


def _add(bench: Bench, way: str, lengths: list[int], measure: Callable[[], tuple[float, float, str]]) -> None:
    """Measures in a new thread, and adds the row."""
    bench.budget.need_time()
    with ThreadPoolExecutor(1) as threads:
        first_s, again_s, kernel = threads.submit(measure).result()
    shapes, tokens = len({*lengths}), BATCH * sum(lengths)
    row = {"way": way, "batches": len(lengths), "shapes": shapes, "tokens": tokens, "kernel": kernel}
    times = {"first s": first_s, "again s": again_s, "ms a shape": 1e3 * (first_s - again_s) / shapes}
    bench.results.add("Batches of many lengths", row | times)


def _plain(bench: Bench, model: Model, lengths: list[int], *, cudnn: bool) -> tuple[float, float, str]:
    batches = [torch.from_numpy(random_ids(BATCH, length)) for length in lengths]
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        first_s, again_s = (_seconds(bench, [partial(model.plain_pass, ids) for ids in batches]) for _ in range(2))
        return first_s, again_s, kernels(partial(model.plain_pass, batches[0]))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def _captured(bench: Bench, model: Model, lengths: list[int]) -> tuple[float, float, str]:
    seconds = []
    with capturing(bench, model, WAYS["uniform"], bench.tokens(LONGEST)) as one:
        for turn in range(2):
            plans = [one.plan(BATCH, length, seed=2 * place + turn) for place, length in enumerate(lengths)]
            seconds.append(_seconds(bench, [partial(one.run, plan) for plan in plans]))
        kernel = kernels(partial(one.run, one.plan(BATCH, lengths[0], seed=2 * len(lengths))))
    return seconds[0], seconds[1], kernel


def _seconds(bench: Bench, runs: list[partial[None]]) -> float:
    start = time.perf_counter()
    for run in runs:
        run()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
