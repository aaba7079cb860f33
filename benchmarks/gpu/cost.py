"""Measures what capture adds to plain forward passes of one text: time of device and host, memory and waits.

A figure is a median over the passes of all rounds. A round measures the plain passes and each way in turn. After the
first round, the clock is looked at before each measurement. A length that is measured again shares its plain passes.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from gpu.bench import Bench, Figures, Model, random_ids
from gpu.capturing import QUEUE_BYTES, WAYS, Capturing, capturing, make_room
from gpu.clock import kernels, median, timed, waits
from gpu.results import LeftOutError, Row

LEAST_S = 1.0
"""Least duration of the passes behind the time until durable. It decides their number."""
MOST_BYTES = 2 << 30
"""Most bytes of these passes."""
MOST_APART = 5
"""Most passes of a round behind the times of device and host."""
ROOMY_QUEUE_BYTES = 2 << 30
"""Holds the rows of several passes over 4,096 tokens with `all`, which thus do not wait for the journal."""
WAITS_TOKENS = 4096
"""Waits are counted in texts of at most this length: their number does not depend on it."""
MAY_WAIT = {"statistics"}
"""Statistics wait once a piece, by design."""


def measure_cost(
    bench: Bench, shape: str, length: int, ways: tuple[str, ...], *, seconds: float, rounds: int = 1
) -> None:
    """Adds a row for each way, after at most `rounds` rounds in about `seconds`, and after one at least."""
    deadline = bench.budget.deadline(seconds)
    model, tokens = bench.model(shape), bench.tokens(length)
    plain = partial(model.plain_pass, torch.from_numpy(random_ids(1, tokens)).to(bench.device))
    figures = {name: Figures() for name in ("plain", *ways)}
    if known := bench.plain.get((model.name, tokens)):
        once_s = known.wall_ms[0] / 1e3
    else:
        figures["plain"].kernel, once_s = _first_pass(bench, plain)
    count = 2 if bench.tiny else max(1, round(LEAST_S / once_s))
    more_waits: dict[str, int | None] = dict.fromkeys(ways)
    if tokens <= WAITS_TOKENS:
        own = waits(bench.device, plain)
        for way in ways:
            figures[way].kernel, more_waits[way] = _more_waits(bench, model, way, tokens, own)
    left_out: set[str] = set()
    num_heads: dict[str, int] = {}
    for number in range(1 if bench.tiny else rounds):
        for name, found in figures.items():
            begin = time.monotonic()
            if name in left_out or (number and begin + found.took_s > deadline) or (name == "plain" and known):
                continue
            try:
                bench.budget.need_time()
                if name == "plain":
                    whole = timed(bench.device, [plain] * count)
                    apart = whole if count == 1 else timed(bench.device, [plain] * min(count, MOST_APART), apart=True)
                    found.add(whole, apart)
                else:
                    num_heads[name] = _measure(bench, model, name, tokens, count, found)
            except LeftOutError as error:
                left_out.add(name)
                bench.results.leave_out(f"{model.name}, {tokens:,} tokens, {name}, round {number + 1}", str(error))
            found.took_s = time.monotonic() - begin
    if not (base := known or figures["plain"]).wall_ms:
        return
    bench.plain[model.name, tokens] = base
    for way in ways:
        if figures[way].wall_ms:
            row = {"model": model.name, "tokens": tokens, "way": way, "heads": num_heads[way]}
            bench.results.add("Cost", row | _cells(base, figures[way], more_waits[way]))
        if (more_waits[way] or 0) > 0 and way not in MAY_WAIT:
            bench.results.fail(f"{model.name}, {way}: a pass waits {more_waits[way]} times more than a plain one")


def _cells(base: Figures, found: Figures, more_waits: int | None) -> Row:
    """Returns the cells of a way from its figures and those of the plain passes."""
    device_ms, plain_device_ms = median(found.device_ms), median(base.device_ms)
    wall_ms, plain_wall_ms = median(found.wall_ms), median(base.wall_ms)
    assert plain_device_ms and plain_wall_ms and wall_ms
    return {
        "plain kernel": base.kernel,
        "kernel": found.kernel,
        "plain device ms": plain_device_ms,
        "plain host ms": median(base.host_ms),
        "device ms": device_ms,
        "host ms": median(found.host_ms),
        "device ratio": None if device_ms is None else device_ms / plain_device_ms,
        "ratio until durable": wall_ms / plain_wall_ms,
        "MB/s": median(found.mb_s),
        "plain GB": base.peak_gb,
        "GB": found.peak_gb,
        "waits": more_waits,
        "rounds": len(found.wall_ms),
    }


def _plans(one: Capturing, tokens: int, count: int) -> list[partial[None]]:
    """Returns the runs of `count` batches. Statistics become durable once, after the last one."""
    return [partial(one.run, one.plan(tokens, seed=seed, ends_group=seed == count - 1)) for seed in range(count)]


def _measure(bench: Bench, model: Model, name: str, tokens: int, count: int, found: Figures) -> int:
    """Adds a round of a way to `found`; returns the number of heads.

    Raises:
        LeftOutError: there is no room for the rows.
    """
    way, device = WAYS[name], bench.device
    with capturing(bench, model, way, tokens) as one:
        nbytes = max(1, one.nbytes(one.plan(tokens)))
        if name != "statistics":
            count = max(1, min(count, MOST_BYTES // nbytes))
        num_apart = min(count, MOST_APART, ROOMY_QUEUE_BYTES // nbytes)
        make_room(bench, nbytes * count)
        whole = timed(device, _plans(one, tokens, count), end=one.writer.close)
        written = one.writer.bytes_written
        num_heads = one.num_heads
    if count == 1:
        found.add(whole, whole if nbytes <= QUEUE_BYTES else None, nbytes=written)
        return num_heads
    make_room(bench, nbytes * num_apart)
    queue_bytes = QUEUE_BYTES if nbytes * num_apart <= QUEUE_BYTES else ROOMY_QUEUE_BYTES
    with capturing(bench, model, way, tokens, queue_bytes=queue_bytes) as one:
        apart = timed(device, _plans(one, tokens, num_apart), apart=True)
    found.add(whole, apart, nbytes=written)
    return num_heads


def _first_pass(bench: Bench, plain: partial[None]) -> tuple[str, float]:
    """Runs the first pass of a length, which chooses kernels. Returns that of attention, and the seconds of a pass."""
    times: list[float] = []
    kernel = kernels(lambda: times.append(timed(bench.device, [plain]).wall_s))
    if times[0] < 2 * LEAST_S:
        times.append(timed(bench.device, [plain]).wall_s)
    return kernel, times[-1]


def _more_waits(bench: Bench, model: Model, name: str, tokens: int, own: int | None) -> tuple[str, int | None]:
    """Warms up a way. Returns the kernel of attention in it, and the waits of a pass beyond those of a plain one."""
    with capturing(bench, model, WAYS[name], tokens) as one:
        plans = [one.plan(tokens, seed=seed, ends_group=False) for seed in range(2)]
        make_room(bench, 2 * one.nbytes(plans[0]))
        kernel = kernels(partial(one.run, plans[0]))  # sends what is sent once
        counted = waits(bench.device, partial(one.run, plans[1]))
    return kernel, None if counted is None or own is None else counted - own


def measure_disk(bench: Bench, shape: str, length: int) -> None:
    """Adds the speed of a journal with `all` in the folder of the bench, and in the system's temporary one."""
    model, tokens = bench.model(shape), bench.tokens(length)
    for folder in dict.fromkeys([bench.folder, Path(tempfile.gettempdir())]):
        with capturing(bench, model, WAYS["all"], tokens, folder=folder) as one:
            nbytes = one.nbytes(one.plan(tokens))
            count = 1 if bench.tiny else max(1, MOST_BYTES // nbytes)
            make_room(bench, nbytes * count, folder)
            whole = timed(bench.device, _plans(one, tokens, count), end=one.writer.close)
            written = one.writer.bytes_written
        row = {
            "folder": str(folder),
            "GB": written / 1e9,
            "seconds": whole.wall_s,
            "MB/s": written / whole.wall_s / 1e6,
        }
        bench.results.add("Journal", row)
