"""Times runs on the clocks of the host and of the device, counts waits, and names attention kernels."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]

KERNELS = {
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash for CPU",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
    "aten::_scaled_dot_product_attention_math": "math",
}
"""The kernels between which torch's scaled_dot_product_attention chooses, by operator."""

WINDOWED = {"aten::_flash_attention_forward": "flash with a window", "torch_attn::_varlen_attn": "varlen_attn"}
"""Kernels that are called directly. The first is also a part of `flash`."""


@dataclass(frozen=True)
class Timing:
    """The times of some passes, one after another. On a CPU, the clock of the device is that of the host."""

    device_ms: list[float]
    """Of each pass: from its start to its last kernel, on the clock of the device."""
    host_ms: list[float]
    """Of each pass: until its call returned."""
    wall_s: float
    """Of all passes and of what ends them."""
    peak_gb: float | None
    """The most memory that tensors took on the device; None on a CPU."""


def timed(device: torch.device, runs: Sequence[Run], *, end: Run | None = None, apart: bool = False) -> Timing:
    """Times `runs`, then `end`. With `apart`, the device finishes each run before the next one starts: otherwise the
    host's time of a run is also that of the kernels for which the queue of the device has no place."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    host_ms, spans = [], []
    start = time.perf_counter()
    for run in runs:
        if on_cuda:
            spans.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            spans[-1][0].record()
        before = time.perf_counter()
        run()
        host_ms.append(1e3 * (time.perf_counter() - before))
        if on_cuda:
            spans[-1][1].record()
            if apart:
                torch.cuda.synchronize()
    if end is not None:
        end()
    if on_cuda:
        torch.cuda.synchronize()
    wall_s = time.perf_counter() - start
    if not on_cuda:
        return Timing(host_ms, host_ms, wall_s, None)
    device_ms = [first.elapsed_time(last) for first, last in spans]
    return Timing(device_ms, host_ms, wall_s, torch.cuda.max_memory_allocated() / 1e9)


def waits(device: torch.device, run: Run) -> int | None:
    """Counts the operations of `run` that make the host wait for the device, by the debug mode of torch; None on a
    CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def kernels(run: Run) -> str:
    """Runs `run` and names the attention kernels that it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    called = {event.key for event in profile.key_averages()}
    names = [name for operator, name in KERNELS.items() if operator in called]
    if "flash" not in names:
        names += [name for operator, name in WINDOWED.items() if operator in called]
    return ", ".join(names) or "unknown"


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
