"""Captures on simulated CUDA devices have the numbers of the CPU in any order of the streams, and races are seen."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from support.cuda_jobs import Arrays, CudaJob, differing, statistics_and_summaries
from support.simulated_cuda import ORDERS, moved, simulated_cuda
from support.zoo import CASES
from torch import nn

from qk_sniffer.backbone import banded_attention
from qk_sniffer.capture import gather, row_writer
from qk_sniffer.config import SamplerConfig
from qk_sniffer.store.rows import Slot

BY_NAME = {case.name: case for case in CASES}
QWEN3 = BY_NAME["qwen3"]
JOB = CudaJob()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes several gathers of each (layer, kind)."""
    monkeypatch.setattr(row_writer, "PIECE_BYTES", 8192)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    """The numbers of `JOB` on the CPU."""
    return JOB.run(QWEN3.decoder(), tmp_path_factory.mktemp("journal"))


def on_cuda(folder: Path, order: str, seed: int = 0) -> Arrays:
    with simulated_cuda(order, seed=seed):
        return JOB.run(moved(QWEN3.decoder()), folder)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_the_streams_gives_the_rows_of_the_cpu(order: str, expected: Arrays, tmp_path: Path) -> None:
    assert differing(on_cuda(tmp_path, order), expected) == []


DEVICE = torch.device("cuda:0")
SIZES = [40, 40, 25, 90, 90, 10, 90]
"""The rows of each copy: some need a larger buffer than the one before."""


class Altered:
    """A stream or an event with other methods in place of some of its own."""

    def __init__(self, real: Any, **methods: Callable[..., Any]) -> None:
        self._real = real
        vars(self).update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def nothing(*_: Any) -> None:
    """Does not wait, or records nothing."""


def altered(name: str, **methods: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Alters all objects that `torch.cuda.<name>` returns."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(torch.cuda, name)
        patch.setattr(torch.cuda, name, lambda *args, **kwargs: Altered(real(*args, **kwargs), **methods))

    return plant


def recorded_before_the_copy(patch: pytest.MonkeyPatch) -> None:
    real = torch.cuda.Event

    def event(**kwargs: Any) -> Altered:
        made = real(**kwargs)
        made.record(torch.cuda.current_stream(DEVICE))
        return Altered(made, record=nothing)

    patch.setattr(torch.cuda, "Event", event)


def recorded_in_the_computing_stream(patch: pytest.MonkeyPatch) -> None:
    real = torch.cuda.Event

    def event(**kwargs: Any) -> Altered:
        made, computing = real(**kwargs), torch.cuda.current_stream(DEVICE)
        return Altered(made, record=lambda stream: made.record(computing))

    patch.setattr(torch.cuda, "Event", event)


def copied_in_the_computing_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def event_of_an_earlier_copy(patch: pytest.MonkeyPatch) -> None:
    class First(list[Any]):
        def __setitem__(self, place: Any, value: Any) -> None:
            if self[place] is None:
                super().__setitem__(place, value)

    made = gather._CudaCopier.__init__

    def init(self: Any, device: torch.device) -> None:
        made(self, device)
        self._copied = First(self._copied)

    patch.setattr(gather._CudaCopier, "__init__", init)


def buffer_freed_during_the_copy(patch: pytest.MonkeyPatch) -> None:
    fill = gather._CudaCopier.fill

    def fill_and_free(self: Any, *args: Any) -> Any:
        event = fill(self, *args)
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=DEVICE)] * len(self._buffers)
        return event

    patch.setattr(gather._CudaCopier, "fill", fill_and_free)


RACES = {
    "the buffer is not waited for": altered("current_stream", wait_event=nothing),
    "the vectors are not waited for": altered("Stream", wait_stream=nothing),
    "the host does not wait": altered("Event", synchronize=nothing),
    "the event is recorded before the copy": recorded_before_the_copy,
    "the event is that of the computing stream": recorded_in_the_computing_stream,
    "the copy is in the computing stream": copied_in_the_computing_stream,
    "the event is that of an earlier copy": event_of_an_earlier_copy,
    "the buffer is freed during the copy": buffer_freed_during_the_copy,
}


def wrong_copies(order: str, seed: int = 0, plant: Callable[[pytest.MonkeyPatch], None] | None = None) -> list[int]:
    """Copies vectors of several sizes from a device; returns the numbers of the copies that are wrong."""
    with simulated_cuda(order, seed=seed) as machine, pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        copiers = gather.DeviceCopiers()
        memories = [torch.empty(2, size, 8, pin_memory=True) for size in SIZES]
        events = []
        for number, memory in enumerate(memories):
            vectors = torch.full(memory.shape, float(number), device=DEVICE)
            events.append(copiers.fill(memory, DEVICE, lambda out, vectors=vectors: out.copy_(2 * vectors)))  # type: ignore[misc]
        wrong = []
        for number, (memory, event) in enumerate(zip(memories, events, strict=True)):
            assert event is not None
            event.synchronize()
            if not bool((memory == 2 * number).all()):
                wrong.append(number)
        assert machine.waits == []
    return wrong


@pytest.mark.parametrize("order", ORDERS)
def test_no_buffer_is_filled_while_it_is_being_copied(order: str) -> None:
    assert not any(wrong_copies(order, seed) for seed in range(5 if order == "random" else 1))


@pytest.mark.few(3)
@pytest.mark.parametrize("race", RACES)
def test_a_race_gives_wrong_vectors(race: str) -> None:
    """Shows that the test above can fail."""
    assert any(wrong_copies(order, plant=RACES[race]) for order in ORDERS)


def test_memory_that_is_given_back_too_early_gives_wrong_rows(
    expected: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slot, "wait", nothing)
    assert differing(on_cuda(tmp_path, "late"), expected)


def on_two_devices(decoder: nn.Module) -> nn.Module:
    """Splits the layers over two devices; accelerate's hooks move the states between them."""
    layers = len(decoder.layers)  # type: ignore[arg-type]
    places: dict[str, Any] = {name: 0 for name, _ in decoder.named_children() if name != "layers"}
    places |= {f"layers.{layer}": int(layer > 0) for layer in range(layers)}
    moved(decoder, lambda name: f"cuda:{next(place for start, place in places.items() if name.startswith(start))}")
    for name, place in places.items():
        add_hook_to_module(decoder.get_submodule(name), AlignDevicesHook(f"cuda:{place}", io_same_device=False))
    return decoder


def offloaded(decoder: nn.Module) -> nn.Module:
    """Keeps the last layer's weights in the host's memory, from where accelerate's hook brings them for each pass."""
    last = decoder.layers[-1]  # type: ignore[index]
    weights = {name: value.detach().clone() for name, value in last.state_dict().items()}
    moved(decoder, lambda name: "meta" if name.startswith("layers.2.") else "cuda:0")
    for name, part in last.named_modules():
        if part._parameters:
            own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            add_hook_to_module(part, AlignDevicesHook("cuda:0", offload=True, weights_map=own))
    return decoder


UNIFORM = SamplerConfig(type="uniform", base_rate=4.0, min_bucket_size=4)

ALL_TABLES = CudaJob(UNIFORM, statistics_and_summaries(layers=[0], heads=[0, 3]), batches=((40, 30),))

MAY_WAIT = ("masking_utils.py", "utils/modeling.py", "exact_attention.py", "moments.py")
"""Masks of transformers, accelerate's offloading, the check of the longest text, and statistics, once a piece."""

JOBS: dict[str, tuple[str, CudaJob, Callable[[nn.Module], nn.Module]]] = {
    "sampled, before RoPE": ("qwen3", CudaJob(UNIFORM, pre_rope=True), moved),
    "two devices": ("qwen3", CudaJob(UNIFORM), on_two_devices),
    "offloaded layers": ("qwen3", CudaJob(UNIFORM), offloaded),
    "bands": ("qwen3_sliding", CudaJob(UNIFORM), moved),
    "statistics and summaries": ("qwen3_sliding", ALL_TABLES, moved),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", JOBS)
def test_every_job_gives_the_numbers_of_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded_attention, "MIN_BLOCK", 8)
    case, job, place = JOBS[name]
    expected = job.run(BY_NAME[case].decoder(), tmp_path / "cpu")
    with simulated_cuda("random", seed=1) as machine:
        found = job.run(place(BY_NAME[case].decoder()), tmp_path / "cuda", machine.waits)
    assert differing(found, expected) == []
    assert [wait for wait in machine.waits if not any(file in wait[1] for file in MAY_WAIT)] == []
