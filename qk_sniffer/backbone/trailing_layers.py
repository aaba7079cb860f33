"""Removes the layers after the last captured one: their weights are not read, and they do not run."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from qk_sniffer.backbone.family import Family


@contextmanager
def cut_after(layers: Collection[int], family: Family) -> Iterator[None]:
    """Cuts models that are built inside the context after the last of `layers`, which are attention layers' indices.

    The config does not change, nor does anything that depends on its number of layers. A model is built whole if it
    lacks one of `layers`, or if it does not keep its layers in order in one list.
    """
    original: Callable[[PreTrainedModel], None] = PreTrainedModel.post_init

    def post_init(self: PreTrainedModel) -> None:
        original(self)
        _cut(self, layers, family)

    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.post_init = original  # type: ignore[method-assign]


def _cut(model: nn.Module, layers: Collection[int], family: Family) -> None:
    attention = family.attention_layers(model)
    if not set(layers) <= set(attention.values()) or type(family).layer is not Family.layer:
        return
    places = [
        (*_place(model, name), attention[module]) for name, module in model.named_modules() if module in attention
    ]
    stacks = {stack for stack, _, _ in places}
    if len(stacks) != 1 or len(places) != len(attention):
        return
    in_order = sorted((item, layer) for _, item, layer in places)
    (stack,) = stacks
    if not isinstance(stack, nn.ModuleList) or any(a >= b for (_, a), (_, b) in pairwise(in_order)):
        return
    last = max(item for item, layer in in_order if layer in layers)
    del stack[last + 1 :]


def _place(model: nn.Module, name: str) -> tuple[nn.Module | None, int]:
    """Returns the outermost list of modules that contains the module `name`, and its index in it."""
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return module, int(part)
        module = getattr(module, part)
    return None, 0
