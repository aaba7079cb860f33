"""Sees, around every forward pass, whether a model is still the one that was described: its weights, adapters, layers.

A look reads no value of a tensor: a change in place raises the version of a tensor, and another tensor is another
object or is at another address. What is written through `tensor.data` raises no version, and is not seen. A hook is
seen, but not what it does: one that works differently in each pass is the user's own. Of a module of TorchScript, its
tensors and numbers are seen, and its code cannot change.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PER_ROW_HOOK = "_adapter_names_pre_forward_hook"
"""The hook of peft that gives each row of a batch an adapter of its own, for the argument `adapter_names`."""

NO_ADAPTER = "__base__"
"""The name that peft gives the model without an adapter, in `adapter_names`."""

_LIBRARIES = frozenset({"accelerate", "peft", "qk_sniffer", "torch", "transformers"})
"""The packages whose hooks come and go between passes by themselves, as for the outputs that a call asks for."""

_PLAIN = frozenset({bool, int, str, type(None), FunctionType, BuiltinFunctionType, MethodType})

_LISTS = frozenset({list, tuple, set})

_METHODS = frozenset({FunctionType, MethodType})

_NUMBERS = frozenset({bool, int, float})

_OF_NO_PASS = re.compile(r"output_|return_|use_cache$|gradient_checkpointing$|training$|forward$|\w*_token_id$")
"""The start of the names of attributes that change no number of a pass, or that are compared apart."""

_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has, with its parts and hooks. They are most of all attributes, and hold no number
and no setting but whether it trains."""

Function = Callable[..., Any]

Settings = dict[tuple[int, str], Any]
"""Values by the number of a module, -1 for the config of the decoder, and the name of its attribute."""

_Tensor = tuple[int, int, int, bool]
"""The identity, the version and the address of a tensor, and whether the next forward pass may pack it."""


@dataclass(frozen=True)
class ModelState:
    """A model at a moment. Two are equal if nothing that a look sees has changed."""

    attention: str | None
    """The attention implementation."""
    reach: tuple[Any, ...]
    """What the config says of the keys that queries see."""
    modules: list[int]
    training: list[bool]
    """Whether each module is in training mode, in which it may drop numbers."""
    autocast: "torch.dtype | None"
    """The dtype that `torch.autocast` computes in; None outside of it."""
    precision: str
    """That of products of float32 matrices, as `torch.set_float32_matmul_precision` sets it."""
    weights: list[_Tensor]
    buffers: list[_Tensor]
    """The floating-point buffers that a checkpoint may have, such as the bias of a router, and scalar ones."""
    numbers: list[tuple[str, float]]
    """The floats that modules compute with, such as the scaling of attention and the epsilon of a norm."""
    rotary: list[tuple[Any, ...]]
    """The frequencies of each rotary embedding, and their scaling."""
    adapters: list["AdapterLayer"]
    functions: list[tuple[int, ...]]
    """The user's hooks, and the user's functions in the place of a module's methods, of the functions in the file of a
    model or of the attention kernel: the number of the module in the decoder, -1 for those of all modules, and the
    identity of the function."""
    settings: Settings = field(compare=False, repr=False)
    """What modules but rotary embeddings compute with besides floats, such as the number of experts of a token or an
    activation function, and the numbers of the config. Passes change some themselves, such as counters: see
    `other_settings`."""
    _alive: list[object] = field(compare=False, repr=False)
    """Keeps the modules, tensors and functions: an identity may be given again to a new object."""

    def has_weights_of(self, earlier: "ModelState") -> bool:
        """Whether no weight has changed since. Weights may have been packed, and not be unpacked or packed again."""
        return len(self.weights) == len(earlier.weights) and all(
            now == before or (now[:2] == before[:2] and before[3] and not now[3])
            for now, before in zip(self.weights, earlier.weights, strict=True)
        )


AdapterLayer = tuple[tuple[str, Any], ...]
"""The adapters of peft that a layer computes with, or that are merged into it, by name, with their scaling."""


def state_of(decoder: nn.Module, encoders: Sequence[nn.Module] = ()) -> ModelState:
    """Returns the state of a decoder, with the weights of the `encoders` that make a part of its inputs.

    Weights on the meta device, which accelerate offloads, are left out.
    """
    modules = _modules(decoder)
    weights = [
        weight
        for module in chain(modules, *map(_modules, encoders))
        for weight in module._parameters.values()
        if weight is not None and weight.device.type != "meta"
    ]
    buffers: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    numbers: list[tuple[str, float]] = []
    rotary: list[tuple[Any, ...]] = []
    settings: Settings = {(-1, name): value for name, value in _numbers_of_config(decoder)}
    functions = [(-1, each) for each in _functions_of_all(decoder, dict.fromkeys(map(type, modules)))]
    for number, module in enumerate(modules):
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            functions += ((number, each) for each in _functions(module))
        is_rotary = "Rotary" in type(module).__name__
        for name, value in attributes_of(module).items():
            if name in _OF_MODULES:
                continue
            kind = type(value)
            if kind is float and not is_rotary:
                numbers.append((name, value))
            elif kind in _PLAIN and _is_setting(name):
                if not is_rotary:
                    settings[number, name] = value
                if kind in _METHODS and hasattr(type(module), name) and not _is_of_library(value):
                    functions.append((number, value))
            elif kind in _LISTS and _is_setting(name) and all(type(each) in _PLAIN for each in value):
                settings[number, name] = kind(value)
        if is_rotary:
            found = {name: value for name, value in module._buffers.items() if value is not None and "inv_freq" in name}
            buffers += found.values()
            scaling = [value for name, value in own.items() if name.endswith("attention_scaling")]
            rotary.append((*((name, _seen(value)) for name, value in found.items()), *scaling))
        else:
            others += _fixed_buffers(module)
    return ModelState(
        attention=getattr(decoder.config, "_attn_implementation", None),
        reach=reach_of(decoder),
        modules=[*map(id, modules)],
        training=[is_training(module) for module in modules],
        autocast=_autocast(decoder),
        precision=torch.get_float32_matmul_precision(),
        weights=[*map(_seen, weights)],
        buffers=[*map(_seen, others)],
        numbers=numbers,
        rotary=rotary,
        adapters=[*adapter_layers(modules)],
        functions=[(number, *_identity(function)) for number, function in functions],
        settings=settings,
        _alive=[*modules, *weights, *buffers, *others, *(function for _, function in functions)],
    )


def _modules(root: nn.Module) -> list[nn.Module]:
    """Returns a module and all that are inside it, each once. `root.modules()` takes three times as long."""
    found, seen = [root], {id(root)}
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def other_settings(now: Settings, before: Settings) -> set[tuple[int, str]]:
    """Returns the keys of the settings that differ between two looks. One that only one of them has does not count."""
    return {key for key, value in now.items() if key in before and before[key] != value}


@functools.cache
def _is_setting(name: str) -> bool:
    return name[0] != "_" and _OF_NO_PASS.match(name) is None


def _numbers_of_config(decoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the numbers of the config, which some models read in a pass, and the kernel of experts, by name."""
    for name, value in vars(decoder.config).items():
        if name == "_experts_implementation_internal" or (type(value) in _NUMBERS and _is_setting(name)):
            yield name, value


def _autocast(decoder: nn.Module) -> torch.dtype | None:
    device = next((weight.device.type for weight in decoder.parameters() if weight.device.type != "meta"), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def reach_of(decoder: nn.Module) -> tuple[Any, ...]:
    """Returns what the config of a decoder says of the keys that queries see: the types of layers, and the sizes."""
    config: Any = decoder.config
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return (tuple(getattr(config, "layer_types", None) or ()), *sizes)


def attributes_of(module: nn.Module) -> Mapping[str, Any]:
    """Returns the attributes of a module. A module of TorchScript has its own in C++, and a frozen one has none."""
    if not isinstance(module, torch.jit.ScriptModule):
        return vars(module)
    declared = getattr(module, "_concrete_type", None)
    return {} if declared is None else {name: getattr(module, name) for name in sorted(declared.get_attributes())}


def is_training(module: nn.Module) -> bool:
    """Whether a module is in training mode. A frozen one of TorchScript has no mode: it is in evaluation mode."""
    return bool(getattr(module, "training", False))


def _fixed_buffers(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the buffers of a module that a forward pass does not replace: those of a state dict, and scalars."""
    for name, value in module._buffers.items():
        if value is None or not value.is_floating_point() or value.device.type == "meta":
            continue
        if value.dim() == 0 or name not in module._non_persistent_buffers_set:
            yield value


def _functions(module: nn.Module) -> Iterator[Function]:
    """Yields the functions that a call of the module runs, and that no library has put there."""
    own = vars(module)
    of_accelerate = own.get("_hf_hook")  # its ModelHook, which the user may derive from
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    for function in (*hooks, *getattr(of_accelerate, "hooks", (of_accelerate,))):
        if function is not None and not _is_of_library(function):
            yield function
    forward = own.get("forward")
    if forward is not None and (_is_borrowed(forward, module) or not _is_of_library(forward)):
        yield forward


def _is_borrowed(forward: Any, module: nn.Module) -> bool:
    """Whether a forward is made for something else, as the method of another module or `torch.nn.functional.relu` are.

    Whoever has written it, the user has put it there: what a library puts there wraps the module or its forward.
    """
    if isinstance(forward, FunctionType):
        return forward.__closure__ is None
    return isinstance(forward, MethodType) and forward.__self__ is not module


def _functions_of_all(decoder: nn.Module, types: Iterable[type[nn.Module]]) -> Iterator[Function]:
    """Yields functions that no library has put there, and that modules of several types may call.

    These are the methods of each type, the hooks of every module, the attention kernel, and the functions in the file
    of a model, such as the one that rotates queries and keys.
    """
    types = [each for each in types if not issubclass(each, torch.jit.ScriptModule)]
    found: list[Function | None] = [each.forward for each in types]  # inherited ones too
    found += (*_global_forward_pre_hooks.values(), *_global_forward_hooks.values())
    found.append(ALL_ATTENTION_FUNCTIONS.get(getattr(decoder.config, "_attn_implementation", None)))
    # Functions in a notebook come and go.
    files = {each.__module__: None for each in types if each.__module__.startswith("transformers")}
    for namespace in (*map(vars, types), *(vars(sys.modules[name]) for name in files if name in sys.modules)):
        found += [value for value in namespace.values() if type(value) is FunctionType]
    for function in found:
        if function is not None and not _is_of_library(function):
            yield function


def _is_of_library(function: Any) -> bool:
    """Whether one of `_LIBRARIES` has made a function. Does not trust `__module__`, which a wrapper copies.

    What a decorator of torch wraps, such as `torch.no_grad()`, is whose the wrapped function is.
    """
    while True:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        if isinstance(function, MethodType):
            function = function.__func__
        is_plain = isinstance(function, FunctionType)  # other objects may answer to every name of an attribute
        module = function.__globals__.get("__name__") if is_plain else type(function).__module__
        package = str(module).partition(".")[0]
        if not (is_plain and package == "torch" and "__wrapped__" in vars(function)):
            return package in _LIBRARIES
        function = function.__wrapped__


def _identity(function: Any) -> tuple[int, ...]:
    """Names a function while it lives. Two looks at one method of an object are two objects.

    Functions are not compared by `==`, which compares the tensors of a dataclass.
    """
    return (id(function.__self__), id(function.__func__)) if isinstance(function, MethodType) else (id(function),)


def adapter_layers(modules: list[nn.Module]) -> Iterator[AdapterLayer]:
    """Yields the adapters in effect in each of the layers that peft has changed: none where they are disabled."""
    for module in modules:
        if not hasattr(type(module), "disable_adapters") or not hasattr(type(module), "active_adapters"):
            continue
        layer: Any = module
        if not hasattr(layer, "adapter_layer_names"):
            continue  # not of peft, such as a model of transformers, whose methods have these names
        scaling = getattr(layer, "scaling", None)
        factors = scaling if isinstance(scaling, dict) else {}
        yield tuple((name, factors.get(name)) for name in _in_effect(layer))


def _in_effect(layer: Any) -> list[str]:
    if layer.disable_adapters:
        return []
    if merged := getattr(layer, "merged_adapters", None):
        return [*merged]
    for hook in layer._forward_pre_hooks.values():
        if getattr(getattr(hook, "func", None), "__name__", None) == _PER_ROW_HOOK:
            of_rows = {*hook.keywords["adapter_names"]}
            return [] if of_rows == {NO_ADAPTER} else sorted(of_rows)
    held = [getattr(layer, name, ()) for name in layer.adapter_layer_names]
    return [name for name in layer.active_adapters if any(name in each for each in held)]


def _seen(tensor: torch.Tensor) -> _Tensor:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a tensor that wraps others, as of torchao, has no storage
        address = 0
    return id(tensor), version, address, _may_be_packed(tensor)


def _may_be_packed(tensor: torch.Tensor) -> bool:
    """Whether these are 4-bit weights of bitsandbytes, which a pass on the CPU packs once.

    Each `state_dict` unpacks them. The pass after it packs them to slightly other values.
    """
    quantized = getattr(tensor, "quant_state", None)
    return quantized is not None and not getattr(quantized, "packing_format_for_cpu", False)
