"""Simulates CUDA devices on a CPU, so that the project's own classes run as on a GPU, and races show as wrong numbers.

`streams.py` has the streams and events, `memory.py` the allocators, and `tensors.py` tensors whose device is `cuda:i`.
`simulated_cuda` replaces the names of `torch.cuda` that the project and accelerate use.

What it simulates: work runs when an `Order` of streams lets it, and no earlier than its events allow; freed memory is
used again at once by its own stream; only page-locked memory is copied without waiting; operations that need a number
on the host wait and are counted. It says nothing about kernels, their rounding or their time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from support.simulated_cuda.memory import pinned_copy
from support.simulated_cuda.streams import ORDERS, Event, Machine, Stream, numbered
from support.simulated_cuda.tensors import CudaTensor, OnDevice, machine_is

__all__ = ["ORDERS", "CudaTensor", "Machine", "moved", "simulated_cuda"]


@contextmanager
def simulated_cuda(order: str = "late", *, seed: int = 0, devices: int = 2) -> Iterator[Machine]:
    """Replaces `torch.cuda` by `devices` simulated ones, whose streams run in an order of `ORDERS`."""
    machine = Machine(order, seed)

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        before = machine.current(stream.device)
        machine.enter(stream)
        try:
            yield
        finally:
            machine.enter(before)

    def tensor_of(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        return made_of(data, **options).to(device)  # of itself, it copies below the simulated tensors

    made_of = torch.tensor
    names: dict[str, Any] = {
        "Stream": lambda device=None: Stream(machine, numbered("cuda" if device is None else device)),
        "Event": lambda **_: Event(machine),
        "stream": entered,
        "current_stream": lambda device="cuda": machine.current(device),
        "synchronize": lambda device="cuda": machine.wait_for_device(numbered(device)),
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
    }
    with (
        mock.patch.multiple(torch.cuda, **names),
        mock.patch.object(torch, "tensor", tensor_of),
        mock.patch.object(torch.Tensor, "pin_memory", lambda values, device=None: pinned_copy(values)),
        machine_is(machine),
        OnDevice(),
    ):
        yield machine


def moved(module: nn.Module, place: Callable[[str], str] = lambda name: "cuda:0") -> nn.Module:
    """Moves the weights and buffers of `module` to the devices that `place` names for them; returns the module."""
    for prefix, part in module.named_modules():
        for values in (part._parameters, part._buffers):
            for name, tensor in list(values.items()):
                if tensor is not None:
                    new = tensor.detach().to(place(f"{prefix}.{name}"))
                    is_weight = values is part._parameters
                    values[name] = nn.Parameter(new, requires_grad=False) if is_weight else new  # type: ignore[assignment]
    return module
