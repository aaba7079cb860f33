"""Tensors on simulated CUDA devices: each operation on them is queued in the current stream of its device.

Their numbers are in the host's memory, and operations are those of the CPU. Shapes are known at once, from torch's meta
device; numbers are not, before the stream has run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from support.simulated_cuda.memory import (
    UNWRITTEN,
    Block,
    Pool,
    forget_pinned,
    is_pinned,
    note_pinned,
)
from support.simulated_cuda.streams import Machine, numbered

_aten = torch.ops.aten

_NUMBERS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}
"""Operations whose result, or its shape, depends on numbers: the host waits for them."""

_WHOLE = {_aten.scaled_dot_product_attention.default, _aten.linear.default, _aten.matmul.default}
"""Composed operations that a device computes as one."""

_machines: list[tuple[Machine, Pool]] = []


@contextmanager
def machine_is(machine: Machine) -> Iterator[None]:
    """Makes `machine` the one that operations are queued in."""
    _machines.append((machine, Pool()))
    try:
        yield
    finally:
        _machines.pop()
        forget_pinned()


class CudaTensor(torch.Tensor):
    """A tensor on a simulated device. `memory` has its numbers, once the stream has run; `block` is what it holds."""

    memory: torch.Tensor
    block: Block
    place: torch.device

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False, **_: Any) -> Any:
        # accelerate calls the class of a weight with its new values.
        return values.detach() if isinstance(values, CudaTensor) else nn.Parameter(values, requires_grad=False)

    @classmethod
    def of(cls, memory: torch.Tensor, block: Block, place: torch.device) -> "CudaTensor":
        # For torch's C++ code, the device is the CPU: a build without CUDA has no guard for another one.
        made = torch.Tensor._make_wrapper_subclass(
            cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(), dtype=memory.dtype
        )
        made.memory, made.block, made.place = memory, block, place
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return self.place.index

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        if args and isinstance(args[0], torch.Tensor):
            args = args[0].device, args[0].dtype, *args[1:]
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = self.place if device is None else numbered(device), dtype or self.dtype
        if (device, dtype, copy) == (self.place, self.dtype, False):
            return self
        return _copied(self, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format)

    def type_as(self, other: torch.Tensor) -> torch.Tensor:
        return self.to(other.device, other.dtype)

    def cpu(self, memory_format: Any = None) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"the numbers are on {self.place}")

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.memory.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """Sees the operations that make tensors on a simulated device, or page-locked ones, from none on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")) or any(isinstance(each, CudaTensor) for each in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        if kwargs.get("pin_memory"):
            made = func(*args, **kwargs | {"pin_memory": False})
            note_pinned(made)
            return made
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Queues an operation, and returns its tensors; or waits, if its result is needed on the host."""
    leaves = tree_leaves((args, kwargs))
    own = [each for each in leaves if isinstance(each, CudaTensor)]
    if func is _aten.is_pinned.default:
        return False
    if func is _aten._to_copy.default:
        return _copied(args[0], **kwargs)
    if func is _aten.copy_.default:
        return _copy(args[0], args[1], *args[2:], **kwargs)
    if func in _NUMBERS or _indexes_by_mask(func, args):
        return _on_host(func, args, kwargs, own[0])
    if func not in _WHOLE and _is_composed(func):
        with OnDevice():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    returns = func._schema.returns
    if func is _aten._unsafe_view.default or any(each.alias_info and not each.alias_info.is_write for each in returns):
        views = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        return tree_map(lambda view: _view(view, own[0]) if isinstance(view, torch.Tensor) else view, views)
    place = _place(func, leaves, own, kwargs)
    return _queued(func, args, kwargs, place)


@cache
def _is_composed(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _queued(func: Any, args: Any, kwargs: dict[str, Any], place: torch.device) -> Any:
    machine, _ = _machines[-1]
    stream, schema = machine.current(place), func._schema
    on_host, named = tree_map(_read, args), tree_map(_read, kwargs)
    if _is_cuda(named.get("device")):
        named["device"] = torch.device("cpu")
    named.pop("pin_memory", None)
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    written = [given[each.name] for each in schema.arguments if each.alias_info and each.alias_info.is_write]
    if written:
        machine.queue(stream, lambda: func(*on_host, **named))
        return (written[0] if len(schema.returns) == 1 else tuple(written)) if schema.returns else None

    def compute() -> Any:
        if func is _aten.histc.default and not on_host[0].is_floating_point():  # CUDA alone counts integers
            return func(on_host[0].float(), *on_host[1:], **named)
        return func(*on_host, **named)

    is_known = machine.order == "at once"  # without races, no memory need be shared
    forms = compute() if is_known else _forms(func, args, kwargs)
    made = tree_map(lambda form: _new(form, place) if isinstance(form, torch.Tensor) else form, forms)
    memories = [each.memory for each in tree_leaves(made) if isinstance(each, CudaTensor)]

    def write() -> None:
        results = [each for each in tree_leaves(compute()) if isinstance(each, torch.Tensor)]
        for memory, result in zip(memories, results, strict=True):
            memory.copy_(result)

    if not is_known and not func.name().startswith(("aten::empty", "aten::new_empty")):
        machine.queue(stream, write)
    return made


def _forms(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Returns what an operation makes, without numbers, on the meta device."""
    if func is _aten.scaled_dot_product_attention.default:
        query, _, value = args[:3]
        return torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device="meta")
    named = {name: tree_map(_form, value) for name, value in kwargs.items() if name != "pin_memory"}
    if "device" in named or not any(isinstance(each, torch.Tensor) for each in tree_leaves((args, kwargs))):
        named["device"] = torch.device("meta")
    with torch.no_grad():
        return func(*tree_map(_form, args), **named)


def _form(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, CudaTensor) else value


def _read(value: Any) -> Any:
    """Returns the memory of a tensor on a device, and a number on the host as it is now."""
    return value.clone() if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor) else _memory(value)


def _view(memory: torch.Tensor, of: CudaTensor) -> CudaTensor:
    with torch.inference_mode(of.is_inference()):
        return CudaTensor.of(memory, of.block, of.place)


def _new(form: torch.Tensor, place: torch.device) -> CudaTensor:
    machine, pool = _machines[-1]
    if not form.is_meta:
        return CudaTensor.of(form, Block(pool, (machine.current(place), 0), form.untyped_storage()), place)
    block = pool.take(form.size(), form.stride(), form.dtype, machine.current(place))
    memory = torch.empty(0, dtype=form.dtype).set_(block.storage, 0, form.size(), form.stride())  # type: ignore[call-overload]
    return CudaTensor.of(memory, block, place)


def _on_host(func: Any, args: Any, kwargs: dict[str, Any], first: CudaTensor) -> Any:
    _machines[-1][0].host_waits(first.place, func.name())
    found = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
    return tree_map(lambda value: value.to(first.place) if isinstance(value, torch.Tensor) else value, found)


def _indexes_by_mask(func: Any, args: Any) -> bool:
    """Whether an operation takes as many numbers as a mask has true ones."""
    if func.overloadpacket not in (_aten.index, _aten.index_put, _aten.index_put_):
        return False
    masks = [each for each in args[1] if isinstance(each, CudaTensor) and each.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and func.overloadpacket is _aten.index


def _place(func: Any, leaves: list[Any], own: list[CudaTensor], kwargs: dict[str, Any]) -> torch.device:
    """Returns the device of an operation; raises the error of CUDA for tensors that are on others."""
    if _is_cuda(kwargs.get("device")):
        return numbered(kwargs["device"])  # the tensors give their shapes alone
    places = {each.place for each in own}
    others = [each for each in leaves if isinstance(each, torch.Tensor) and not isinstance(each, CudaTensor)]
    if len(places) > 1 or any(each.dim() for each in others):
        raise RuntimeError(f"{func.name()}: tensors are on several devices: {sorted(map(str, places))}, {len(others)}")
    return own[0].place


def _copied(
    values: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
    **_: Any,
) -> torch.Tensor:
    """Returns a copy in a dtype and on a device, as `aten._to_copy` does."""
    form = _form(values).to(dtype or values.dtype)
    form = torch.empty_like(form, memory_format=memory_format or torch.preserve_format)
    place = values.device if device is None else numbered(device)
    if place.type == "meta":
        return form
    if place.type == "cuda":
        return _copy(_new(form, place), values, non_blocking)
    made = torch.empty_strided(form.size(), form.stride(), dtype=form.dtype)
    made.untyped_storage().fill_(UNWRITTEN)
    return _copy(made, values, non_blocking)


def _copy(to: torch.Tensor, values: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copies as `Tensor.copy_` does: within a device, between two, or from and to the host."""
    machine, _ = _machines[-1]
    target, source = _memory(to), _memory(values)

    def write() -> None:
        target.copy_(source)

    if isinstance(to, CudaTensor) and isinstance(values, CudaTensor):
        own, other = machine.current(to.place), machine.current(values.place)
        if own.device != other.device:
            other.wait_stream(own)
            machine.queue(other, write)
            own.wait_stream(other)
        else:
            machine.queue(own, write)
        return to
    place = to.place if isinstance(to, CudaTensor) else values.device
    host = values if isinstance(to, CudaTensor) else to
    waits = not (non_blocking and is_pinned(host)) and host.numel() > 0
    if host is values and not is_pinned(host):
        source = values.clone()  # such memory is read before the call returns
    machine.queue(machine.current(place), write)
    if waits:
        kind = "page-locked" if is_pinned(host) else "pageable"
        machine.host_waits(place, f"copy {'from' if host is values else 'to'} {kind} memory")
    return to
