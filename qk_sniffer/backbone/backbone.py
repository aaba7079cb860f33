"""Runs the backbone, the model without its language-model head, and describes its attention layers."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from qk_sniffer.backbone import limits, rotary
from qk_sniffer.backbone.attention_terms import why_unknown
from qk_sniffer.backbone.banded_attention import banded
from qk_sniffer.backbone.cuda_attention import SDPA, cudnn_limited
from qk_sniffer.backbone.family import Family, RotaryCall
from qk_sniffer.backbone.layers import NOT_SHOWN, LayerFacts, LayerHeads
from qk_sniffer.backbone.quantization import COMPUTED_IN, StoredWeights
from qk_sniffer.backbone.rotation import NOT_RECORDED, Frequencies, Rotation, frequencies, rotation
from qk_sniffer.backbone.slots import Slots
from qk_sniffer.backbone.tap import (
    AttentionCall,
    ForwardDone,
    KernelRun,
    OnOutput,
    OnRotary,
    rotary_functions,
    shows_nothing,
    tap,
)
from qk_sniffer.backbone.window_kernels import Form, WindowKernel, window_kernel
from qk_sniffer.errors import CaptureError, QkSnifferError

PROBE_TOKENS = 6
"""Enough positions to tell the frequencies of two kinds of layers apart."""

SECOND_PROBE_TOKENS = 64


class Backbone:
    """Holds a loaded decoder. `forward` runs it and shows every attention call to a callback."""

    def __init__(
        self,
        decoder: nn.Module,
        family: Family,
        *,
        pre_rope: bool = False,
        banded_attention: bool = True,
        stored: StoredWeights = StoredWeights(),  # noqa: B008  (frozen)
        adapter: dict[str, str | None] | None = None,
    ) -> None:
        self.decoder = decoder
        self.family = family
        self.pre_rope = pre_rope
        self.banded_attention = banded_attention
        self.stored = stored
        self.adapter = adapter
        """The facts of the adapter on the decoder, for the manifest; None without an adapter."""
        self.window_kernel: WindowKernel | None = None
        """Computes bands, in place of blocks; `probe` chooses it, on CUDA in half precision."""
        self.attention_layers = family.attention_layers(decoder)
        weights = list(decoder.parameters())
        # Weights that accelerate offloads are on the meta device until a forward pass needs them.
        devices = [weight.device for weight in weights if weight.device.type != "meta"]
        self.device = devices[0] if devices else torch.device("cpu")
        # Quantized weights are packed into integers.
        self.dtype = next(weight.dtype for weight in weights if weight.dtype in COMPUTED_IN)
        boundaries = rotary.length_boundary(self.config), family.length_boundary(self.config)
        self.length_boundary = min((boundary for boundary in boundaries if boundary is not None), default=None)
        """Texts of more tokens must run alone: their rotary frequencies depend on the length of the forward pass, or
        the keys that their queries keep (`Family.length_boundary`). None if no text must."""
        self.num_positions = rotary.num_positions(decoder)
        """The most tokens that the decoder's table of positions allows; None without a table."""
        self.max_positions = limits.max_positions(self.config)
        """The most tokens of a text that the config provides for; None if it names no number."""
        self.num_layers = limits.num_layers(self.config)
        """The layers of the decoder, with attention or not; None if the config names no number."""
        self.num_embeddings = limits.num_embeddings(decoder)
        """The rows of the embedding of token ids; None if their number is not known."""
        self._rotary_state = rotary.RotaryState(decoder)

    @property
    def config(self) -> PretrainedConfig:
        """The text config of the decoder."""
        config: PretrainedConfig = self.decoder.config  # type: ignore[assignment]
        return config

    def forward(
        self,
        ids: torch.Tensor,
        on_call: Callable[[AttentionCall], None],
        on_run: Callable[[KernelRun], None] | None = None,
        on_output: OnOutput | None = None,
        *,
        both_stages: bool = False,
    ) -> None:
        """Runs the decoder on token ids (B, n), padded on the right; the callbacks may raise `ForwardDone`.

        The decoder receives no attention mask: causal attention hides the padding from every valid position.

        Raises:
            CaptureError: the decoder's code fails, the memory is exhausted, or one of the errors of `tap`.
        """
        try:
            self._forward(ids, on_call, on_run, on_output, both_stages=both_stages)
        except QkSnifferError:
            raise
        except (AttributeError, IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                is_spread = len({weight.device for weight in self.decoder.parameters()}) > 1
                way_out = _less_memory(ids, more_gpus=torch.cuda.device_count() > 1 and not is_spread)
                raise CaptureError(f"out of memory in a forward pass over {way_out} ({error})") from error
            raise CaptureError(
                f"{_model_type(self.decoder)}: its forward pass over {_by(ids)} tokens failed: {type(error).__name__}: "
                f"{error}. If the text is too long for the model, lower model.tokenizer.max_length; if the error names "
                "a Band, set inference.banded_attention=false"
            ) from error

    def _forward(
        self,
        ids: torch.Tensor,
        on_call: Callable[[AttentionCall], None],
        on_run: Callable[[KernelRun], None] | None = None,
        on_output: OnOutput | None = None,
        on_rotary: OnRotary | None = None,
        *,
        both_stages: bool = False,
    ) -> None:
        tapped = self.tapped(on_call, on_run, on_output, on_rotary, both_stages=both_stages)
        with self.bands(), tapped, suppress(ForwardDone):
            self.run(ids)

    def bands(self) -> AbstractContextManager[None]:
        """Returns the context of forward passes whose sliding windows are bands, if this backbone has any."""
        return banded(self.window_kernel) if self.banded_attention else nullcontext()

    def run(self, ids: torch.Tensor) -> None:
        """Runs a plain forward pass over token ids (B, n): no tap, no banded attention, no state of earlier passes."""
        if self.length_boundary is not None:
            self._rotary_state.restore()
        with torch.inference_mode(), cudnn_limited(ids.shape[1], self.device):
            self.decoder(input_ids=on_device(ids, self.device), use_cache=False)

    @contextmanager
    def tapped(
        self,
        on_call: Callable[[AttentionCall], None],
        on_run: Callable[[KernelRun], None] | None = None,
        on_output: OnOutput | None = None,
        on_rotary: OnRotary | None = None,
        *,
        both_stages: bool = False,
        slots: Callable[[int], Slots | None] | None = None,
        in_words: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[None]:
        """Opens the tap for forward passes that the caller runs; with `slots`, also those with padding and a cache."""
        family, layers = self.family, self.attention_layers
        with tap(
            layers,
            on_call,
            family=family,
            pre_rope=self.pre_rope,
            both_stages=both_stages,
            on_run=on_run,
            on_output=on_output,
            on_rotary=on_rotary,
            slots=slots,
            in_words=in_words,
        ):
            yield

    def probe(self, *, both_stages: bool = False) -> list[LayerFacts]:
        """Returns the facts of every attention layer, from a forward pass over a few tokens; sorted by layer.

        `both_stages` also checks that later passes can show the vectors before RoPE and those after it.

        Raises:
            CaptureError: the decoder does not run, shows no attention call, or a layer shows several.
        """
        facts: dict[int, LayerFacts] = {}
        rotations: dict[int, Rotation | str | None] = {}
        keys: dict[int, torch.Tensor] = {}  # by layer: some layers attend to the keys of an earlier one
        known = self.frequencies
        modules: dict[int, nn.Module] = {}
        windows: dict[Form, int] = {}

        def note_window(run: KernelRun) -> None:
            window, value = run.call.sliding_window, run.value
            if window is not None and value is not None and self.config._attn_implementation == SDPA:
                windows[Form.of(run.query, run.key, value)] = window

        def note_rotation(layer: int, module: nn.Module, calls: list[RotaryCall], *states: torch.Tensor) -> None:
            query, key = states
            modules[layer] = module
            if layer not in rotations or isinstance(rotations[layer], str):
                rotations[layer] = rotation(module, calls, query, key, known, self.family)
            if isinstance(rotations[layer], str):
                for earlier, one in keys.items():
                    of_key = rotations[earlier]
                    if isinstance(of_key, Rotation) and one.device == key.device and torch.equal(one, key):
                        rotations[layer] = rotation(module, calls, query, key, known, self.family, of_key)
            keys[layer] = key

        def record(call: AttentionCall) -> None:
            if call.layer in facts or call.layer < 0:
                raise CaptureError(
                    f"{_model_type(self.decoder)}: layer {call.layer} attends more than once in a forward pass, or "
                    "several attention modules name this layer as theirs; a family can distinguish them: "
                    "model.family=package.module:Class"
                )
            facts[call.layer] = layer_facts(call)

        def record_output(call: AttentionCall, output: torch.Tensor | None) -> None:
            if isinstance(facts[call.layer].output_dim, int):
                reason = "it attends to several values with each query and key"
                widths: dict[str, Any] = {"value_dim": reason, "output_dim": reason}
            elif output is None:
                widths = {"output_dim": "its kernel returns its output in another shape"}
            else:
                widths = {"output_dim": output.shape[-1]}
            facts[call.layer] = replace(facts[call.layer], **widths)

        try:
            ids = self._probe_ids(PROBE_TOKENS)
            self._forward(ids, record, note_window, record_output, note_rotation, both_stages=both_stages)
        except QkSnifferError:
            raise
        except Exception as error:  # any error of the model's code
            raise CaptureError(
                f"{_model_type(self.decoder)}: its decoder does not run on token ids alone: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not facts:
            if attention := [module for module in self.decoder.modules() if "Attention" in type(module).__name__]:
                if self.attention_layers:
                    raise shows_nothing(attention, self.family)
                names = ", ".join(sorted({type(module).__name__ for module in attention}))
                raise CaptureError(
                    f"this model's attention ({names}) does not name its layer, as transformers' decoders do: a "
                    "family can name the layers (Family.attention_layers, see models/ADDING.md)"
                )
            raise CaptureError(f"{_model_type(self.decoder)}: this model has no softmax attention to capture")
        if self.banded_attention:
            self.window_kernel = window_kernel(windows)
        if any(isinstance(one, str) for one in rotations.values()):
            with suppress(Exception):  # of a longer text, in which a slow rotation is larger than rounding
                self._forward(self._probe_ids(SECOND_PROBE_TOKENS), lambda call: None, on_rotary=note_rotation)
        if known and not rotary_functions(self.attention_layers, self.family):
            reason = f"{NOT_RECORDED}the decoder has rotary frequencies, and no rotary function that is known"
            rotations = dict.fromkeys(facts, reason)
        found = {layer: asdict(one) if isinstance(one, Rotation) else one for layer, one in rotations.items()}
        stored = self._stored_names(modules)
        return [replace(facts[layer], rotation=found[layer], module=stored[layer]) for layer in sorted(facts)]

    def _stored_names(self, modules: Mapping[int, nn.Module]) -> dict[int, str | None]:
        """Returns the names of attention modules in the checkpoint, by layer; None for one that serves several."""
        inner = {module: name for name, module in self.decoder.named_modules()}
        serves = Counter(modules.values())
        return {
            layer: self.stored.modules.get(inner[module]) if serves[module] == 1 else None
            for layer, module in modules.items()
        }

    def _probe_ids(self, length: int) -> torch.Tensor:
        """Returns at most `length` token ids (1, n), which every vocabulary and table of positions has."""
        length = min(length, self.length_boundary or length, self.num_positions or length)
        return 1 + torch.arange(length)[None] % 2

    @cached_property
    def frequencies(self) -> dict[str, Frequencies]:
        """The frequencies of the decoder's rotary embeddings, by name."""
        return frequencies(self.decoder, self.config)

    def rotary_parameters(self) -> dict[str, Any]:
        """Returns the inverse frequencies, the attention scaling and the config's rotary parameters."""
        by_name = {name: one.to_dict() for name, one in self.frequencies.items()}
        return rotary.parameters(self.decoder, self.config) | {"frequencies": by_name}


def layer_facts(call: AttentionCall) -> LayerFacts:
    """Returns the facts of a layer that a call of its kernel shows: all but those of its output and rotation."""
    head_dim = call.query.shape[-1]
    return LayerFacts(
        LayerHeads(
            layer=call.layer,
            num_q_heads=call.query.shape[1],
            num_k_heads=call.key.shape[1],
            head_dim=head_dim,
            sliding_window=call.sliding_window,
            hides_keys=call.hides_keys,
        ),
        attention_chunk=call.attention_chunk,
        softmax_scale=head_dim**-0.5 if call.softmax_scale is None else float(call.softmax_scale),
        softcap=call.softcap,
        sinks=None if call.sinks is None else call.sinks.double().tolist(),
        position_bias=call.position_bias,
        sparse_attention=call.sparse_attention,
        unknown_attention=why_unknown(call),
        value_dim=_value_dim(call),
    )


def _value_dim(call: AttentionCall) -> int | str:
    if call.value is None:
        return NOT_SHOWN
    if call.value.shape[:3] != call.key.shape[:3]:
        return "its values are not one for each key"
    return call.value.shape[-1]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a forward pass says that the memory is exhausted."""
    # On the CPU, torch raises a RuntimeError of no class of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _less_memory(ids: torch.Tensor, *, more_gpus: bool) -> str:
    """Names the batch that is too large, and the way out."""
    texts, longest = ids.shape
    if texts > 1:
        return (
            f"{texts} x {longest} tokens: rerun the command with inference.max_batch_tokens={texts // 2 * longest}, "
            "which keeps the captured examples"
        )
    return (
        f"a single text of {longest} tokens: rerun the command with more memory"
        f"{' (model.device_map=balanced uses all GPUs)' if more_gpus else ''}, which keeps the captured examples, or "
        "make another dataset of shorter texts with model.tokenizer.max_length"
    )


def _by(ids: torch.Tensor) -> str:
    return " x ".join(map(str, ids.shape))


def _model_type(decoder: nn.Module) -> str:
    return str(getattr(getattr(decoder, "config", None), "model_type", type(decoder).__name__))


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies values from the host's memory to `device`. The host does not wait for a copy to CUDA."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
