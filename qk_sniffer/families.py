"""What a model family must say about itself.

`Family` is the generic answer and serves every model whose decoder calls transformers' attention interface.
A family that differs overrides one or two methods in a file of its own, `models/<model_type>.py`, with a class
named `Family`; it is found by the config's `model_type`, or named by `model.family=package.module:Class`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from qk_sniffer.errors import CaptureError, ConfigError

HOOKED_TYPES = frozenset({"llama", "mistral", "ministral", "ministral3", "mllama_text_model", "qwen2", "qwen3"}) | {
    *("cohere2", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "granite", "olmo2", "qwen3_moe", "smollm3")
}
"""Model types whose query and key follow from their projections, norms and rotary function alone, as tests show.

Elsewhere something may come between, and a right dataset would fail its proof."""

RotaryCall = tuple[torch.Tensor, torch.Tensor]
"""A tensor that went into a rotary function, and the tensor that came out of it."""


class Family:
    """The generic family. Methods take modules as they are after loading."""

    auto_class = "AutoModel"
    """The class of transformers that loads the decoder without its language-model head."""

    inside: Mapping[str, str] = MappingProxyType(
        {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
    )
    """How a multimodal checkpoint names its decoder's weights, in older and in newer files: pattern -> replacement."""

    def decoder(self, model: Any) -> nn.Module:
        """The text decoder inside the loaded `model`: what is run, without any head or vision tower."""
        decoder: nn.Module = model.get_decoder()
        return decoder

    def attention_layers(self, decoder: nn.Module) -> dict[nn.Module, int]:
        """The self-attention modules of `decoder`, each with its layer index. No other module is captured."""
        return {
            module: layer
            for module in decoder.modules()
            if isinstance(layer := getattr(module, "layer_idx", None), int)
            and "Attention" in type(module).__name__
            and "Cross" not in type(module).__name__
            and not type(module).__name__.endswith("Layer")
            and not getattr(module, "is_cross_attention", False)
        }

    def sliding_window(self, module: nn.Module, arguments: dict[str, Any]) -> int | None:
        """The window of this attention call: how many positions a query sees, itself included; None: all."""
        return arguments.get("sliding_window")

    def before_rotary(
        self, module: nn.Module, rotary_calls: Sequence[RotaryCall], query: torch.Tensor, key: torch.Tensor
    ) -> RotaryCall:
        """What `query` and `key`, as attention receives them, were before the rotary embedding.

        The tensors must be the very outputs of rotary calls: then their inputs are the answer, bit for bit. A
        layer without any rotary call (NoPE) rotates nothing. Anything between the two is not defined here.
        """
        if not rotary_calls:
            return query, key
        inputs = {id(after): before for before, after in rotary_calls}
        if id(query) not in inputs or id(key) not in inputs:
            raise CaptureError(
                f"{type(module).__name__} changes the query or the key after its rotary embedding, so that vectors "
                "before RoPE are not defined for this model: set capture.capture_pre_rope=false, or say what they "
                "are in a family (model.family=package.module:Class)"
            )
        return inputs[id(query)], inputs[id(key)]

    def projections(self, module: nn.Module) -> dict[str, nn.Module] | None:
        """The submodules whose outputs are query and key before RoPE, by kind, for the proof by hooks.

        A norm of query or key follows its projection. None: not known for this model, so there is no proof by hooks.
        """
        if getattr(getattr(module, "config", None), "model_type", None) not in HOOKED_TYPES:
            return None
        found: dict[str, nn.Module] = {}
        for kind in ("q", "k"):
            parts = (getattr(module, f"{kind}_norm", None), getattr(module, f"{kind}_proj", None))
            part = next((part for part in parts if isinstance(part, nn.Module)), None)
            if part is None:
                return None
            found[kind] = part
        return found

    def rotated(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, embeddings: tuple[torch.Tensor, ...] | None
    ) -> RotaryCall | None:
        """`query` (1, H, n, d) and `key` (1, K, n, d) after RoPE, for the proof by hooks.

        `embeddings` is what the module's rotary embedding gave this layer, if anything. None: not known how.
        """
        if not getattr(module, "use_rope", True):
            return query, key
        rotary = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if rotary is None or not isinstance(embeddings, tuple):
            return None
        turned: RotaryCall = rotary(query, key, *embeddings)
        return turned


def find_family(model_type: str, override: str | None = None) -> Family:
    """The family named by `override` (`package.module:Class`), else that of `model_type`, else the generic one.

    Raises:
        ConfigError: `override` names nothing that can be imported.
    """
    if override is not None:
        module_name, _, class_name = override.partition(":")
        try:
            family = getattr(importlib.import_module(module_name), class_name or "Family")()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                [f"model.family={override}: {error}; expected package.module:Class, a subclass of {__name__}.Family"]
            ) from error
        if not isinstance(family, Family):
            raise ConfigError([f"model.family={override}: {class_name} is not a subclass of {__name__}.Family"])
        return family
    name = f"qk_sniffer.models.{model_type.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return Family()
    concrete: Family = importlib.import_module(name).Family()
    return concrete
