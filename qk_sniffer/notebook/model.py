"""Finds the decoder inside a model that the user has in memory, and describes its layers without changing its state."""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qk_sniffer.backbone.backbone import Backbone
from qk_sniffer.backbone.family import Family, find_family, imported_family
from qk_sniffer.backbone.layers import LayerFacts
from qk_sniffer.backbone.quantization import COMPUTED_IN, StoredWeights, quantization_config
from qk_sniffer.backbone.rotary import RotaryState
from qk_sniffer.errors import CaptureError
from qk_sniffer.notebook.model_state import (
    AdapterLayer,
    ModelState,
    Settings,
    adapter_layers,
    attributes_of,
    is_training,
    other_settings,
    reach_of,
    state_of,
)
from qk_sniffer.text import enumerated, shortened

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes of a module with hooks that anyone may register."""


class UserBackbone(Backbone):
    """The decoder of a model that the user goes on using, for training too."""

    def __init__(self, model: nn.Module, *, family: str | Family | None = None, pre_rope: bool = False) -> None:
        """`model` is a model of transformers, or a module that wraps one, as those of peft and of torch.compile do.

        Raises:
            CaptureError: it is not, its decoder attends to an encoder, or its vectors cannot be stored.
            ConfigError: `family` cannot be imported.
        """
        self.model = pretrained_model(model)
        config: Any = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise CaptureError(
                f"{type(self.model).__name__} has a decoder that attends to an encoder: only models that are decoders "
                "alone can be captured"
            )
        text = config.get_text_config(decoder=True)
        chosen = family if isinstance(family, Family) else None
        if chosen is None:
            chosen = find_family(text.model_type) if family is None else imported_family(str(family))
        decoder = _decoder(self.model, chosen)
        _refuse_scripted_attention(decoder)
        if not any(weight.dtype in COMPUTED_IN for weight in decoder.parameters()):
            found = enumerated(sorted({str(weight.dtype).removeprefix("torch.") for weight in decoder.parameters()}))
            raise CaptureError(
                f"{type(decoder).__name__} has weights in {found or 'no dtype'}: vectors in bfloat16, float16 or "
                "float32 can be captured; convert the model, for example with model.float()"
            )
        stored = StoredWeights(quantization=quantization_config(config))
        super().__init__(decoder, chosen, pre_rope=pre_rope, banded_attention=False, stored=stored)
        # Those of peft make virtual tokens, or keys and values, of weights that are outside of the decoder.
        encoders = [getattr(module, "prompt_encoder", None) for module in model.modules()]
        self._encoders = [encoder for encoder in encoders if isinstance(encoder, nn.Module)]
        self._described = self._changeable()
        self._at_first_pass: ModelState | None = None
        self._steps = self._steps_at_first_pass = 0
        self._keeps_state = False
        # At the begin of the last pass, at its end, and at the end of the last one with rows.
        self._settings_at_begin: Settings = {}
        self._settings_at_end: Settings = {}
        self._settings_left: Settings = {}
        self._set_by_passes: set[tuple[int, str]] = set()

    def check_unchanged(self) -> None:
        """Checks that the model is still as it was when it was described. Its weights may have other values.

        Raises:
            CaptureError: it is not.
        """
        if changed := self._changed():
            raise CaptureError(
                f"the {enumerated(changed)} of {type(self.model).__name__} changed after qk_sniffer.capture described "
                "it: call qk_sniffer.capture again"
            )
        self._keeps_state = False

    def begin_pass(self) -> None:
        """Checks the model, as `check_pass` does. Before the first pass with rows, it may be in any state.

        Raises:
            CaptureError: a reason of `check_pass`.
        """
        if not self._keeps_state:
            self._at_first_pass, self._settings_left = None, {}
        now = state_of(self.decoder, self._encoders)
        set_between = other_settings(now.settings, self._settings_left) - self._set_by_passes
        self._check(now, {name for _, name in set_between})
        self._settings_at_begin = now.settings

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes a step of any optimizer. A fused one writes weights without raising their versions."""
        own = {id(weight) for module in (self.decoder, *self._encoders) for weight in module.parameters()}
        self._steps += any(id(weight) in own for group in optimizer.param_groups for weight in group["params"])

    def keep_state(self) -> None:
        """Makes the state of the model the one of all passes: the pass that ends has rows."""
        self._keeps_state = True
        self._settings_left = self._settings_at_end

    def check_pass(self) -> None:
        """Checks, at the end of a forward pass, that the model is as it was described and as in all passes.

        Raises:
            CaptureError: it is not, or its weights are not those of the first pass since `check_unchanged`.
        """
        now = state_of(self.decoder, self._encoders)
        self._check(now)
        self._set_by_passes |= other_settings(now.settings, self._settings_at_begin)
        self._settings_at_end = now.settings

    def _check(self, now: ModelState, set_between: Collection[str] = ()) -> None:
        """Checks the state `now`. `set_between` names the settings that have changed since the last pass."""
        first = self._at_first_pass
        is_trained = first is not None and self._steps != self._steps_at_first_pass
        if now == first and not set_between and not is_trained:
            return
        changed = self._changed()
        if first is not None:
            changed += self._differing(now, first)
        if is_trained and "weights" not in changed:
            changed.append("weights")
        if set_between:
            changed.append(f"settings of modules or config ({shortened(sorted(set_between), 5)})")
        if changed:
            raise CaptureError(
                f"the {enumerated(changed)} of {type(self.model).__name__} changed inside the block of "
                "qk_sniffer.capture, whose rows are of one state of the model: this forward pass is not captured. End "
                "the block before the change, and open a capture of its own for each state"
            )
        self._at_first_pass, self._steps_at_first_pass = now, self._steps

    @staticmethod
    def _differing(now: ModelState, first: ModelState) -> Iterator[str]:
        """Yields the names of what changed between passes, of what the description of the model does not tell."""
        if now.modules != first.modules:
            yield "modules"
        if not now.has_weights_of(first):
            yield "weights"
        if (now.buffers, now.numbers) != (first.buffers, first.numbers):
            yield "buffers, or the numbers that its modules compute with,"
        if now.functions != first.functions:
            yield "hooks, or the functions in the place of a module's own,"
        if now.training != first.training:
            yield "training mode"
        if now.autocast != first.autocast:
            yield "dtype of torch.autocast"
        if now.precision != first.precision:
            yield "precision of torch.set_float32_matmul_precision"

    def _changed(self) -> list[str]:
        now = self._changeable()
        return [name for name, value in self._described.items() if now[name] != value]

    def _changeable(self) -> dict[str, Any]:
        """Returns the facts of the model that a capture depends on and that the user may change, by name."""
        weights = [weight for weight in self.decoder.parameters() if weight.device.type != "meta"]
        return {
            "dtype": {weight.dtype for weight in weights},
            "device": {weight.device for weight in weights},
            "attention implementation": self.config._attn_implementation,
            "types of layers": reach_of(self.decoder),
            "attention layers": self.family.attention_layers(self.decoder),
            # Those that depend on the length of the last text change by themselves.
            "rotary frequencies": self.rotary_parameters() if self.length_boundary is None else None,
            "adapter": (self._adapter_layers(), self.adapter_settings),
        }

    def _adapter_layers(self) -> list[AdapterLayer]:
        return [*adapter_layers([*self.decoder.modules()])]

    def run(self, ids: torch.Tensor) -> None:
        """Runs a plain forward pass over token ids (B, n)."""
        # Not in inference mode: a buffer that the pass makes could not be used in training.
        with torch.no_grad():
            self.decoder(input_ids=ids.to(self.device), use_cache=False)

    def described_layers(self, *, both_stages: bool) -> list[LayerFacts]:
        """Returns the facts of every attention layer, as `probe` does. The state of the model stays as it is.

        Raises:
            CaptureError: a reason of `probe`.
        """
        with torch.inference_mode(mode=False), _undisturbed(self.decoder):
            return self.probe(both_stages=both_stages)

    @property
    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        """The settings of the adapters of the package peft that the decoder computes with, as plain data, by name.

        A disabled adapter is not among them; one that is merged into the weights is.
        """
        configs = getattr(self.model, "peft_config", None) or {}
        names = sorted({name for layer in self._adapter_layers() for name, _ in layer})
        return {name: configs[name].to_dict() if name in configs else {} for name in names}


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """Returns the model of transformers that `model` is or wraps.

    Raises:
        CaptureError: there is none, or there are several.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"{type(model).__name__} is not a model: pass one that transformers' from_pretrained returns"
        )
    first = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if first is None:
        raise CaptureError(
            f"{type(model).__name__} has no model of transformers inside: pass one that from_pretrained returns"
        )
    inside = {*first.modules()}
    if others := [module for module in model.modules() if isinstance(module, PreTrainedModel) and module not in inside]:
        names = enumerated(sorted({type(module).__name__ for module in (first, *others)}))
        raise CaptureError(f"{type(model).__name__} has several models inside ({names}): pass the one to capture")
    return first


def _decoder(model: PreTrainedModel, family: Family) -> nn.Module:
    """Returns the text decoder of `model`, without a language-model head if the model can name it."""
    found: PreTrainedModel = model
    while True:
        try:
            inner = family.decoder(found)
        except (AttributeError, NotImplementedError):
            return found
        inner = getattr(inner, "_orig_mod", inner)  # of a compiled module
        if inner is found or not isinstance(inner, PreTrainedModel):
            return found
        found = inner


def _refuse_scripted_attention(decoder: nn.Module) -> None:
    """Refuses attention in TorchScript, whose calls Python does not see: it would be missing from the capture.

    Raises:
        CaptureError: names the module.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and "Attention" in str(getattr(module, "original_name", "")):
            raise CaptureError(
                f"{name} of {type(decoder).__name__} is a module of TorchScript, whose attention cannot be seen: pass "
                "the model as it was before torch.jit.script or torch.jit.trace"
            )


@contextmanager
def _undisturbed(decoder: nn.Module) -> Iterator[None]:
    """Restores, after forward passes in the context, all that they change in `decoder` and in torch.

    These are the attributes of its modules, such as the state that recurrent layers keep, which tensors are their
    buffers, and the numbers of rotary frequencies. In the context, the decoder is in evaluation mode, and no hook of
    the user sees its passes.
    """
    modules = [*decoder.modules()]
    saved = [_Saved(module) for module in modules]
    rotary = RotaryState(decoder)
    devices = {weight.device for weight in decoder.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng([*devices]):
        try:
            for module in modules:
                vars(module).update({name: OrderedDict() for name in _HOOKS})
                if not isinstance(module, torch.jit.ScriptModule):
                    vars(module)["training"] = False
                elif is_training(module):
                    module.training = False
            yield
        finally:
            for each in saved:
                each.restore()
            rotary.restore()


class _Saved:
    """The attributes and the buffers of a module, to restore them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = {**vars(module)}
        self._buffers = dict(module._buffers.items())
        # A module of TorchScript keeps these in C++. None can be added or removed there.
        self._scripted = {**attributes_of(module)} if isinstance(module, torch.jit.ScriptModule) else None

    def restore(self) -> None:
        own = vars(self._module)
        own.clear()
        own.update(self._own)
        if self._scripted is None:
            self._module._buffers.clear()
            self._module._buffers.update(self._buffers)
            return
        for name, value in self._scripted.items():
            if getattr(self._module, name) is not value:
                setattr(self._module, name, value)
