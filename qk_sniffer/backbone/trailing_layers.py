"""Decoders without the layers that nobody asks for: neither their weights are read, nor do they run."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from qk_sniffer.backbone.family import Family


@contextmanager
def cut_after(layers: Collection[int], family: Family) -> Iterator[None]:
    """Models that are built meanwhile end with the last of `layers`, counted as attention layers are.

    The config stays as it is, and with it whatever depends on the number of layers. A model that lacks one of `layers`,
    or does not keep its layers in one list, in their order, is built whole.
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
    """The outermost list of modules that the module `name` is in, and where."""
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return module, int(part)
        module = getattr(module, part)
    return None, 0
