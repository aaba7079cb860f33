"""Checks that this machine has the devices of `model.device_map`, and keeps a model that fits one GPU there."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from qk_sniffer.config import AUTO
from qk_sniffer.errors import ConfigError
from qk_sniffer.logs import logger
from qk_sniffer.text import as_yaml, counted

log = logger(__name__)

FILLED = 0.9
"""The part of a GPU's free memory that a model may need. The rest is for adapters, buffers and gaps between tensors."""

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What transformers takes for a device map instead of devices: each uses the accelerators that there are."""


def check_devices(device_map: Any) -> None:
    """Checks the devices of a `model.device_map`.

    Raises:
        ConfigError: one of them is no device, or this machine has none of its kind or number that torch can use.
    """
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    if problems := list(dict.fromkeys(problem for device in named for problem in _problems(device_map, device))):
        raise ConfigError(problems)


def on_one_gpu(device_map: Any, needed: Callable[[], int | None]) -> Any:
    """Returns the device map for a `model.device_map`: of `auto` on a machine with several GPUs, perhaps the first one.

    transformers' `auto` spreads the layers over all GPUs, between which every forward pass then copies its activations
    while all but one of them wait. A model that fits one GPU therefore stays there. `needed` returns the bytes that it
    takes for its weights and a forward pass; None, if that is not known, leaves `auto`.
    """
    if device_map != AUTO or not torch.cuda.is_available() or (count := torch.cuda.device_count()) < 2:
        return device_map
    most, free = needed(), torch.cuda.mem_get_info(0)[0]
    if most is None or most > FILLED * free:
        return device_map
    log.info(
        "the model needs about %.1f GB and stays on the first of %d GPUs, which has %.1f GB free; "
        "model.device_map=balanced uses all",
        most / 1e9,
        count,
        free / 1e9,
    )
    return "cuda:0"


def _problems(device_map: Any, name: Any) -> Iterator[str]:
    if name is None or name == "disk" or name in PLANS:
        return
    given = f"model.device_map is {as_yaml(device_map)}"
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    own = torch.accelerator.current_accelerator() if count else None
    try:
        device = torch.device(f"{own.type if own else 'cuda'}:{name}" if isinstance(name, int) else name)
    except (RuntimeError, TypeError):
        yield f"{given}, and {as_yaml(name)} is no device; valid: auto, cpu, cuda, cuda:0, ..."
        return
    if device.type in ("cpu", "meta"):
        return
    if own is None or own.type != device.type:
        is_built = device.type != "cuda" or torch.backends.cuda.is_built()
        why = "" if is_built else f", because torch {torch.__version__} is built without CUDA"
        yield f"{given}, but torch can use no {device.type} device here{why}; set model.device_map to auto or cpu"
    elif (device.index or 0) >= count:
        yield f"{given}, but torch can use {counted(count, f'{own.type} device')} here, numbered from 0"
